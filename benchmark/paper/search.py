"""The search for a capacity on a grid of rates, one run at a time.

Owns the order of the runs. Rates are powers of a step, the same for all searches, so that runs are
shared between them, and so that where a search begins does not decide what it finds, as long as the
share of requests that meet their SLO falls with the rate.
"""

from collections.abc import Generator

MOST_STRIDES = 6
"""Strides double, so a search covers 63 steps up or down: a factor of 39 with a step of 6 %."""

Search = Generator[int, bool, int | None]
"""Yields the index of a rate, is sent whether it attains; returns the highest one that does."""


def highest(start: int) -> Search:
    """Find the highest rate that attains.

    Args:
        start: index of the rate to begin at.

    Yields:
        Rates to try.

    Returns:
        The highest one tried that attained, below the lowest one that did not, if any; ``None`` if
        none attained.
    """
    stride = 1
    if (yield start):
        low = start
        for _ in range(MOST_STRIDES):
            if not (yield low + stride):
                break
            low, stride = low + stride, 2 * stride
        else:
            return low
        high = low + stride
    else:
        high = start
        for _ in range(MOST_STRIDES):
            if (yield high - stride):
                break
            high, stride = high - stride, 2 * stride
        else:
            return None
        low = high - stride
    while high - low > 1:
        middle = (low + high) // 2
        if (yield middle):
            low = middle
        else:
            high = middle
    return low
