"""A run: requests arrive at one or more instances until all have ended.

Owns what a run is made of. The same arguments give the same result: time is simulated, and all that
is drawn has a seed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from econoserve.core.checks import check_least
from econoserve.core.victims import VictimConfig
from econoserve.policies import make_policy
from econoserve.policies.econoserve import VARIANTS
from econoserve.prediction.predictor import Predictor
from econoserve.prediction.registry import make_replay_predictor
from econoserve.sim.cluster import Clock, Cluster, Watch, nothing, run_events
from econoserve.sim.disaggregated import Disaggregated
from econoserve.sim.instance import Instance
from econoserve.sim.machine import Machine, Results
from econoserve.sim.placement import Phase, Placement
from econoserve.sim.prefix import PrefixCaching
from econoserve.sim.profile import Profile, load_profile
from econoserve.sim.records import RequestRecord, summarise
from econoserve.sim.routing import RoundRobin, make_router
from econoserve.sim.series import Series
from econoserve.sim.stages import StageMachine
from econoserve.workload.trace import TraceRequest
from econoserve.workload.workload import Workload, WorkloadSpec, make_workload

LEVEL = 0.5
"""Probability that a promise of one length covers; ``plus`` mostly uses the whole distribution."""


DISTSERVE = "distserve"
"""Not a policy of one instance, but prefills and decodes on separate ones."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run.

    Attributes:
        policy: a name of ``econoserve.policies``; or ``distserve``, which needs a placement.
        workload: what to serve.
        hardware: of a profile, or a profile's path.
        model: of a profile.
        predictor: a name of ``econoserve.prediction.registry``; ``oracle`` for exact lengths.
        constants: the policy's.
        capacity_tokens: size of the KVC, if not the profile's.
        max_running: most requests in a batch.
        overhead_s: time that scheduling adds to each iteration.
        series_points: most points of the series over time; 0 for none. Several instances have none.
        instances: replicas, each on hardware of its own; with a placement, copies of it, whose
            instances serve together.
        router: gives requests to replicas; a name of ``econoserve.sim.routing``. Not used with a
            placement.
        tensor: GPUs that share each layer, if not as many as the profile has.
        placement: where prefills and decodes run, for ``distserve``.
        link_bytes_per_s: bandwidth for KVC between instances, if not the profile's.
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
    series_points: int = 0
    instances: int = 1
    router: str = "round-robin"
    tensor: int | None = None
    placement: Placement | None = None
    link_bytes_per_s: float | None = None
    caching: PrefixCaching = PrefixCaching.OFF
    results: Results = Results.AT_ONCE

    def __post_init__(self) -> None:
        check_least(self, max_running=1, overhead_s=0, instances=1, series_points=0)
        if self.capacity_tokens is not None:
            check_least(self, capacity_tokens=2)
        if self.link_bytes_per_s is not None and not self.link_bytes_per_s > 0:
            raise ValueError(f"link_bytes_per_s={self.link_bytes_per_s}: give more than 0")
        if (self.policy == DISTSERVE) != (self.placement is not None):
            raise ValueError(
                f"policy {self.policy} with placement {self.placement}: give a placement to "
                f"{DISTSERVE}, such as prefill=2x1x1,decode=1x1x1, and to no other policy"
            )
        if self.placement is not None and self.tensor is not None:
            raise ValueError(f"tensor={self.tensor}: the placement states it, so leave it out")
        plain = self.caching is PrefixCaching.OFF and self.results is Results.AT_ONCE
        if self.placement is not None and not plain:
            raise ValueError(
                f"caching={self.caching.value} (--prefix-caching), results={self.results.value} "
                f"(--results): {DISTSERVE} has neither a prefix cache nor late results"
            )


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
    if spec.tensor is not None:
        profile = profile.on(spec.tensor)
    if spec.placement is None:
        prefill, decode = [], []
        machines = [machine_of(spec, profile)] * spec.instances
        gpus = profile.memory.gpus * spec.instances
    else:
        placement = spec.placement.times(spec.instances)
        prefill, decode = stage_machines(spec, placement, profile)
        machines = [*prefill, *decode]
        gpus = placement.gpus
    # Where KVC comes in blocks, only whole ones hold a request.
    rooms_tokens = [machine.room_tokens for machine in (*prefill, *decode)]
    kvcs_tokens = [machine.capacity_tokens for machine in machines]
    room_tokens = min(rooms_tokens or kvcs_tokens)
    workload = make_workload(spec.workload, min(profile.context_tokens, room_tokens - 1))
    _check_blocks(spec, workload)
    clock = Clock()
    alone = spec.placement is None and spec.instances == 1
    series = Series(spec.series_points) if spec.series_points and alone else None
    if spec.placement is None:
        system = _cluster(spec, machines, workload, clock, series)
    else:
        system = Disaggregated(prefill, decode, clock, workload.requests[0].arrival_s)
    if not run_events(system, clock, workload.requests, progress, watch):
        return Result(system.records, {})
    figures = summarise(system.records, system.use)
    figures["left_out"] = workload.left_out
    figures["capacity_tokens"] = sum(kvcs_tokens)
    figures["gpus"] = gpus
    goodput_rps = figures["goodput_rps"]
    figures["goodput_rps_per_gpu"] = None if goodput_rps is None else goodput_rps / gpus
    if series is not None:
        figures["series"] = series.columns()
    return Result(system.records, figures)


def _check_blocks(spec: RunSpec, workload: Workload) -> None:
    """Refuse a prefix cache in which nothing can be found."""
    if spec.caching is PrefixCaching.OFF or any(one.blocks for one in workload.requests):
        return
    raise ValueError(
        f"--prefix-caching {spec.caching.value}: trace {spec.workload.trace} names no blocks of "
        "its prompts: give one that does, Mooncake's or LLMServingSim's, or leave the flag out"
    )


def _cluster(
    spec: RunSpec,
    machines: Sequence[Machine],
    workload: Workload,
    clock: Clock,
    series: Series | None,
) -> Cluster:
    """Replicas behind a router."""
    # Features are told apart by identity: two requests may look the same and differ in length.
    truth = {id(request.features): request.output_tokens for request in workload.requests}

    def new_predictor() -> Predictor:
        return make_replay_predictor(spec.predictor, LEVEL, lambda seen: truth[id(seen)])

    instances = [
        Instance(
            machine,
            make_policy(
                spec.policy,
                machine.capacity_tokens,
                **_with_machine(spec.policy, spec.constants, machine),
            ),
            new_predictor(),
            series,
        )
        for machine in machines
    ]
    capacities = [machine.capacity_tokens for machine in machines]
    router = make_router(spec.router, capacities, new_predictor)
    return Cluster(instances, router, clock, workload.requests[0].arrival_s)


def _with_machine(name: str, constants: Mapping[str, Any], machine: Machine) -> dict[str, Any]:
    """A policy's constants; EconoServe's with what it costs to move KVC on the machine."""
    if name not in VARIANTS or "victims" in constants or not machine.move_s_per_token:
        return dict(constants)
    return {**constants, "victims": VictimConfig(offload_s_per_token=machine.move_s_per_token)}


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


def stage_machines(
    spec: RunSpec, placement: Placement, profile: Profile
) -> tuple[list[StageMachine], list[StageMachine]]:
    """The machines of a placement.

    Args:
        spec: the run.
        placement: where prefills and decodes run.
        profile: its model on its hardware.

    Returns:
        Those of the prefill instances, and those of the decode instances.

    Raises:
        ProfileError: the profile does not know such an instance.
        ValueError: no bandwidth between instances is known.
    """
    link_bytes_per_s = spec.link_bytes_per_s or profile.link_bytes_per_s
    if not link_bytes_per_s > 0:
        raise ValueError(
            f"profile {profile.name} states no link_bytes_per_s: give it (--link-gb-per-s)"
        )

    def machines(phase: Phase) -> list[StageMachine]:
        there = profile.on(phase.parallelism.tensor, phase.parallelism.pipeline)
        machine = StageMachine(
            capacity_tokens=spec.capacity_tokens or there.memory.capacity_tokens,
            time=there.time,
            stages=phase.parallelism.pipeline,
            max_running=spec.max_running,
            move_s_per_token=there.move_s_per_token,
            link_s_per_token=there.memory.kvc_bytes_per_token / link_bytes_per_s,
            overhead_s=spec.overhead_s,
        )
        return [machine] * phase.instances

    return machines(placement.prefill), machines(placement.decode)


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
