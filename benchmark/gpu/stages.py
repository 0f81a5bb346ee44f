"""What the check does, stage by stage; each returns plain values for ``results``.

Owns the stages and their order. A stage must not rely on another one but through its kept result.
"""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmark.gpu.context import SEED, Check, StageFailed, failures
from benchmark.gpu.lengths import draw_requests
from benchmark.gpu.pair import ROOT, SYSTEMS, Engine, EngineFailed, both, search_path
from benchmark.gpu.profile import decode_samples, fit, mixed_samples
from benchmark.gpu.serving import goodput, unconstrained
from benchmark.gpu.sizes import Device
from benchmark.scheduler_comparison.worker import ECONOSERVE

TOO_HOPEFUL = {"rl_prior": 2, "rl_quantile": 0.02, "kvc_reserve": 0.0}
"""Settings under which EconoServe expects short responses at first, and has to preempt."""

COMPILERS = ("nvcc", "ninja", "c++")
PACKAGES = ("econoserve", "sglang", "torch", "triton", "flashinfer-python", "sglang-kernel")
DOCTOR_LIMIT_S = 240
KERNEL_LIMIT_S = 560.0
"""FlashInfer compiles while the first engine starts."""


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
    if check.device is Device.CUDA:
        for tool in COMPILERS:
            if shutil.which(tool, path=search_path()) is None:
                raise StageFailed(
                    f"{tool}: not in PATH; FlashInfer compiles with it, add its folder"
                )
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
        start_s = engine.wait()
        for running in load.batches:
            engine.ask("decode", running=min(running, 64), context_tokens=16, new_tokens=4)
        mixed = engine.ask("mixed", running=2, prompt_tokens=64, prompts=2)
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
    setup = replace(setup, settings=TOO_HOPEFUL)
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
    if not disturbed:
        raise StageFailed("nothing was parked or preempted: give more requests or less KVC")
    if dtype == "float32" and found["equal_requests"] < found["requests"]:
        raise StageFailed(
            f"{found['requests'] - found['equal_requests']} of {found['requests']} outputs differ "
            f"in float32; equal tokens: {found['equal_tokens']:.4f}"
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
