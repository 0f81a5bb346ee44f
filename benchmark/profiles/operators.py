"""Makes profiles of Llama-3.1-8B from LLMServingSim's operator tables:

``python -m benchmark.profiles.operators --tables DIR --out DIR``. The first ``DIR`` has
``GPU/profile`` with ``attention.csv``, ``dense.csv`` and ``per_sequence.csv``, measured on vLLM's
kernels.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

GPUS = {
    "RTXPRO6000": ("rtx-pro-6000", 96 << 30, 1 << 30, "1 GiB of activations is our assumption"),
    "RTX4090": (
        "rtx-4090",
        25_250_627_584,
        1_237_600_000,
        "activations are what vLLM's own 2,588 blocks of 16 tokens leave for them",
    ),
}
"""Names in profiles, bytes of memory and of activations as in the real runs' settings, and why."""

UNEVEN_REQUESTS = (2, 4, 8, 16, 32, 64, 128, 256)
UNEVEN = {
    "RTXPRO6000": (
        (0.045, 0.029, 0.028, 0.003, 0.020, 0.079, 0.036, 0.011),
        (0.955, 0.887, 0.328, 0.268, 0.104, 0.045, 0.019, 0.0),
    ),
    "RTX4090": (
        (0.018, 0.048, 0.035, 0.038, 0.154, 0.077, 0.029, 0.005),
        (0.962, 0.483, 0.334, 0.179, 0.101, 0.085, 0.008, 0.0),
    ),
}
"""Decodes of uneven contexts, alone and beside prompts: how far attention lies between the time at
their mean context and that at the longest, by requests. Least squares of relative errors over all
rows of the same repository's ``tp1/skew.csv``; with 256 beside prompts there are none."""

LAYERS, ONCE, TWICE = 32, ("embedding", "final_layernorm"), ("layernorm",)
"""Operators that run once in a pass, and twice in a layer; all others run once in a layer."""

AXES = (
    (0, *(16 << power for power in range(8))),
    (0, *(16 << power for power in range(11))),
    (0, *(1 << power for power in range(9))),
    (0, *(16 << power for power in range(11))),
)
"""Prompt tokens, their context before, decoding requests, and the context of each."""


def attention(path: Path) -> list[float]:
    """The attention table as a full grid.

    Args:
        path: of ``attention.csv``.

    Returns:
        Microseconds in the order of ``product(*AXES)``. Where one kind of work is absent, so is
        what its context costs.
    """
    table: dict[tuple[int, ...], float] = {}
    with path.open(newline="") as file:
        for row in csv.reader(file):
            if row[0] != "prefill_chunk":
                table[tuple(int(cell) for cell in row[:4])] = float(row[4])

    def at(chunk: int, before: int, count: int, context: int) -> float:
        if not chunk and not count:
            return 0.0
        before, context = (before if chunk else 0), (max(context, 16) if count else 0)
        point = (chunk, before, count, context)
        if point not in table:
            # Too large for the GPU: on along a line from half of it, of the largest first.
            if count > 1:
                table[point] = 2 * at(chunk, before, count // 2, context) - at(chunk, before, 0, 0)
            elif context > 16:
                table[point] = 2 * at(chunk, before, 1, context // 2) - at(chunk, before, 0, 0)
            else:
                table[point] = 2 * at(chunk, before // 2, count, context) - at(chunk, 0, 0, 0)
        return table[point]

    return [round(at(*point), 1) for point in product(*AXES)]


def sums(path: Path, key: str) -> tuple[list[int], dict[str, dict[int, float]]]:
    """A table of operators by size.

    Args:
        path: of the table.
        key: its column of sizes.

    Returns:
        The sizes, and microseconds by operator and size.
    """
    found: dict[str, dict[int, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["layer"], {})[int(row[key])] = float(row["time_us"])
    return sorted(set.intersection(*(set(times) for times in found.values()))), found


def profile(folder: Path, gpu: str) -> dict:
    """A profile.

    Args:
        folder: with the tables.
        gpu: key of ``GPUS``.

    Returns:
        Its fields.
    """
    tokens, dense = sums(folder / "dense.csv", "tokens")
    sequences, heads = sums(folder / "per_sequence.csv", "sequences")
    layer = {name: 2 if name in TWICE else 1 for name in dense if name not in ONCE}
    _, gpu_bytes, activation_bytes, why = GPUS[gpu]
    return {
        "source": f"time: LLMServingSim 5daddb2 (MIT), profiler/perf/{gpu}, meta-llama/"
        "Llama-3.1-8B bf16 tp1, vLLM 0.19 kernels; what lies between operators (launches, CPU) is "
        f"not in it. Memory: size and share of the same repository's runs; {why}; shape and "
        "weights of the model's. host_bytes_per_s: its link_bw of 16 GB/s.",
        "memory": {
            "gpu_bytes": gpu_bytes,
            "gpus": 1,
            "usable_fraction": 0.9,
            "weights_bytes": 2 * 8_030_261_248,
            "activation_bytes": activation_bytes,
            "layers": LAYERS,
            "kv_heads": 8,
            "head_dim": 128,
            "bytes_per_value": 2,
        },
        "context_tokens": 131_072,
        "host_bytes_per_s": 16e9,
        "time": {
            "kind": "operators",
            "layers": LAYERS,
            "tokens": tokens,
            "layer_us": [
                round(sum(n * dense[op][t] for op, n in layer.items()), 1) for t in tokens
            ],
            "once_us": [round(sum(dense[op][t] for op in ONCE), 1) for t in tokens],
            "sequences": sequences,
            "sequence_us": [round(sum(op[n] for op in heads.values()), 1) for n in sequences],
            "attention_axes": AXES,
            "attention_us": attention(folder / "attention.csv"),
            "uneven_requests": UNEVEN_REQUESTS,
            "uneven_alone": UNEVEN[gpu][0],
            "uneven_beside": UNEVEN[gpu][1],
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Write the profiles.

    Args:
        argv: arguments; by default those of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmark.profiles.operators")
    parser.add_argument("--tables", type=Path, required=True, metavar="DIR", help="the tables")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the profiles")
    options = parser.parse_args(argv)
    for gpu, (name, *_) in GPUS.items():
        fields = profile(options.tables / gpu / "profile", gpu)
        text = json.dumps(fields, separators=(",", ":")) + "\n"
        (options.out / f"{name}_llama-3.1-8b.json").write_text(text)


if __name__ == "__main__":
    main()
