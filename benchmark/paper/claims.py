"""The paper's claims as figures: what is compared, and how.

Owns the definitions of the claims. They are computed from the figures of runs alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from statistics import median
from typing import Any

Figures = Mapping[str, Any]
Curve = Sequence[tuple[float, float]]
"""Rates with the mean normalised latency at each, by rate."""


class Reach(Enum):
    """What is known of a rate that was read from a curve."""

    EXACT = ""
    AT_LEAST = ">= "
    AT_MOST = "<= "


@dataclass(frozen=True, slots=True)
class Value:
    """A figure of one setting.

    Attributes:
        value: the figure.
        where: the setting.
        reach: whether it is a bound.
    """

    value: float
    where: str
    reach: Reach = Reach.EXACT


@dataclass(frozen=True, slots=True)
class Range:
    """A figure over all settings.

    Attributes:
        least: the lowest.
        median: of all.
        most: the highest.
        count: settings.
    """

    least: Value
    median: float
    most: Value
    count: int


def over(values: Iterable[Value]) -> Range | None:
    """The range of a figure.

    Args:
        values: of the settings. Bounds count as what they state.

    Returns:
        The range; of equals the first is named. ``None`` of no values.
    """
    found = list(values)
    if not found:
        return None
    return Range(
        min(found, key=lambda item: item.value),
        median(item.value for item in found),
        max(found, key=lambda item: item.value),
        len(found),
    )


def rate_at_latency(curve: Curve, limit_s: float) -> tuple[float, Reach]:
    """The highest rate at which the mean normalised latency is within a limit.

    Between two measured rates the logarithm of the latency is taken to be linear in the rate.

    Args:
        curve: measured, at least one point.
        limit_s: seconds per output token, more than 0.

    Returns:
        The rate; and whether it is only known to be at least that, because the latency at the
        highest rate is within the limit, or at most, because that at the lowest one is not.
    """
    points = sorted(curve)
    if points[-1][1] <= limit_s:
        return points[-1][0], Reach.AT_LEAST
    for (low, below_s), (high, above_s) in reversed(list(pairwise(points))):
        if below_s <= limit_s < above_s:
            share = math.log(limit_s / below_s) / math.log(above_s / below_s)
            return low + share * (high - low), Reach.EXACT
    return points[0][0], Reach.AT_MOST


def curve_of(sweep: Mapping[float, Figures]) -> Curve:
    """The latency of a sweep.

    Args:
        sweep: figures by fraction of the base rate.

    Returns:
        Its points, with fractions for rates.
    """
    return [(fraction, latency_s(figures)) for fraction, figures in sorted(sweep.items())]


def latency_s(figures: Figures) -> float:
    """The mean normalised latency of a run.

    Args:
        figures: of the run.

    Returns:
        Seconds per output token; infinity if nobody was served.
    """
    found = figures["mean_normalised_latency_s"]
    return math.inf if found is None else found


def throughput_ratios(
    ours: Mapping[float, Figures], theirs: Mapping[float, Figures], cell: str
) -> list[Value]:
    """Claim 1: throughput at equal mean normalised latency.

    For each rate of theirs, the highest rate at which our mean normalised latency is not above
    theirs, over that rate.

    Args:
        ours: figures by fraction of the base rate.
        theirs: the same.
        cell: the setting.

    Returns:
        A ratio for each rate of theirs.
    """
    found = []
    for fraction, limit_s in curve_of(theirs):
        rate, reach = rate_at_latency(curve_of(ours), limit_s)
        found.append(Value(rate / fraction, f"{cell}, {fraction:g}", reach))
    return found


def jct_reductions(
    ours: Mapping[float, Figures], theirs: Mapping[float, Figures], cell: str
) -> list[Value]:
    """Claim 2: reduction of the mean JCT at equal rate.

    Args:
        ours: figures by fraction of the base rate.
        theirs: the same.
        cell: the setting.

    Returns:
        1 - ours / theirs for each rate that both have, and at which both serve somebody.
    """
    return [
        Value(
            1 - ours[fraction]["mean_jct_s"] / theirs[fraction]["mean_jct_s"],
            f"{cell}, {fraction:g}",
        )
        for fraction in sorted(ours.keys() & theirs.keys())
        if None not in (ours[fraction]["mean_jct_s"], theirs[fraction]["mean_jct_s"])
    ]


def ssr_increases(
    ours: Mapping[float, Figures], theirs: Mapping[float, Figures], cell: str
) -> list[Value]:
    """Claim 3: increase of the SSR at equal rate, in shares of all requests.

    Args:
        ours: figures by fraction of the base rate.
        theirs: the same.
        cell: the setting.

    Returns:
        Ours - theirs for each rate that both have. A ratio would grow without limit where theirs
        meets hardly any.
    """
    return [
        Value(ours[fraction]["ssr"] - theirs[fraction]["ssr"], f"{cell}, {fraction:g}")
        for fraction in sorted(ours.keys() & theirs.keys())
    ]


def ssr_ratios(
    ours: Mapping[float, Figures], theirs: Mapping[float, Figures], cell: str
) -> list[Value]:
    """Claim 3 read as a ratio: how much higher the SSR is, relative to theirs.

    Args:
        ours: figures by fraction of the base rate.
        theirs: the same.
        cell: the setting.

    Returns:
        Ours / theirs - 1 for each rate that both have and where theirs is not 0.
    """
    return [
        Value(ours[fraction]["ssr"] / theirs[fraction]["ssr"] - 1, f"{cell}, {fraction:g}")
        for fraction in sorted(ours.keys() & theirs.keys())
        if theirs[fraction]["ssr"]
    ]


def fewer_gpus(ours_rps_per_gpu: float, theirs_rps_per_gpu: float) -> float:
    """Claim 4: how many GPUs fewer are needed for the same goodput.

    Args:
        ours_rps_per_gpu: our goodput per GPU, more than 0.
        theirs_rps_per_gpu: theirs.

    Returns:
        1 - our GPUs / their GPUs.
    """
    return 1 - theirs_rps_per_gpu / ours_rps_per_gpu


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios.

    Args:
        values: at least one, all more than 0.

    Returns:
        Their geometric mean.
    """
    return math.exp(sum(map(math.log, values)) / len(values))
