"""Fits the model of ``sim.fitted`` to passes that were timed.

Owns the fit: least squares with no coefficient below 0. A squared error counts in inverse
proportion to the time that is expected, so that the fitted times add up to the measured ones: noise
then makes single passes wrong, and not the sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from econoserve.sim.fitted import FittedTime, beyond
from econoserve.sim.timing import Pass

ALONE, BESIDE = 2, 6
"""Coefficients of passes that only decode, and of those with prompts, besides the tokens'."""


ROUNDS = 4
"""Fits, each with the times that the one before expects."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A pass that was timed.

    Attributes:
        work: what it computed.
        elapsed_s: how long it took.
    """

    work: Pass
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Fit:
    """What came of a fit.

    Attributes:
        fields: the profile's ``time``.
        passes: how many were fitted.
        mean_error: of the relative errors' sizes.
        p90_error: what nine of ten errors are smaller than.
        total_error: of the sum of all times, with its sign.
    """

    fields: dict[str, Any]
    passes: int
    mean_error: float
    p90_error: float
    total_error: float


def fit_time(timed: Sequence[Timed], tokens: Sequence[int]) -> Fit:
    """Fit the coefficients of a profile.

    Args:
        timed: at least one pass.
        tokens: points of the line for the tokens of a pass, two or more, ascending.

    Returns:
        The fit. Where no pass only decodes, or none decodes beside prompts, decoding costs what it
        costs in the other kind.

    Raises:
        ValueError: nothing was timed, a time is not positive, or there are too few points.
    """
    if not timed or min(one.elapsed_s for one in timed) <= 0:
        raise ValueError("timed: give at least one pass, each longer than 0 s")
    if len(tokens) < 2 or sorted(set(tokens)) != list(tokens):
        raise ValueError(f"tokens {tokens}: give two or more ascending numbers")
    elapsed_s = np.array([one.elapsed_s for one in timed])
    rows = np.array([_row(one.work, tokens) for one in timed])
    expected_s = elapsed_s
    for _ in range(ROUNDS):
        scale = 1 / np.sqrt(expected_s)
        weights = _not_negative(rows * scale[:, None], elapsed_s * scale)
        expected_s = np.maximum(rows @ weights, elapsed_s.min())
    line, rest = weights[: len(tokens)], weights[len(tokens) :]
    tokens_s = np.cumsum(line)
    alone, beside = rest[:ALONE].tolist(), rest[ALONE:].tolist()
    decodes = [bool(one.work.prompt_tokens) for one in timed if one.work.decoding]
    if all(decodes):
        alone = beside[3:5]
    elif not any(decodes):
        beside[3:] = [*alone, 0.0]
    fields = {
        "kind": "fitted",
        "tokens": list(tokens),
        "tokens_s": _short(tokens_s),
        "alone_s": _short(alone),
        "beside_s": _short(beside),
    }
    model = FittedTime.of(fields)
    guesses_s = np.array([model.seconds(one.work) for one in timed])
    errors = np.abs(guesses_s / elapsed_s - 1)
    return Fit(
        fields,
        len(timed),
        float(errors.mean()),
        float(np.percentile(errors, 90)),
        float(guesses_s.sum() / elapsed_s.sum() - 1),
    )


def _row(work: Pass, tokens: Sequence[int]) -> list[float]:
    """What the time of a pass is a sum of; the line as its first value and its rises."""
    count = work.prompt_tokens + work.decoding
    rises = []
    for number, (low, high) in enumerate(pairwise(tokens), start=2):
        share = max((count - low) / (high - low), 0.0)
        rises.append(share if number == len(tokens) else min(share, 1.0))
    decode = [work.decoding, work.context_tokens]
    if not work.prompt_tokens:
        return [1.0, *rises, *decode, *[0.0] * BESIDE]
    crowded = beyond(work.decoding) * work.context_tokens
    prompts = [1.0, work.prompts, work.prompt_squares]
    return [1.0, *rises, *[0.0] * ALONE, *prompts, *decode, crowded]


def _not_negative(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares; while a weight is below 0, the worst of them is set to 0."""
    scales = np.abs(rows).max(axis=0)
    used = [column for column in range(rows.shape[1]) if scales[column] > 0]
    weights = np.zeros(rows.shape[1])
    while used:
        found, *_ = np.linalg.lstsq(rows[:, used] / scales[used], wanted, rcond=None)
        worst = int(np.argmin(found))
        if found[worst] >= 0:
            weights[used] = found / scales[used]
            break
        del used[worst]
    return weights


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
