"""What the runs say of the systems side by side: goodput, JCT and throughput, ours to the peers'.

Owns the definitions of the targets, and what is known and what is guessed between measured rates.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmark.paper.claims import Reach, rate_at_latency
from benchmark.serving.figures import Record, grouped, median

ATTAINMENT = 0.9


@dataclass(frozen=True, slots=True)
class Attained:
    """The goodput of a system, as far as it was measured.

    Attributes:
        rate_rps: between the two, by a straight line through their SSR; the one of them that was
            measured, where there is only one.
        low_rps: highest measured rate up to which enough requests meet their objectives; 0 if there
            is none.
        high_rps: the lowest measured rate at which too few do; infinity if there is none.
    """

    rate_rps: float
    low_rps: float
    high_rps: float

    @property
    def reach(self) -> Reach:
        """Whether ``rate_rps`` is a bound only."""
        if self.low_rps == 0.0:
            return Reach.AT_MOST
        return Reach.AT_LEAST if math.isinf(self.high_rps) else Reach.EXACT


@dataclass(frozen=True, slots=True)
class Ratio:
    """One of our figures to the better peer's.

    Attributes:
        value: the ratio.
        reach: whether it is a bound.
        least: what it is at least, by measured rates alone.
    """

    value: float
    reach: Reach = Reach.EXACT
    least: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The systems on one workload and size of the KVC; what was not measured is ``None``.

    Attributes:
        workload: its name.
        kvc: its name.
        by_system: goodput at 90 % attainment.
        peer: the peer with the highest goodput.
        goodput: ours to its.
        saturated_rps: the lowest rate at which every peer misses the attainment.
        jct: mean JCT there, ours to the least of the peers'.
        throughput: at the peers' least mean normalised latency there: our rate to that rate.
        p99_jct: at the highest measured rate that the better peer attains (the lowest one, if it
            attains none), ours to its.
    """

    workload: str
    kvc: str
    by_system: Mapping[str, Attained]
    peer: str | None = None
    goodput: Ratio | None = None
    saturated_rps: float | None = None
    jct: float | None = None
    throughput: Ratio | None = None
    p99_jct: float | None = None


def attained(points: Sequence[tuple[float, float]], attainment: float = ATTAINMENT) -> Attained:
    """The highest rate at which enough requests meet their objectives.

    Args:
        points: rates in requests per second and the SSR there, any order, at least one.
        attainment: the share that is enough.

    Returns:
        Where the SSR first falls below the share.
    """
    ordered = sorted(points)
    if ordered[0][1] < attainment:
        return Attained(ordered[0][0], 0.0, ordered[0][0])
    for (low, above), (high, below) in pairwise(ordered):
        if below < attainment:
            rate = low + (high - low) * (above - attainment) / (above - below)
            return Attained(rate, low, high)
    return Attained(ordered[-1][0], ordered[-1][0], math.inf)


def goodput_ratio(ours: Attained, peer: Attained) -> Ratio | None:
    """Our goodput to a peer's.

    Args:
        ours: our goodput.
        peer: its goodput.

    Returns:
        The ratio; ``None`` where both are above the highest rate, or ours is below the lowest one
        and the peer's no more: then nothing is known. A peer below the lowest rate counts as that
        rate, so that the ratio is a lower bound.
    """
    reaches = (ours.reach, peer.reach)
    if reaches in {(Reach.AT_LEAST, Reach.AT_LEAST), (Reach.AT_MOST, Reach.AT_MOST)}:
        return None
    reach = Reach.EXACT
    if ours.reach == Reach.AT_LEAST or peer.reach == Reach.AT_MOST:
        reach = Reach.AT_LEAST
    elif ours.reach == Reach.AT_MOST or peer.reach == Reach.AT_LEAST:
        reach = Reach.AT_MOST
    least = 0.0 if math.isinf(peer.high_rps) else ours.low_rps / peer.high_rps
    return Ratio(ours.rate_rps / peer.rate_rps, reach, least)


def compare(records: Sequence[Record], ours: str, peers: Sequence[str]) -> list[Comparison]:
    """Compare the systems.

    Args:
        records: of all runs.
        ours: name of our system.
        peers: names of the systems that it is compared with.

    Returns:
        A comparison for each workload and size of the KVC; figures are medians over repeats.
    """
    return [
        _compare(workload, kvc, own, ours, peers)
        for (workload, kvc), own in grouped(records, "workload", "kvc").items()
    ]


def _compare(
    workload: str, kvc: str, records: Sequence[Record], ours: str, peers: Sequence[str]
) -> Comparison:
    runs = grouped(records, "system", "rate_rps")
    rates: dict[str, list[float]] = {}
    for system, rate in runs:
        rates.setdefault(system, []).append(rate)

    def at(system: str, rate: float, name: str) -> float | None:
        found = runs[system, rate]
        if name != "ssr" and not all(run["served"] == run["requests"] for run in found):
            return None  # the mean would leave out the worst
        return median(run[name] for run in found)

    by_system = {
        system: attained([(rate, at(system, rate, "ssr")) for rate in own])
        for system, own in rates.items()
    }
    known = [peer for peer in peers if peer in rates]
    if ours not in rates or not known:
        return Comparison(workload, kvc, by_system)
    peer = max(known, key=lambda name: (by_system[name].rate_rps, by_system[name].low_rps))
    common = sorted(set(rates[ours]).intersection(*(rates[one] for one in known)))
    saturated = next(
        (rate for rate in common if all(at(one, rate, "ssr") < ATTAINMENT for one in known)), None
    )
    jct = throughput = p99 = None
    if saturated is not None:
        jct = _quotient(
            at(ours, saturated, "mean_jct_s"),
            [at(one, saturated, "mean_jct_s") for one in known],
        )
        curve = [
            (rate, at(ours, rate, "mean_normalised_latency_s")) for rate in sorted(rates[ours])
        ]
        limits = [at(one, saturated, "mean_normalised_latency_s") for one in known]
        if None not in limits and None not in dict(curve).values():
            rate, reach = rate_at_latency(curve, min(limits))
            throughput = Ratio(rate / saturated, reach)
    usual = [rate for rate in common if rate <= by_system[peer].low_rps] or common[:1]
    if usual:
        p99 = _quotient(at(ours, usual[-1], "p99_jct_s"), [at(peer, usual[-1], "p99_jct_s")])
    return Comparison(
        workload,
        kvc,
        by_system,
        peer,
        goodput_ratio(by_system[ours], by_system[peer]),
        saturated,
        jct,
        throughput,
        p99,
    )


def _quotient(ours: float | None, peers: Sequence[float | None]) -> float | None:
    return None if ours is None or None in peers else ours / min(peers)


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean of what is known.

    Args:
        values: more than 0, or ``None``.

    Returns:
        The mean; ``None`` without values.
    """
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(statistics.fmean(logs)) if logs else None


def uneven(records: Sequence[Record]) -> list[str]:
    """Systems that lack runs that another one has: then the better peer may be the wrong one.

    Args:
        records: of all runs.

    Returns:
        In words, one for each system that lacks any.
    """
    names = ("workload", "kvc", "load", "repeat")
    all_runs = set(grouped(records, *names))
    found = []
    for (system,), own in grouped(records, "system").items():
        if lacking := len(all_runs - set(grouped(own, *names))):
            found.append(f"{system} lacks {lacking} of {len(all_runs)} runs")
    return found
