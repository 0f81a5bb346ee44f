"""A hardware profile for a simulator, fitted to iterations that were timed.

Owns the fit. The coefficients are those of ``econoserve.core.cost``: seconds per iteration, per
prompt token, per prompt token and token of its context, per decoding request, per token of its
context; one set for iterations that only decode, one for mixed ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from econoserve.core.cost import SCALES, IterationWork


@dataclass(frozen=True, slots=True)
class Timed:
    """An iteration that was timed.

    Attributes:
        work: what it computed.
        elapsed_s: how long it took.
    """

    work: IterationWork
    elapsed_s: float


def features(work: IterationWork) -> list[float]:
    """What the time of an iteration is a sum of.

    Args:
        work: what it computed.

    Returns:
        One number per coefficient.
    """
    return [
        1.0,
        work.prefill_tokens,
        work.prefill_squared,
        work.decoding,
        work.context_tokens,
    ]


def fit(timed: Sequence[Timed]) -> dict[str, Any]:
    """Fit non-negative coefficients; short iterations count as much as long ones.

    Args:
        timed: at least one.

    Returns:
        ``coefficients_s``, the number of ``samples``, and the mean and largest relative error.

    Raises:
        ValueError: nothing was timed, or a time is not positive.
    """
    if not timed or min(one.elapsed_s for one in timed) <= 0:
        raise ValueError("timed: give at least one iteration, each longer than 0 s")
    elapsed_s = np.array([one.elapsed_s for one in timed])
    rows = np.array([features(one.work) for one in timed]) / SCALES
    weights, _ = nnls(rows / elapsed_s[:, None], np.ones(len(timed)))
    errors = np.abs(rows @ weights / elapsed_s - 1)
    return {
        "coefficients_s": (weights / SCALES).tolist(),
        "samples": len(timed),
        "mean_relative_error": float(errors.mean()),
        "largest_relative_error": float(errors.max()),
    }


def decode_samples(points: Sequence[dict[str, Any]], new_tokens: int) -> list[Timed]:
    """Iterations that only decoded.

    Args:
        points: ``running``, ``context_tokens`` and ``iteration_ms`` of each.
        new_tokens: iterations of each; the context grew by so many.

    Returns:
        What was timed.
    """
    return [
        Timed(
            IterationWork(
                decoding=one["running"],
                context_tokens=round(one["running"] * (one["context_tokens"] + new_tokens / 2)),
            ),
            one["iteration_ms"] / 1e3,
        )
        for one in points
        if one["iteration_ms"] > 0
    ]


def mixed_samples(points: Sequence[dict[str, Any]]) -> list[Timed]:
    """Iterations that computed a prompt, or a part of one, beside others that decoded.

    Args:
        points: ``running``, ``prompt_tokens`` of a prompt, ``tokens`` of it in each iteration,
            ``context_tokens`` of all that run, and ``iteration_ms``.

    Returns:
        What was timed, on average over the parts of a prompt.
    """
    return [
        Timed(
            IterationWork(
                prefill_tokens=round(one["tokens"]),
                prefill_squared=mean_squared(one["tokens"], one["prompt_tokens"]),
                decoding=one["running"],
                context_tokens=round(one["context_tokens"]),
            ),
            one["iteration_ms"] / 1e3,
        )
        for one in points
        if one["iteration_ms"] is not None and one["iteration_ms"] > 0
    ]


def mean_squared(tokens: float, prompt_tokens: int) -> int:
    """``prefill_squared`` of an iteration, where prompts are computed in equal parts.

    Part i of k has c tokens and a context of i * c after it; the mean of c * i * c over the parts
    is c * (c + k * c) / 2.

    Args:
        tokens: of a part.
        prompt_tokens: of the prompt.

    Returns:
        Tokens squared.
    """
    return round(tokens * (tokens + max(prompt_tokens, tokens)) / 2)


def hardware_profile(
    source: str, memory: dict[str, Any], host_bytes_per_s: float, fits: dict[str, Any]
) -> dict[str, Any]:
    """A profile for ``econoserve simulate --hardware FILE.json``.

    Args:
        source: where its numbers are from.
        memory: the fields of ``econoserve.sim.profile.Memory``, and ``context_tokens``.
        host_bytes_per_s: bandwidth between device and host.
        fits: what ``fit`` found for ``decode`` and ``mixed`` iterations.

    Returns:
        Plain values; see docs/simulator.md.
    """
    memory = dict(memory)
    return {
        "source": source,
        "context_tokens": memory.pop("context_tokens"),
        "memory": memory,
        "host_bytes_per_s": host_bytes_per_s,
        "time": {
            "kind": "regimes",
            "decode_s": fits["decode"]["coefficients_s"],
            "mixed_s": fits["mixed"]["coefficients_s"],
        },
    }
