"""Response lengths on a logarithmic grid: the histograms that predictors add up.

Owns the grid, its kernels and how a histogram becomes a prediction. It must not learn.
"""

from bisect import bisect_left

import numpy as np

from econoserve.core.lengths import LengthPrediction

EXACT = 12
"""Lengths up to this one have a bucket each."""

LONGEST_TOKENS = 1 << 17
"""The last bucket's upper end; longer responses count there."""

BUCKETS = 96
PAD = 16
"""Empty cells at both ends of a histogram, so that kernels need not look where they are."""

WIDTH = BUCKETS + 2 * PAD

POINTS = 64
"""Quantiles in a prediction."""


def _uppers() -> list[int]:
    ratio = (LONGEST_TOKENS / EXACT) ** (1 / (BUCKETS - EXACT))
    steps = [round(EXACT * ratio**step) for step in range(1, BUCKETS - EXACT + 1)]
    uppers = list(range(1, EXACT + 1))
    for step in steps:
        uppers.append(max(step, uppers[-1] + 1))
    return uppers


UPPERS = _uppers()
"""The longest length of each bucket."""

LOG_STEP = float(np.log(UPPERS[-1] / UPPERS[-2]))
"""Logarithm of the ratio between neighbouring buckets, above the first ones."""

LEVELS = (np.arange(POINTS) + 0.5) / POINTS
_ENDS = np.array([0, *UPPERS], float)
# A trace of mass everywhere keeps the distribution function rising.
_FLOOR = np.full(BUCKETS, 1e-9)
_NEXT = 1.0 - 1e-9


def _kernel(sigma: float) -> np.ndarray:
    weights = np.exp(-0.5 * (np.arange(-PAD, PAD + 1) / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)


KERNELS = (_kernel(1.5), _kernel(5.0))
"""How an experience spreads to lengths around it, narrow and wide: sigma in buckets."""

KERNEL_COLUMNS = np.stack([np.eye(2 * PAD + 1)[PAD], *KERNELS], axis=1)
"""Columns that weigh a window around a cell: the cell itself, and each kernel."""


def cell(tokens: int) -> int:
    """The cell of a length in a padded histogram.

    Args:
        tokens: a length, 1 or more.

    Returns:
        From ``PAD`` to ``PAD + BUCKETS - 1``.
    """
    return PAD + min(bisect_left(UPPERS, tokens), BUCKETS - 1)


def spread(raw: np.ndarray, narrow: np.ndarray, wide: np.ndarray) -> np.ndarray:
    """Add up three padded histograms, two of them smoothed.

    Args:
        raw: as it is.
        narrow: to be smoothed by the narrow kernel.
        wide: to be smoothed by the wide one.

    Returns:
        A padded histogram; what fell off the grid's ends is in its pads.
    """
    # The kernels are symmetric; a correlation is the cheaper call.
    smooth = np.correlate(narrow, KERNELS[0], "same")
    smooth += np.correlate(wide, KERNELS[1], "same")
    smooth += raw
    return smooth


def prediction(
    density: np.ndarray, levels: np.ndarray, level: float, cap_tokens: int
) -> LengthPrediction:
    """A histogram as a prediction.

    Args:
        density: padded histogram of any positive sum.
        levels: of the quantiles, ascending, in (0, 1).
        level: the probability that a promise of one length should cover.
        cap_tokens: the request's limit on output tokens.

    Returns:
        Its quantiles, interpolated within buckets.
    """
    known = np.zeros(BUCKETS + 1)
    rising = known[1:]
    np.add(density[PAD : PAD + BUCKETS], _FLOOR, out=rising)
    np.cumsum(rising, out=rising)
    lengths = np.interp(levels * known[-1], known, _ENDS)
    # An end of a bucket is a length; a place within it counts as the next one.
    return LengthPrediction(tuple((lengths + _NEXT).astype(np.int64).tolist()), level, cap_tokens)


def prior(mean_tokens: int) -> np.ndarray:
    """An exponential distribution.

    Args:
        mean_tokens: its mean, at least 1.

    Returns:
        A padded histogram that sums to 1.
    """
    share = -np.diff(np.exp(-_ENDS / mean_tokens))
    density = np.zeros(WIDTH)
    # Responses longer than assumed must stay possible.
    density[PAD : PAD + BUCKETS] = share / share.sum() + 1e-5
    return (density / density.sum()).astype(np.float32)


def beyond(density: np.ndarray, tokens: int) -> np.ndarray:
    """How long a response would have become that was cut.

    Args:
        density: padded histogram, as predicted.
        tokens: the length at which it was cut.

    Returns:
        The part of it above the cut, summing to 1; twice the length if there is none.
    """
    tail = density.copy()
    first = cell(tokens)
    tail[: first + 1] = 0.0
    tail[PAD + BUCKETS :] = 0.0
    total = tail.sum()
    if total < 1e-9:
        tail[:] = 0.0
        tail[cell(2 * tokens)] = 1.0
        return tail
    return tail / total
