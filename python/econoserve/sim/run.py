"""A run: requests arrive at one or more instances until all have ended.

Owns what a run is made of. The same arguments give the same result: time is simulated, and all that
is drawn has a seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from econoserve.core.checks import check_least
from econoserve.policies import make_policy
from econoserve.prediction.predictor import Predictor
from econoserve.prediction.registry import make_replay_predictor
from econoserve.sim.cluster import Clock, Cluster, Watch, nothing, run_events
from econoserve.sim.instance import Instance, Machine
from econoserve.sim.profile import Profile, load_profile
from econoserve.sim.records import RequestRecord, summarise
from econoserve.sim.routing import RoundRobin, make_router
from econoserve.workload.trace import TraceRequest
from econoserve.workload.workload import WorkloadSpec, make_workload

LEVEL = 0.5
"""Probability that a promise of one length covers; ``plus`` mostly uses the whole distribution."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run.

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
        instances: replicas, each on hardware of its own.
        router: gives requests to them; a name of ``econoserve.sim.routing``.

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
    instances: int = 1
    router: str = "round-robin"

    def __post_init__(self) -> None:
        check_least(self, max_running=1, overhead_s=0, instances=1)
        if self.capacity_tokens is not None:
            check_least(self, capacity_tokens=2)


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run.

    Attributes:
        records: of every request, by arrival.
        figures: of the run as a whole, see ``sim.records.summarise``; empty if it was ended early.
    """

    records: list[RequestRecord]
    figures: dict[str, Any]


def simulate(
    spec: RunSpec, progress: Callable[[], None] = nothing, watch: Watch | None = None
) -> Result:
    """Run a policy on a workload.

    Args:
        spec: what to run.
        progress: called when a request arrives.
        watch: looks at the run now and then, and may end it.

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

    def new_predictor() -> Predictor:
        return make_replay_predictor(spec.predictor, LEVEL, lambda seen: truth[id(seen)])

    def new_instance() -> Instance:
        policy = make_policy(spec.policy, machine.capacity_tokens, **spec.constants)
        return Instance(machine, policy, new_predictor())

    clock = Clock()
    router = make_router(spec.router, [machine.capacity_tokens] * spec.instances, new_predictor)
    instances = [new_instance() for _ in range(spec.instances)]
    system = Cluster(instances, router, clock, workload.requests[0].arrival_s)
    if not run_events(system, clock, workload.requests, progress, watch):
        return Result(system.records, {})
    gpus = profile.memory.gpus * spec.instances
    figures = summarise(system.records, system.use)
    return Result(
        system.records,
        {
            **figures,
            "left_out": workload.left_out,
            "capacity_tokens": machine.capacity_tokens * spec.instances,
            "gpus": gpus,
            "goodput_rps_per_gpu": figures["goodput_rps"] / gpus,
        },
    )


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
    )


def serve(
    instance: Instance, requests: Sequence[TraceRequest], progress: Callable[[], None] = nothing
) -> None:
    """Let a single instance serve requests to the end.

    Args:
        instance: new.
        requests: by arrival.
        progress: called when a request arrives.

    Raises:
        SimulationError: see ``simulate``.
    """
    clock = Clock()
    router = RoundRobin([instance.machine.capacity_tokens])
    cluster = Cluster([instance], router, clock, requests[0].arrival_s if requests else 0.0)
    run_events(cluster, clock, requests, progress)
