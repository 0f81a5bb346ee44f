"""The highest rate at which enough requests meet their objectives, by bisection.

Owns the search and its shortcut. ``capacity`` is what benchmarks call; ``econoserve capacity``
prints what it finds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from econoserve.sim.records import RequestRecord
from econoserve.sim.run import RunSpec, simulate

ATTAIN = 0.9
"""Share of requests that have to meet their SLO: DistServe's."""

MIN_DURATION_S = 1200.0
TOLERANCE = 0.02
"""Least time of arrivals in a run, and how close the search comes. Ours."""

MOST_DOUBLINGS = 16
"""A rate is no more than doubled or halved so often to find the first bracket. Ours."""

MOST_REQUESTS = 2_000_000
"""A rate is not doubled if the run would have more: at 6 s for 10,000 it takes 20 minutes. Ours."""

MARGIN = 1e-9
"""Relative: a request in flight counts as late only if rounding cannot be why."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A run at one rate.

    Attributes:
        rate_rps: the rate.
        instances: replicas.
        requests: how many arrive in it.
        attained: whether enough of them met their SLO.
        figures: of the run; empty if it was ended when it could not attain any more.
    """

    rate_rps: float
    instances: int
    requests: int
    attained: bool
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a search found.

    Attributes:
        rate_rps: the highest rate tried that attained, where all higher ones tried did not; 0 if
            none attained.
        above_rps: the lowest rate tried above it; it did not attain. Infinity if no rate was found
            that is too high, as where the next run would have more than ``MOST_REQUESTS``.
        trials: all runs, in their order.
    """

    rate_rps: float
    above_rps: float
    trials: tuple[Trial, ...]

    @property
    def figures(self) -> dict[str, Any]:
        """Of the run at ``rate_rps``; empty if that is 0."""
        for trial in self.trials:
            if trial.attained and trial.rate_rps == self.rate_rps:
                return trial.figures
        return {}


@dataclass(frozen=True, slots=True)
class Fleet:
    """The fewest replicas that a rate needs.

    Attributes:
        instances: how many; 0 if as many as were allowed do not attain.
        trials: all runs, in their order.
    """

    instances: int
    trials: tuple[Trial, ...]

    @property
    def figures(self) -> dict[str, Any]:
        """Of the run with ``instances``; empty if that is 0."""
        for trial in self.trials:
            if trial.attained and trial.instances == self.instances:
                return trial.figures
        return {}


class Misses:
    """Ends a run when so many requests have missed their SLO that too few can be left.

    It knows the true lengths, so that it counts a response as late while it still runs: the run
    would fail in any case, so its answer is the same.

    Args:
        allowed: how many may miss.
    """

    def __init__(self, allowed: int) -> None:
        self._allowed = allowed
        self._missed = self._seen = 0
        self._open: list[RequestRecord] = []

    def __call__(self, now_s: float, records: Sequence[RequestRecord]) -> bool:
        """See ``sim.cluster.Watch``."""
        self._open.extend(records[self._seen :])
        self._seen = len(records)
        still = []
        for record in self._open:
            if record.outcome is not None:
                self._missed += not record.met
            elif _late(record, now_s):
                self._missed += 1
            else:
                still.append(record)
        self._open = still
        return self._missed > self._allowed


def _late(record: RequestRecord, now_s: float) -> bool:
    """Whether a request in flight can no longer meet its SLO."""
    slo = record.slo
    since_s = (now_s - record.arrival_s) * (1 - MARGIN)
    if slo.e2e_s is not None and since_s > slo.e2e_s:
        return True
    if record.first_token_s is None:
        return slo.ttft_s is not None and since_s > slo.ttft_s
    if slo.ttft_s is not None and record.ttft_s > slo.ttft_s:
        return True
    decoding_s = (now_s - record.first_token_s) * (1 - MARGIN)
    return slo.tpot_s is not None and decoding_s > slo.tpot_s * (record.output_tokens - 1)


def attains(met: int, requests: int, attain: float) -> bool:
    """Whether enough requests met their SLO.

    Args:
        met: how many did.
        requests: of how many.
        attain: share that has to.

    Returns:
        Whether they are that share or more.
    """
    return requests - met <= allowed_misses(requests, attain)


def allowed_misses(requests: int, attain: float) -> int:
    """How many requests may miss their SLO.

    Args:
        requests: of how many.
        attain: share that has to meet it.

    Returns:
        The largest number that leaves that share.
    """
    # A share such as 0.9 is not exact in binary.
    return requests - math.ceil(attain * requests - 1e-9)


def measure(spec: RunSpec, attain: float = ATTAIN) -> Trial:
    """Run at one rate, and no longer than needed to know that too many miss their SLO.

    Args:
        spec: what to run.
        attain: share of requests that has to meet its SLO.

    Returns:
        What came of it; ``attained`` is what the whole run would say.

    Raises:
        ValueError, SimulationError, OSError: as ``simulate`` does.
    """
    rate_rps, requests = spec.workload.rate_rps, spec.workload.requests
    # The workload may be shorter than asked for. Then more is allowed here, and all are counted.
    result = simulate(spec, watch=Misses(allowed_misses(requests, attain)))
    if not result.figures:
        return Trial(rate_rps, spec.instances, requests, False, {})
    requests = len(result.records)
    attained = attains(sum(record.met for record in result.records), requests, attain)
    return Trial(rate_rps, spec.instances, requests, attained, result.figures)


def lasting(spec: RunSpec, rate_rps: float, min_duration_s: float) -> RunSpec:
    """A run at another rate, that lasts long enough.

    Args:
        spec: the run; its number of requests is the least.
        rate_rps: the rate.
        min_duration_s: least time of arrivals.

    Returns:
        The run with that rate, and ``max(requests, rate_rps * min_duration_s)`` requests.
    """
    requests = max(spec.workload.requests, math.ceil(rate_rps * min_duration_s))
    return replace(spec, workload=replace(spec.workload, rate_rps=rate_rps, requests=requests))


def capacity(
    spec: RunSpec,
    attain: float = ATTAIN,
    *,
    min_duration_s: float = MIN_DURATION_S,
    tolerance: float = TOLERANCE,
    start_rps: float | None = None,
    run: Callable[[RunSpec, float], Trial] = measure,
    progress: Callable[[Trial], None] | None = None,
) -> Capacity:
    """Find the highest rate at which a share of the requests meets its SLO.

    The rate is doubled or halved from ``start_rps`` until one attains and the next does not, then
    the bracket is halved until it is narrow. It is not doubled if the run would have more than
    ``MOST_REQUESTS``. The share that meets its SLO is taken to fall as the rate rises; where it
    does not, one of the rates where it crosses is found.

    Args:
        spec: what to run. Its workload states the SLO; its rate is not used unless ``start_rps``
            is left out, and its number of requests is the least of a run.
        attain: share of all requests that has to be served within all of its objectives, in
            (0, 1].
        min_duration_s: least time of arrivals in a run; 0 or more. A trace file with fewer
            requests gives shorter runs: see ``Trial.requests``.
        tolerance: how far the bracket may be open at the end, as a share of the rate.
        start_rps: a guess of the capacity, more than 0.
        run: makes a trial of a run; another one for tests, or to keep results.
        progress: told each trial.

    Returns:
        What was found; equal for equal arguments.

    Raises:
        ValueError: a value is out of range, or the workload states no SLO.
        SimulationError, OSError: as ``simulate`` does.
    """
    _check(spec, attain, min_duration_s)
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance}: give a share above 0, such as 0.02")
    start_rps = spec.workload.rate_rps if start_rps is None else start_rps
    trials: list[Trial] = []

    def attained(rate_rps: float) -> bool:
        trial = run(lasting(spec, rate_rps, min_duration_s), attain)
        trials.append(trial)
        if progress is not None:
            progress(trial)
        return trial.attained

    def affordable(rate_rps: float) -> bool:
        """Whether a run at this rate is not too long; one with all of a trace's requests is not."""
        last = trials[-1]
        whole = last.requests < lasting(spec, last.rate_rps, min_duration_s).workload.requests
        requests = lasting(spec, rate_rps, min_duration_s).workload.requests
        return whole or requests <= max(MOST_REQUESTS, spec.workload.requests)

    low, high = _bracket(attained, affordable, start_rps)
    while low and math.isfinite(high) and high - low > tolerance * low:
        middle = (low + high) / 2
        if middle in (low, high):
            # No number lies between them.
            break
        if attained(middle):
            low = middle
        else:
            high = middle
    return Capacity(low, high, tuple(trials))


def fewest_instances(
    spec: RunSpec,
    attain: float = ATTAIN,
    *,
    min_duration_s: float = MIN_DURATION_S,
    most: int = 64,
    run: Callable[[RunSpec, float], Trial] = measure,
    progress: Callable[[Trial], None] | None = None,
) -> Fleet:
    """Find the fewest replicas with which a share of the requests meets its SLO.

    Their number is doubled until enough meet it, then halved between the last two. More replicas
    are taken to serve more.

    Args:
        spec: what to run, with the rate; its number of requests is the least of a run, its
            ``instances`` are not used.
        attain: as for ``capacity``.
        min_duration_s: as for ``capacity``.
        most: most replicas to try, at least 1.
        run: as for ``capacity``.
        progress: told each trial.

    Returns:
        What was found; equal for equal arguments.

    Raises:
        ValueError: a value is out of range, or the workload states no SLO.
        SimulationError, OSError: as ``simulate`` does.
    """
    _check(spec, attain, min_duration_s)
    if most < 1:
        raise ValueError(f"most={most}: give 1 replica or more")
    spec = lasting(spec, spec.workload.rate_rps, min_duration_s)
    trials: list[Trial] = []

    def attained(instances: int) -> bool:
        trial = run(replace(spec, instances=instances), attain)
        trials.append(trial)
        if progress is not None:
            progress(trial)
        return trial.attained

    low, high = 0, 1
    while not attained(high):
        if high == most:
            return Fleet(0, tuple(trials))
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if attained(middle):
            high = middle
        else:
            low = middle
    return Fleet(high, tuple(trials))


def _bracket(
    attained: Callable[[float], bool], affordable: Callable[[float], bool], start_rps: float
) -> tuple[float, float]:
    """A rate that attains and one that does not, by a factor of 2 apart; 0 or infinity if none."""
    rate_rps = start_rps
    if attained(rate_rps):
        for _ in range(MOST_DOUBLINGS):
            if not affordable(2 * rate_rps):
                break
            if not attained(2 * rate_rps):
                return rate_rps, 2 * rate_rps
            rate_rps *= 2
        return rate_rps, math.inf
    for _ in range(MOST_DOUBLINGS):
        if attained(rate_rps / 2):
            return rate_rps / 2, rate_rps
        rate_rps /= 2
    return 0.0, rate_rps


def _check(spec: RunSpec, attain: float, min_duration_s: float) -> None:
    if not 0 < attain <= 1:
        raise ValueError(f"attain={attain}: give a share above 0, and 1 or less")
    if not min_duration_s >= 0:
        raise ValueError(f"min_duration_s={min_duration_s}: give 0 or more")
    slo = spec.workload.slo
    if slo.ttft_s is None and slo.tpot_s is None and slo.e2e_s is None:
        raise ValueError(
            "slo: no objective is stated, so none can be attained; give one, such as --slo "
            "ttft=1,tpot=0.1"
        )
