"""Fits the packaged profiles with few coefficients to published tables:

``python -m benchmark.profiles.fitted --calibration DIR --out DIR``. The first ``DIR`` has
``vllm_real_runs``, ``aiconfigurator_h200`` and ``splitwise_llama2_70b``; each profile's ``source``
says what was taken from where. The tables themselves are not shipped.
"""

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.profiles.operators import GPUS, profile
from econoserve.sim.fitting import Fit, Timed, fit_time
from econoserve.sim.operators import OperatorTables
from econoserve.sim.profile import Memory
from econoserve.sim.timing import Pass

TOKENS = {
    "rtx": (1, 64, 128, 256, 512, 2048),
    "h200": (1, 64, 128, 256, 512, 2048, 16384),
    "splitwise": (1, 64, 512, 1024, 2048, 8192, 32768),
}
"""Points of the line for the tokens of a pass."""

GIB = 1 << 30
LLAMA_8B = {"layers": 32, "kv_heads": 8, "head_dim": 128, "bytes_per_value": 2}
LLAMA_70B = {**LLAMA_8B, "layers": 80}


def decodes(requests: Sequence[int], contexts: Sequence[int], most: int) -> Iterator[Pass]:
    """Passes that only decode.

    Args:
        requests: how many decode.
        contexts: the context of each.
        most: context of all together that fits.

    Yields:
        One of each that fits.
    """
    for count, context in product(requests, contexts):
        if count * context <= most:
            yield Pass(decoding=count, context_tokens=count * context)


def rtx(folder: Path, gpu: str) -> dict[str, Any]:
    """Llama-3.1-8B on an RTX GPU, fitted to what its operator tables say of many passes.

    Args:
        folder: of ``vllm_real_runs``.
        gpu: key of ``GPUS``.

    Returns:
        The profile's fields.
    """
    fields = profile(folder / gpu / "profile", gpu)
    tables = OperatorTables.of(fields["time"])
    most = Memory(**fields["memory"]).capacity_tokens
    works = list(
        decodes((1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256), (256, 512, 1024, 2048), most)
    )
    prompts = product((64, 128, 256, 512, 1024, 1536, 2048), (0, 1024), (0, 4, 16, 32, 64, 128))
    for (tokens, before, count), context in product(prompts, (512, 1024, 2048)):
        if count * context <= most:
            squares = (before + tokens) ** 2 - before**2
            works.append(Pass(1, tokens, squares, 0, count, count * context))
    fit = fit_time([Timed(work, tables.seconds(work)) for work in works], TOKENS["rtx"])
    uneven = {name: fields["time"][name] for name in fields["time"] if name.startswith("uneven")}
    return {
        **fields,
        "source": f"time: {len(fit.fields['tokens']) + 8} coefficients, {_said(fit)} of its "
        f"operator tables: {fields['source'].removeprefix('time: ')}",
        "time": {**fit.fields, **uneven},
    }


def h200(folder: Path) -> dict[str, Any]:
    """Llama-3.1-8B on an H200, fitted to SGLang's kernels.

    Args:
        folder: of ``aiconfigurator_h200``.

    Returns:
        The profile's fields.
    """
    name = "derived_llama31_8b_bf16_h200"
    linear = [row for row in _rows(folder / f"{name}_linear.csv") if row["lm_head_ms_scaled"]]
    tokens = [float(row["tokens"]) for row in linear]
    layers_ms = [float(row["linear_ms_32layers"]) for row in linear]
    heads_ms = [float(row["lm_head_ms_scaled"]) for row in linear]

    def timed(work: Pass, attention_ms: str) -> Timed:
        count = work.prompt_tokens + work.decoding
        layer_ms = np.interp(count, tokens, layers_ms)
        head_ms = np.interp(work.prompts + work.decoding, tokens, heads_ms)
        return Timed(work, float(layer_ms + head_ms + float(attention_ms)) / 1e3)

    passes = []
    for row in _rows(folder / f"{name}_decode_attn.csv"):
        count, context = int(row["batch_size"]), int(row["ctx"])
        if count <= 512 and context >= 64 and count * context <= 800_000:
            passes.append(timed(Pass(0, 0, 0, 0, count, count * context), row["attn_ms_32layers"]))
    for row in _rows(folder / f"{name}_prefill_attn.csv"):
        count, length = int(row["batch_size"]), int(row["isl"])
        if 64 <= count * length <= tokens[-1]:
            work = Pass(count, count * length, count * length**2)
            passes.append(timed(work, row["attn_ms_32layers"]))
    line = tuple(point for point in TOKENS["h200"] if point <= tokens[-1])
    fit = fit_time(passes, line)
    return {
        "source": f"time: {len(line) + 8} coefficients, {_said(fit)} of passes added up from "
        "kernels: aiconfigurator 095f58a (Apache-2.0), h200_sxm, SGLang 0.5.14, bf16, shapes of "
        "Llama-3.1-8B with tensor parallelism 1. Launches, norms, sampling and CPU time are not "
        "in it; passes that decode beside prompts were not measured: decoding is assumed to cost "
        "there what it costs alone. Memory: size and 3.5 GiB of other use from the same "
        "repository's h200_sxm.yaml; usable_fraction 0.9 is vLLM's default; shape and weights of "
        "the model's. host_bytes_per_s: its pcie_bw of 64 GB/s.",
        "memory": {
            "gpu_bytes": 151_397_597_184,
            "gpus": 1,
            "usable_fraction": 0.9,
            "weights_bytes": 2 * 8_030_261_248,
            "activation_bytes": 3_758_096_384,
            **LLAMA_8B,
        },
        "context_tokens": 131_072,
        "host_bytes_per_s": 64e9,
        "time": fit.fields,
    }


def splitwise(folder: Path, gpu: str) -> dict[str, Any]:
    """Llama-2-70B on eight GPUs.

    Args:
        folder: of ``splitwise_llama2_70b``.
        gpu: ``a100`` or ``h100``.

    Returns:
        The profile's fields.
    """
    passes = []
    for row in _rows(folder / "perf_model.csv"):
        mine = (row["model"], row["hardware"], row["tensor_parallel"])
        if mine != ("llama2-70b", f"{gpu}-80gb", "8"):
            continue
        count, length, new = (int(row[k]) for k in ("batch_size", "prompt_size", "token_size"))
        work = Pass(count, count * length, count * length**2)
        passes.append(Timed(work, float(row["prompt_time"]) / 1e3))
        # Many longer responses ended early, so that their context is not known.
        if new <= 256:
            work = Pass(0, 0, 0, 0, count, count * (length + new // 2))
            passes.append(Timed(work, float(row["token_time"]) / 1e3))
    fit = fit_time(passes, TOKENS["splitwise"])
    return {
        "source": f"time: {len(TOKENS['splitwise']) + 8} coefficients, {_said(fit)} of measured "
        f"prefills and decodes: splitwise-sim 8f99e7d (MIT), data/perf_model.csv, Llama-2-70B on "
        f"{gpu}-80gb with tensor parallelism 8. They never computed both in one pass, for which "
        "decoding is assumed to cost what it costs alone; decodes were measured up to 64 requests "
        "of 640 tokens and one of 8,320. Memory: 80 GiB a GPU; usable_fraction 0.9 is vLLM's "
        "default, 1 GiB of activations is our assumption; shape and weights of the model's. "
        "host_bytes_per_s: PCIe x16 attained by eight GPUs together, 8 x 25 GB/s, our assumption.",
        "memory": {
            "gpu_bytes": 80 * GIB,
            "gpus": 8,
            "usable_fraction": 0.9,
            "weights_bytes": 2 * 68_976_648_192,
            "activation_bytes": GIB,
            **LLAMA_70B,
        },
        "context_tokens": 4096,
        "host_bytes_per_s": 200e9,
        "time": fit.fields,
    }


def _said(fit: Fit) -> str:
    return (
        f"fitted with a mean error of {fit.mean_error:.1%} (nine of ten below "
        f"{fit.p90_error:.1%}) to {fit.passes} times"
    )


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main(argv: Sequence[str] | None = None) -> None:
    """Write the profiles.

    Args:
        argv: arguments; by default those of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmark.profiles.fitted")
    add = parser.add_argument
    add("--calibration", type=Path, required=True, metavar="DIR", help="folder of the tables")
    add("--out", type=Path, required=True, metavar="DIR", help="for the profiles")
    options = parser.parse_args(argv)
    folder = options.calibration
    made = {f"{GPUS[gpu][0]}_llama-3.1-8b": rtx(folder / "vllm_real_runs", gpu) for gpu in GPUS}
    made["h200_llama-3.1-8b"] = h200(folder / "aiconfigurator_h200")
    for gpu in ("a100", "h100"):
        made[f"{gpu}-tp8_llama-2-70b"] = splitwise(folder / "splitwise_llama2_70b", gpu)
    for name, fields in made.items():
        (options.out / f"{name}.json").write_text(json.dumps(fields, indent=2) + "\n")
        print(f"{name}: {fields['source'].split(' of ')[0]}")


if __name__ == "__main__":
    main()
