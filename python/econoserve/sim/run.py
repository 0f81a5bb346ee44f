"""A run: requests arrive at an instance until all have ended.

Owns the clock. The same arguments give the same result: time is simulated, and all that is drawn
has a seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from econoserve.core.checks import check_least
from econoserve.policies import make_policy
from econoserve.prediction.registry import make_replay_predictor
from econoserve.sim.instance import Instance, Machine, Results
from econoserve.sim.pool import SimulationError
from econoserve.sim.prefix import PrefixCaching
from econoserve.sim.profile import Profile, load_profile
from econoserve.sim.records import RequestRecord, summarise
from econoserve.workload.trace import TraceRequest
from econoserve.workload.workload import WorkloadSpec, make_workload

IDLE_S = 1e-3
"""How long an engine waits before it plans again, when a plan ran nothing. Ours."""

STUCK_S = 300.0
"""A policy that runs nothing for so long, though requests wait, makes no progress. Ours."""

LEVEL = 0.5
"""Probability that a promise of one length covers; ``plus`` mostly uses the whole distribution."""


def nothing() -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run of one instance.

    Attributes:
        policy: a name of ``econoserve.policies``.
        workload: what to serve.
        hardware: of a profile, or a profile's path.
        model: of a profile.
        predictor: a name of ``econoserve.prediction.registry``; ``oracle`` for exact lengths.
        constants: the policy's.
        capacity_tokens: size of the KVC, if not the profile's.
        max_running: most requests in a batch.
        overhead_s: time that scheduling adds to each iteration.
        caching: what the prefix cache keeps.
        results: when the scheduler knows of them.

    Raises:
        ValueError: a value is out of range.
    """

    policy: str
    workload: WorkloadSpec
    hardware: str
    model: str
    predictor: str = "quantile"
    constants: dict[str, Any] = field(default_factory=dict)
    capacity_tokens: int | None = None
    max_running: int = 256
    overhead_s: float = 0.0
    caching: PrefixCaching = PrefixCaching.OFF
    results: Results = Results.AT_ONCE

    def __post_init__(self) -> None:
        check_least(self, max_running=1, overhead_s=0)
        if self.capacity_tokens is not None:
            check_least(self, capacity_tokens=2)


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run.

    Attributes:
        records: of every request, by arrival.
        figures: of the run as a whole, see ``sim.records.summarise``.
    """

    records: list[RequestRecord]
    figures: dict[str, Any]


def simulate(spec: RunSpec, progress: Callable[[], None] = nothing) -> Result:
    """Run a policy on a workload.

    Args:
        spec: what to run.
        progress: called when a request arrives.

    Returns:
        What came of it; equal for equal ``spec``.

    Raises:
        ValueError: a value is out of range, or a name is not known.
        SimulationError: the policy asks for more KVC than there is, or makes no progress.
        OSError: a file cannot be opened.
    """
    profile = load_profile(spec.hardware, spec.model)
    machine = machine_of(spec, profile)
    context_tokens = min(profile.context_tokens, machine.capacity_tokens - 1)
    workload = make_workload(spec.workload, context_tokens)
    # Features are told apart by identity: two requests may look the same and differ in length.
    truth = {id(request.features): request.output_tokens for request in workload.requests}
    predictor = make_replay_predictor(spec.predictor, LEVEL, lambda seen: truth[id(seen)])
    policy = make_policy(spec.policy, machine.capacity_tokens, **spec.constants)
    instance = Instance(machine, policy, predictor)
    serve(instance, workload.requests, progress)
    figures = {
        **summarise(instance.records, instance.use),
        "left_out": workload.left_out,
        "capacity_tokens": machine.capacity_tokens,
    }
    return Result(instance.records, figures)


def machine_of(spec: RunSpec, profile: Profile) -> Machine:
    """The machine of a run.

    Args:
        spec: the run.
        profile: its model on its hardware.

    Returns:
        The machine.
    """
    return Machine(
        capacity_tokens=spec.capacity_tokens or profile.memory.capacity_tokens,
        time=profile.time,
        move_s_per_token=profile.move_s_per_token,
        max_running=spec.max_running,
        overhead_s=spec.overhead_s,
        caching=spec.caching,
        results=spec.results,
    )


def serve(
    instance: Instance, requests: Sequence[TraceRequest], progress: Callable[[], None] = nothing
) -> None:
    """Serve requests to the end.

    A request that arrives during an iteration is known to the policy when it ends.

    Args:
        instance: new, or idle.
        requests: by arrival.
        progress: called when a request arrives.

    Raises:
        SimulationError: see ``simulate``.
    """
    now_s = stuck_s = 0.0
    arrived = 0

    def arrive_until(time_s: float) -> None:
        nonlocal arrived
        while arrived < len(requests) and requests[arrived].arrival_s <= time_s:
            instance.arrive(f"r{arrived}", requests[arrived])
            arrived += 1
            progress()

    while instance.busy or arrived < len(requests):
        if not instance.busy:
            start_s = max(now_s, requests[arrived].arrival_s)
            # What passes before the first arrival is no part of the run.
            if arrived:
                instance.pass_time(start_s - now_s)
            now_s = start_s
            arrive_until(now_s)
            continue
        elapsed_s = instance.launch(now_s)
        if elapsed_s is None:
            stuck_s += IDLE_S
            if stuck_s > STUCK_S:
                raise SimulationError(
                    f"at {now_s:.3f} s requests wait, and for {STUCK_S:.0f} s no plan ran any: the "
                    "policy makes no progress; look at its constants and at the KVC's size"
                )
            instance.pass_time(IDLE_S)
            elapsed_s = IDLE_S
        else:
            stuck_s = 0.0
        now_s += elapsed_s
        arrive_until(now_s)
        instance.land(now_s)
