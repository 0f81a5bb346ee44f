"""Which placement of prefills and decodes serves most for its GPUs, or needs fewest for a rate.

Owns the search. As in DistServe's Algorithm 1 both phases are first measured apart: the highest
rate of one prefill instance whose requests end with their first token, and of one decode instance
whose prompts cost nothing. Two phases in line sustain no more than the slower one, so placements
are ranked by the smaller of the phases' rates times instances, over all GPUs. Unlike there, the
best ones are then measured as a whole, with KVC that moves and waits; only that is an answer.

Not every placement is measured: one that the ranking puts too low is missed. More are tried with
``evaluate``.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from itertools import product
from typing import Any

from econoserve.core.checks import check_least
from econoserve.core.types import Slo
from econoserve.sim.capacity import (
    ATTAIN,
    MIN_DURATION_S,
    TOLERANCE,
    Capacity,
    Misses,
    Trial,
    allowed_misses,
    attains,
    capacity,
    lasting,
    measure,
)
from econoserve.sim.cluster import Clock, run_events
from econoserve.sim.disaggregated import Disaggregated
from econoserve.sim.placement import Parallelism, Phase, Placement
from econoserve.sim.profile import Profile, ProfileError, load_profile
from econoserve.sim.run import RunSpec, stage_machines
from econoserve.sim.timing import Pass
from econoserve.workload.workload import make_workload

PHASE_TOLERANCE = 0.05
"""How close the rates of the phases are searched for; they only rank. Ours."""

SLACK = 0.8
"""A placement is tried for a rate if the phases' rates promise this share of it. Ours: instances
that share a queue sustain more together than each alone."""

Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""Applies a function to each item, in order, like ``map``; a process pool's ``map`` will do."""


class Stage(Enum):
    """A phase of requests."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Limits:
    """What is searched.

    Attributes:
        gpus: most GPUs of a placement.
        instance_gpus: most GPUs of an instance.
        evaluate: placements that are measured as a whole: so many for the best rate for its GPUs,
            and for each number of GPUs where the fewest are sought.

    Raises:
        ValueError: a value is too small.
    """

    gpus: int = 8
    instance_gpus: int = 8
    evaluate: int = 8

    def __post_init__(self) -> None:
        check_least(self, gpus=2, instance_gpus=1, evaluate=1)


@dataclass(frozen=True, slots=True)
class PhaseRate:
    """What an instance sustains in one phase alone.

    Attributes:
        stage: the phase.
        parallelism: of the instance.
        rate_rps: highest rate at which enough requests meet that phase's objectives.
    """

    stage: Stage
    parallelism: Parallelism
    rate_rps: float


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        placement: the best one; ``None`` if none sustains anything.
        rate_rps: the highest rate found for it; the one that was asked for, where that was given.
        figures: of the run at that rate.
        phases: of the phases alone.
        tried: placements that were measured as a whole, with the rate that they sustain; where a
            rate was given that rate, or 0.
    """

    placement: Placement | None
    rate_rps: float
    figures: dict[str, Any]
    phases: tuple[PhaseRate, ...]
    tried: tuple[tuple[Placement, float], ...]


class Free:
    """Passes that take no time."""

    def seconds(self, work: Pass) -> float:
        """See ``IterationTime.seconds``."""
        return 0.0


def parallelisms(profile: Profile, most_gpus: int) -> list[Parallelism]:
    """How an instance may be spread over GPUs.

    Args:
        profile: its model on its hardware.
        most_gpus: most GPUs of an instance.

    Returns:
        All that the profile knows and whose memory leaves KVC, by tensor parallelism.
    """
    found = []
    for tensor in profile.tensor_choices:
        for pipeline in range(1, most_gpus // tensor + 1):
            try:
                profile.on(tensor, pipeline)
            except ProfileError:
                continue
            found.append(Parallelism(tensor, pipeline))
    return found


def measure_phase(stage: Stage, parallelism: Parallelism, spec: RunSpec, attain: float) -> Trial:
    """Run one instance of a phase alone.

    Args:
        stage: the phase.
        parallelism: of the instance.
        spec: the run; its placement is not used.
        attain: share of requests that has to meet its objectives.

    Returns:
        What came of it, without figures.
    """
    profile = load_profile(spec.hardware, spec.model)
    alone = Phase(parallelism, 1)
    prefill, decode = stage_machines(spec, Placement(alone, alone), profile)
    context_tokens = min(profile.context_tokens, prefill[0].room_tokens - 1)
    requests = make_workload(spec.workload, context_tokens).requests
    slo = phase_slo(stage, spec.workload.slo)
    if stage is Stage.PREFILL:
        requests = [replace(request, output_tokens=1, slo=slo) for request in requests]
    else:
        requests = [replace(request, slo=slo) for request in requests]
        # All prompts may wait there.
        room = sum(request.features.prompt_tokens + context_tokens for request in requests)
        prefill = [replace(prefill[0], time=Free(), stages=1, overhead_s=0.0, capacity_tokens=room)]
    clock = Clock()
    system = Disaggregated(prefill, decode, clock, requests[0].arrival_s)
    watch = Misses(allowed_misses(len(requests), attain))
    whole = run_events(system, clock, requests, watch=watch)
    met = sum(record.met for record in system.records)
    attained = whole and attains(met, len(requests), attain)
    return Trial(spec.workload.rate_rps, 1, len(requests), attained, {})


def phase_slo(stage: Stage, slo: Slo) -> Slo:
    """The objectives that concern a phase.

    Args:
        stage: the phase.
        slo: of the whole request.

    Returns:
        E2E, and TTFT for prefills or TPOT for decodes.

    Raises:
        ValueError: none does, so that any rate would do.
    """
    tpot_s = slo.tpot_s if stage is Stage.DECODE else None
    ttft_s = slo.ttft_s if stage is Stage.PREFILL else None
    if ttft_s is None and tpot_s is None and slo.e2e_s is None:
        raise ValueError(f"slo: nothing limits {stage.value}s: give ttft and tpot, or e2e")
    return Slo(ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=slo.e2e_s)


def best_placement(
    spec: RunSpec,
    attain: float = ATTAIN,
    *,
    limits: Limits | None = None,
    min_duration_s: float = MIN_DURATION_S,
    tolerance: float = TOLERANCE,
    each: Each = map,
) -> Found:
    """Find the placement with the highest rate for its GPUs: DistServe's goodput per GPU.

    Args:
        spec: what to run; its placement and ``instances`` are not used.
        attain: as for ``capacity``.
        limits: what to search.
        min_duration_s: as for ``capacity``.
        tolerance: as for ``capacity``.
        each: runs searches side by side; what it is given can be pickled.

    Returns:
        What was found; of equals the one with fewer GPUs.

    Raises:
        ValueError: a value is out of range, or nothing limits a phase.
        SimulationError, OSError: as ``simulate`` does.
    """
    limits = limits or Limits()
    spec = replace(spec, instances=1)
    phases = _phases(spec, attain, limits, min_duration_s, each)
    ranked = sorted(
        _placements(phases, limits), key=lambda item: (-item[1] / item[0].gpus, item[0].gpus)
    )[: limits.evaluate]
    search = partial(_capacity_of, spec, attain, min_duration_s, tolerance)
    found = list(each(search, ranked))
    tried = tuple(
        (placement, result.rate_rps) for (placement, _), result in zip(ranked, found, strict=True)
    )
    best = max(
        range(len(tried)),
        key=lambda n: (tried[n][1] / tried[n][0].gpus, -tried[n][0].gpus),
        default=None,
    )
    if best is None or not tried[best][1]:
        return Found(None, 0.0, {}, phases, tried)
    return Found(*tried[best], found[best].figures, phases, tried)


def fewest_gpus(
    spec: RunSpec,
    attain: float = ATTAIN,
    *,
    limits: Limits | None = None,
    min_duration_s: float = MIN_DURATION_S,
    each: Each = map,
) -> Found:
    """Find the placement with the fewest GPUs that sustains a rate.

    Args:
        spec: what to run, with the rate; its placement and ``instances`` are not used.
        attain: as for ``capacity``.
        limits: what to search.
        min_duration_s: as for ``capacity``.
        each: as for ``best_placement``.

    Returns:
        What was found: of those with as many GPUs the one that the ranking puts first.

    Raises:
        ValueError: a value is out of range, or nothing limits a phase.
        SimulationError, OSError: as ``simulate`` does.
    """
    limits = limits or Limits()
    rate_rps = spec.workload.rate_rps
    spec = lasting(replace(spec, instances=1), rate_rps, min_duration_s)
    phases = _phases(spec, attain, limits, min_duration_s, each)
    by_gpus: dict[int, list[tuple[Placement, float]]] = {}
    for placement, promised_rps in _placements(phases, limits):
        if promised_rps >= SLACK * rate_rps:
            by_gpus.setdefault(placement.gpus, []).append((placement, promised_rps))
    tried: list[tuple[Placement, float]] = []
    for gpus in sorted(by_gpus):
        ranked = sorted(by_gpus[gpus], key=lambda item: -item[1])[: limits.evaluate]
        specs = [replace(spec, placement=placement) for placement, _ in ranked]
        trials = list(each(partial(measure, attain=attain), specs))
        for (placement, _), trial in zip(ranked, trials, strict=True):
            tried.append((placement, rate_rps if trial.attained else 0.0))
        for (placement, _), trial in zip(ranked, trials, strict=True):
            if trial.attained:
                return Found(placement, rate_rps, trial.figures, phases, tuple(tried))
    return Found(None, 0.0, {}, phases, tuple(tried))


def _phases(
    spec: RunSpec, attain: float, limits: Limits, min_duration_s: float, each: Each
) -> tuple[PhaseRate, ...]:
    """What one instance of each kind sustains in each phase."""
    for stage in Stage:
        phase_slo(stage, spec.workload.slo)
    profile = load_profile(spec.hardware, spec.model)
    kinds = list(product(Stage, parallelisms(profile, min(limits.instance_gpus, limits.gpus - 1))))
    rates = each(partial(_phase_rate, spec, attain, min_duration_s), kinds)
    return tuple(
        PhaseRate(stage, parallelism, rate_rps)
        for (stage, parallelism), rate_rps in zip(kinds, rates, strict=True)
    )


def _phase_rate(
    spec: RunSpec, attain: float, min_duration_s: float, kind: tuple[Stage, Parallelism]
) -> float:
    found = capacity(
        spec,
        attain,
        min_duration_s=min_duration_s,
        tolerance=PHASE_TOLERANCE,
        run=partial(measure_phase, *kind),
    )
    return found.rate_rps


def _placements(phases: Iterable[PhaseRate], limits: Limits) -> Iterator[tuple[Placement, float]]:
    """All placements within the limits that can sustain anything, with the rate promised."""
    sustained = [phase for phase in phases if phase.rate_rps > 0]
    prefills, decodes = ([phase for phase in sustained if phase.stage is stage] for stage in Stage)
    for prefill, decode in product(prefills, decodes):
        left = limits.gpus - decode.parallelism.gpus
        for count in range(1, left // prefill.parallelism.gpus + 1):
            rest = limits.gpus - count * prefill.parallelism.gpus
            for others in range(1, rest // decode.parallelism.gpus + 1):
                placement = Placement(
                    Phase(prefill.parallelism, count), Phase(decode.parallelism, others)
                )
                yield placement, min(count * prefill.rate_rps, others * decode.rate_rps)


def _capacity_of(
    spec: RunSpec,
    attain: float,
    min_duration_s: float,
    tolerance: float,
    ranked: tuple[Placement, float],
) -> Capacity:
    placement, promised_rps = ranked
    return capacity(
        replace(spec, placement=placement),
        attain,
        min_duration_s=min_duration_s,
        tolerance=tolerance,
        start_rps=promised_rps,
    )
