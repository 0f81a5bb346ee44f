"""What the check does, stage by stage; each returns plain values for ``results``.

Owns the stages and their order. A stage must not rely on another one but through its kept result.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmark.gpu import models
from benchmark.gpu.lengths import draw_requests, longest_output_tokens
from benchmark.gpu.pair import ROOT, SYSTEMS, Engine, EngineFailed, Setup, both, turns
from benchmark.gpu.profile import decode_samples, fit, mixed_samples
from benchmark.gpu.results import Results
from benchmark.gpu.sizes import Device, Load, Sizes
from benchmark.scheduler_comparison.figures import Spread, figures
from benchmark.scheduler_comparison.worker import ECONOSERVE, STOCK
from benchmark.scheduler_comparison.workload import Request, Vocabulary

PACKAGES = ("econoserve", "sglang", "torch", "triton", "flashinfer-python", "sglang-kernel")
DOCTOR_LIMIT_S = 240
KERNEL_LIMIT_S = 560.0
"""FlashInfer compiles while the first engine starts."""

SEED, WARMUP_SEED = 1, 1001
WARMUP_REQUESTS = 8
LOAD_FACTOR = 1.2
"""Arrivals per second in goodput runs, as a multiple of what stock SGLang completes in a burst."""

SLO_FACTOR = 5.0
"""The SLO in goodput runs, as a multiple of the mean time of a request with few beside it."""


class StageFailed(Exception):
    """A stage found something wrong."""


@dataclass(frozen=True, slots=True)
class Check:
    """What all stages know.

    Attributes:
        device: where engines run.
        sizes: how much is measured.
        folder: keeps results, models and logs.
        results: of the stages that are done.
    """

    device: Device
    sizes: Sizes
    folder: Path
    results: Results

    def setup(self, model: str, dtype: str, kvc_tokens: int, scale: float, **engine: Any) -> Setup:
        """Settings of both systems.

        Args:
            model: of ``models.SHAPES``, or ``demo``.
            dtype: of its weights.
            kvc_tokens: size of the KVC.
            scale: factor on lengths; says what limit requests state.
            engine: more of SGLang's arguments.

        Returns:
            The settings.
        """
        path = models.ensure(model, self.folder / "models")
        words = Vocabulary.of_model(path)
        return Setup(
            engine={
                **self.sizes.engine,
                "model_path": str(path),
                "load_format": models.load_format(model),
                "dtype": dtype,
                "max_total_tokens": kvc_tokens,
                "max_running_requests": self.sizes.max_running,
                "enable_custom_logit_processor": True,
                "random_seed": SEED,
                "log_level": "warning",
                **engine,
            },
            token_ids=words.prompt_ids[:4000],
            eos_ids=words.eos_ids,
            max_new_tokens=longest_output_tokens(scale),
            limit_s=self.sizes.limit_s,
            settings={},
        )

    def logs(self, stage: str) -> Path:
        """Folder for what the engines of a stage print.

        Args:
            stage: its name.

        Returns:
            The folder.
        """
        folder = self.folder / "logs" / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def stages(check: Check) -> dict[str, Callable[[], dict[str, Any]]]:
    """All stages, in order.

    Args:
        check: what they know.

    Returns:
        Functions by name.
    """
    found = {
        "imports": partial(imports, check),
        "kernels": partial(kernels, check),
        "correctness-float32": partial(correctness, check, "float32"),
        "correctness-bfloat16": partial(correctness, check, "bfloat16"),
    }
    for load in check.sizes.loads:
        found[f"unconstrained-{load.model}"] = partial(unconstrained, check, load)
        found[f"goodput-{load.model}"] = partial(goodput, check, load)
    return {**found, "profile": partial(profile, check)}


def imports(check: Check) -> dict[str, Any]:
    """Everything can be imported, and the doctor is content."""
    done = subprocess.run(
        [sys.executable, "-m", "econoserve.cli", "doctor"],
        cwd=ROOT,
        env={**os.environ, "SGLANG_PLUGINS": ""},
        capture_output=True,
        text=True,
        timeout=DOCTOR_LIMIT_S,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode != 0:
        raise StageFailed("\n".join([*lines, *done.stderr.splitlines()[-10:]]))
    return {"doctor": lines, "versions": dict(_versions()), "device": _device_name(check.device)}


def _versions() -> Iterable[tuple[str, str]]:
    yield "python", sys.version.split()[0]
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def _device_name(device: Device) -> str:
    import torch

    if device is Device.CPU:
        return f"CPU, {len(os.sched_getaffinity(0))} cores"
    return f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"


def kernels(check: Check) -> dict[str, Any]:
    """Compile every kernel that the later stages use: their shapes differ, their heads do not."""
    sizes = check.sizes
    load = sizes.loads[0]
    setup = check.setup(sizes.correctness_model, load.dtype, load.bound_kvc_tokens, load.scale)
    patient = replace(setup, limit_s=KERNEL_LIMIT_S)
    engine = Engine(ECONOSERVE, patient, check.logs("kernels") / "econoserve.log")
    try:
        for running in load.batches:
            engine.ask("decode", running=min(running, 64), context_tokens=16, new_tokens=4)
        mixed = engine.ask("mixed", running=2, prompt_tokens=64, prompts=2)
        start_s = engine.start_s
    finally:
        engine.close()
    cache = Path.home() / ".cache" / "flashinfer"
    built = sorted({path.stem for path in cache.rglob("*.so")}) if cache.exists() else []
    return {"start_s": start_s, "mixed_iterations": mixed["iterations"], "compiled": built}


def correctness(check: Check, dtype: str) -> dict[str, Any]:
    """Greedy tokens of both systems, with so little KVC that requests wait, park and come back."""
    sizes = check.sizes
    engine = sizes.float32_engine if dtype == "float32" else {}
    scale = sizes.correctness_scale
    setup = check.setup(
        sizes.correctness_model, dtype, sizes.correctness_kvc_tokens, scale, **engine
    )
    requests = draw_requests(
        sizes.correctness_requests, scale, math.inf, setup.token_ids, seed=SEED
    )
    work = [one.to_json() for one in requests]
    with both(setup, check.logs(f"correctness-{dtype}")) as engines:
        runs = {system: engines[system].ask("burst", requests=work) for system in SYSTEMS}
    counters = runs[ECONOSERVE]["counters"]
    disturbed = counters["parked"] + counters["preempted"] + counters["offloaded"]
    found = {
        **compare_tokens(*(runs[system]["answers"] for system in SYSTEMS)),
        "failures": [text for run in runs.values() for text in failures(run["answers"])],
        "disturbed": disturbed,
        "counters": counters,
    }
    if found["failures"]:
        raise StageFailed("; ".join(found["failures"][:5]))
    if dtype == "float32" and found["equal_requests"] < found["requests"]:
        raise StageFailed(
            f"{found['requests'] - found['equal_requests']} of {found['requests']} outputs differ "
            f"in float32; equal tokens: {found['equal_tokens']:.4f}"
        )
    return found


def failures(answers: list[dict[str, Any]]) -> list[str]:
    """What went wrong in a burst.

    Args:
        answers: of all requests.

    Returns:
        A line for each request that failed or has another length than intended.
    """
    found = []
    for number, answer in enumerate(answers):
        if answer["error"] is not None:
            found.append(f"request {number}: {answer['error']}")
        elif answer["output_tokens"] != answer["wanted_tokens"]:
            found.append(
                f"request {number}: {answer['output_tokens']} output tokens instead of "
                f"{answer['wanted_tokens']}"
            )
    return found


def compare_tokens(stock: list[dict[str, Any]], econoserve: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare two systems' outputs.

    Args:
        stock: SGLang's answers.
        econoserve: ours, to the same requests.

    Returns:
        The number of ``requests``, how many are equal (``equal_requests``), and the share of
        tokens before the first difference of each (``equal_tokens``).
    """
    equal_requests = equal = total = 0
    for pair in zip(stock, econoserve, strict=True):
        ids = [answer["output_ids"] for answer in pair]
        same = next(
            (at for at, (a, b) in enumerate(zip_longest(*ids)) if a != b), max(map(len, ids))
        )
        total += max(map(len, ids))
        equal += same
        equal_requests += ids[0] == ids[1]
    return {
        "requests": len(stock),
        "equal_requests": equal_requests,
        "equal_tokens": equal / total if total else 1.0,
    }


def unconstrained(check: Check, load: Load) -> dict[str, Any]:
    """Iteration times of both systems, and their throughput when all requests have room."""
    sizes = check.sizes
    setup = check.setup(load.model, load.dtype, load.free_kvc_tokens, load.scale)
    work = _requests(load.free_requests, load, setup, math.inf, SEED)
    with both(setup, check.logs(f"unconstrained-{load.model}")) as engines:
        started = {system: engines[system].start_s for system in SYSTEMS}
        decode = _decode_times(engines, load, sizes)
        mixed = _mixed_times(engines[ECONOSERVE], load, sizes, decode[ECONOSERVE])
        _warm_up(engines, load, setup)
        runs = [
            {"system": system, "repeat": repeat, **_burst(engines[system], work)}
            for repeat, system in turns(sizes.repeats)
        ]
    return {
        "start_s": started,
        "decode": decode,
        "mixed": mixed,
        "overhead": overhead(decode, sizes.overhead_batch),
        "throughput": ratio_of(runs, "output_tokens_per_s"),
        "runs": runs,
    }


def _decode_times(
    engines: dict[str, Engine], load: Load, sizes: Sizes
) -> dict[str, list[dict[str, Any]]]:
    """Decode iterations of each batch and context that fit the KVC, in turns."""
    points: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    for context_tokens in sizes.contexts:
        for running in load.batches:
            longest = context_tokens + sizes.decode_tokens + 8
            if running * longest > 0.8 * load.free_kvc_tokens:
                continue
            times: dict[str, list[float]] = {system: [] for system in SYSTEMS}
            for _, system in turns(sizes.repeats):
                timed = engines[system].ask(
                    "decode",
                    running=running,
                    context_tokens=context_tokens,
                    new_tokens=sizes.decode_tokens,
                )
                times[system].append(timed["iteration_ms"])
            for system in SYSTEMS:
                spread = Spread.of(times[system])
                points[system].append(
                    {
                        "running": running,
                        "context_tokens": context_tokens,
                        "iteration_ms": spread.median,
                        "range_ms": [spread.lowest, spread.highest],
                    }
                )
    return points


def _mixed_times(
    engine: Engine, load: Load, sizes: Sizes, decode: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Mixed iterations of EconoServe: what prompts add, on top of the decode iteration."""
    found = []
    for running in sizes.mixed_batches:
        base_ms = _nearest_ms(decode, running)
        for tokens in sizes.mixed_prompts:
            timed = engine.ask(
                "mixed", running=running, prompt_tokens=tokens, prompts=sizes.mixed_count
            )
            added_ms = timed["added_ms"]
            found.append(
                {
                    **timed,
                    "running": running,
                    "prompt_tokens": tokens,
                    "context_tokens": running * (16 + 2 * sizes.mixed_count),
                    "iteration_ms": None if added_ms is None else base_ms + added_ms,
                }
            )
    return found


def _nearest_ms(decode: list[dict[str, Any]], running: int) -> float:
    """Time of a decode iteration with short contexts, between the batches that were timed."""
    import numpy as np

    shortest = min(one["context_tokens"] for one in decode)
    known = sorted(
        (one["running"], one["iteration_ms"]) for one in decode if one["context_tokens"] == shortest
    )
    return float(np.interp(running, *zip(*known, strict=True)))


def overhead(decode: dict[str, list[dict[str, Any]]], running: int) -> dict[str, Any]:
    """What EconoServe adds to a decode iteration.

    Args:
        decode: iteration times by system.
        running: the batch to tell it at, or the largest one below.

    Returns:
        The batch, and the ``added`` share at the shortest context.
    """
    pairs = [
        (mine["running"], mine["iteration_ms"] / theirs["iteration_ms"] - 1)
        for mine, theirs in zip(decode[ECONOSERVE], decode[STOCK], strict=True)
        if mine["running"] <= running
    ]
    largest = max(batch for batch, _ in pairs)
    return {"running": largest, "added": next(share for batch, share in pairs if batch == largest)}


def goodput(check: Check, load: Load) -> dict[str, Any]:
    """Requests per second that keep their SLO when the KVC is short and arrivals are many."""
    sizes = check.sizes
    setup = check.setup(load.model, load.dtype, load.bound_kvc_tokens, load.scale)
    with both(setup, check.logs(f"goodput-{load.model}")) as engines:
        few = engines[STOCK].ask("burst", requests=_requests(4, load, setup, math.inf, WARMUP_SEED))
        _warm_up(engines, load, setup)
        burst = _requests(load.bound_requests, load, setup, math.inf, SEED)
        full = _burst(engines[STOCK], burst)
        slo_ms = SLO_FACTOR * 1e3 * figures(few["answers"])["mean_jct_s"]
        rate_per_s = LOAD_FACTOR * full["requests_per_s"]
        work = _requests(load.bound_requests, load, setup, rate_per_s, SEED, slo_ms)
        runs = [
            {"system": system, "repeat": repeat, **_burst(engines[system], work)}
            for repeat, system in turns(sizes.repeats)
        ]
    return {
        "slo_ms": slo_ms,
        "rate_per_s": rate_per_s,
        "stock_burst": full,
        "goodput": ratio_of(runs, "goodput_per_s"),
        "slo_met": ratio_of(runs, "slo_met"),
        "throughput": ratio_of(runs, "output_tokens_per_s"),
        "runs": runs,
    }


def _requests(
    count: int, load: Load, setup: Setup, rate_per_s: float, seed: int, slo_ms: float | None = None
) -> list[dict[str, Any]]:
    drawn: list[Request] = draw_requests(count, load.scale, rate_per_s, setup.token_ids, seed)
    return [{**one.to_json(), "slo_ms": slo_ms} for one in drawn]


def _warm_up(engines: dict[str, Engine], load: Load, setup: Setup) -> None:
    """Other requests of the same lengths, from which EconoServe learns how long responses are."""
    work = _requests(WARMUP_REQUESTS * 4, load, setup, math.inf, WARMUP_SEED)
    for engine in engines.values():
        engine.ask("burst", requests=work)


def _burst(engine: Engine, work: list[dict[str, Any]]) -> dict[str, Any]:
    result = engine.ask("burst", requests=work)
    answers = result["answers"]
    if wrong := failures(answers):
        raise StageFailed(f"{engine.system}: {'; '.join(wrong[:5])}")
    last_s = max(one["arrival_s"] + one["jct_s"] for one in answers)
    first_s = min(one["arrival_s"] for one in answers)
    met = figures(answers)["slo_met"]
    return {
        **figures(answers),
        "requests_per_s": len(answers) / (last_s - first_s),
        "goodput_per_s": None if met is None else met * len(answers) / (last_s - first_s),
        "counters": result["counters"],
    }


def ratio_of(runs: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """One figure of both systems over the repeats.

    Args:
        runs: have ``system``, ``repeat`` and the figure.
        key: the figure's name.

    Returns:
        Median, lowest and highest of each system, and of the ratio repeat by repeat; the ratio is
        ``None`` where SGLang's is 0.
    """
    values = {
        system: {run["repeat"]: run[key] for run in runs if run["system"] == system}
        for system in SYSTEMS
    }
    ratios = [
        mine / values[STOCK][repeat]
        for repeat, mine in values[ECONOSERVE].items()
        if mine is not None and values[STOCK].get(repeat)
    ]
    rows = {**{system: list(values[system].values()) for system in SYSTEMS}, "ratio": ratios}
    return {name: _spread(row) for name, row in rows.items()}


def _spread(values: list[float | None]) -> list[float] | None:
    spread = Spread.of(values)
    return None if spread is None else [spread.median, spread.lowest, spread.highest]


def profile(check: Check) -> dict[str, Any]:
    """Fit what iterations cost, from the times that were kept."""
    found = {}
    for load in check.sizes.loads:
        kept = check.results.value(f"unconstrained-{load.model}")
        if kept is None:
            continue
        decode = decode_samples(kept["decode"][ECONOSERVE], check.sizes.decode_tokens)
        mixed = mixed_samples(kept["mixed"])
        found[load.model] = {
            "decode": fit(decode),
            "mixed": fit(mixed) if mixed else None,
            "kvc_tokens": load.free_kvc_tokens,
        }
    if not found:
        raise StageFailed("no stage unconstrained-* has been done: run one first")
    return found


EXPECTED = (StageFailed, EngineFailed, ValueError, OSError, subprocess.SubprocessError)
"""What a stage may raise; anything else is an error of this program, but is recorded, too."""
