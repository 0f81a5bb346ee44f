"""What the check does, stage by stage; each returns plain values for ``results``.

Owns the stages and their order. A stage must not rely on another one but through its kept result.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmark.gpu import models
from benchmark.gpu.context import SEED, Check, StageFailed, failures
from benchmark.gpu.hardware import device_name, host_bytes_per_s, memory_bytes
from benchmark.gpu.lengths import draw_requests
from benchmark.gpu.pair import ROOT, SYSTEMS, EngineFailed, Setup, search_path
from benchmark.gpu.profile import decode_samples, fit, hardware_profile, mixed_samples
from benchmark.gpu.serving import goodput, iterations, throughput
from benchmark.gpu.sizes import Device
from benchmark.scheduler_comparison.worker import ECONOSERVE

TOO_HOPEFUL = {"rl_prior": 2, "rl_quantile": 0.02, "kvc_reserve": 0.0}
"""Settings under which EconoServe expects short responses at first, and has to preempt."""

DTYPES = ("bfloat16", "float32")
COMPILERS = ("nvcc", "ninja", "c++")
PACKAGES = ("econoserve", "sglang", "torch", "triton", "flashinfer-python", "sglang-kernel")
DOCTOR_LIMIT_S = 240
ACTIVATION_BYTES = 1 << 30
"""Of a profile; not measured."""

USABLE_FRACTION = 0.85
"""Of a profile: share of the memory that a server may use."""

CACHES = ("flashinfer", "tvm-ffi")
"""Folders of ``~/.cache`` where FlashInfer's kernels and SGLang's own lie when compiled."""


def stages(check: Check) -> dict[str, Callable[[], dict[str, Any]]]:
    """All stages, in order.

    Args:
        check: what they know.

    Returns:
        Functions by name.
    """
    found = {"imports": partial(imports, check), "kernels": partial(kernels, check)}
    # First the one whose engines the kernels were compiled with.
    first = check.sizes.loads[0].dtype
    for dtype in sorted(DTYPES, key=lambda one: one != first):
        found[f"correctness-{dtype}"] = partial(correctness, check, dtype)
    for load in check.sizes.loads:
        found[f"iterations-{load.model}"] = partial(iterations, check, load)
        found[f"throughput-{load.model}"] = partial(throughput, check, load)
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
        timeout=max(min(DOCTOR_LIMIT_S, check.deadline_s - time.monotonic()), 1.0),
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode != 0:
        raise StageFailed("\n".join([*lines, *done.stderr.splitlines()[-10:]]))
    return {"doctor": lines, "versions": dict(_versions()), "device": device_name(check.device)}


def _versions() -> Iterable[tuple[str, str]]:
    yield "python", sys.version.split()[0]
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def kernels(check: Check) -> dict[str, Any]:
    """Start an engine whose kernels are compiled meanwhile, and have it use them.

    FlashInfer's attention is compiled for a data type and a size of heads: all models here share
    it. SGLang compiles some kernels of its own for a data type, a hidden size, or the bytes of a
    token's keys in a layer, so each model's first start compiles a few more.
    """
    sizes = check.sizes
    setup = correctness_setup(check, sizes.loads[0].dtype)
    largest = sizes.correctness_kvc_tokens // 32
    with check.use(setup, "kernels", [ECONOSERVE]) as engines:
        engine = engines[ECONOSERVE]
        for running in sizes.loads[0].batches:
            batch = min(running, largest, sizes.max_running)
            engine.ask("decode", running=batch, context_tokens=16, new_tokens=4)
        mixed = engine.ask("mixed", running=2, context_tokens=16, prompt_tokens=64, prompts=2)
    return {
        "start_s": engine.start_s,
        "mixed_iterations": mixed["iterations"],
        "compiled": compiled(),
    }


def compiled() -> list[str]:
    """Kernels that have been compiled on this machine.

    Returns:
        ``FOLDER/NAME`` of each, sorted.
    """
    home = Path.home() / ".cache"
    return sorted(
        {f"{name}/{path.stem}" for name in CACHES for path in (home / name).rglob("*.so")}
    )


def correctness_setup(check: Check, dtype: str) -> Setup:
    """Settings under which tokens are compared.

    Args:
        check: what all stages know.
        dtype: of the weights.

    Returns:
        The settings; in float32 without kernels that do not support it.
    """
    sizes = check.sizes
    exact = dtype == "float32"
    setup = check.setup(
        sizes.correctness_model,
        dtype,
        sizes.correctness_kvc_tokens,
        sizes.correctness_scale,
        **(sizes.float32_engine if exact else {}),
    )
    environment = sizes.float32_environment if exact else {}
    return replace(setup, settings=TOO_HOPEFUL, environment=environment)


def correctness(check: Check, dtype: str) -> dict[str, Any]:
    """Greedy tokens of both systems, with so little KVC that requests wait, park and come back."""
    sizes = check.sizes
    setup = correctness_setup(check, dtype)
    requests = draw_requests(
        sizes.correctness_requests, sizes.correctness_scale, math.inf, setup.token_ids, seed=SEED
    )
    work = [one.to_json() for one in requests]
    with check.use(setup, f"correctness-{dtype}") as engines:
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
    """Fit what iterations cost, from the times that were kept, and write profiles to simulate."""
    found: dict[str, Any] = {}
    for load in check.sizes.loads:
        kept = check.results.value(f"iterations-{load.model}")
        if kept is None:
            continue
        decode = decode_samples(kept["decode"][ECONOSERVE], check.sizes.decode_tokens)
        mixed = mixed_samples(kept["mixed"])
        fits = {"decode": fit(decode), "mixed": fit(mixed)}
        folder = models.ensure(load.model, check.folder / "models")
        memory = {
            "gpu_bytes": memory_bytes(check.device),
            "gpus": 1,
            "usable_fraction": USABLE_FRACTION,
            "activation_bytes": ACTIVATION_BYTES,
            **models.memory(folder, load.dtype),
        }
        source = f"benchmark.gpu.check on {device_name(check.device)}, {load.dtype}, EconoServe"
        fields = hardware_profile(source, memory, host_bytes_per_s(check.device), fits)
        path = check.folder / f"{check.device.value}_{load.model}.profile.json"
        path.write_text(json.dumps(fields, indent=1) + "\n")
        found[load.model] = {**fits, "file": str(path)}
    if not found:
        raise StageFailed("no stage iterations-* has been done: run one first")
    return found


EXPECTED = (StageFailed, EngineFailed, ValueError, OSError, subprocess.SubprocessError)
"""What a stage may raise; anything else is an error of this program, but is recorded, too."""
