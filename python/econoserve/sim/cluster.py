"""Replicas behind a router, and the clock that servers of any kind share.

Owns the order of events. There is one event for each iteration of a server; of events at the same
time arrivals come first, then servers by number, so that the same requests give the same run.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from heapq import heappop, heappush
from typing import Protocol

from econoserve.sim.instance import Instance
from econoserve.sim.pool import SimulationError
from econoserve.sim.records import KvcUse, RequestRecord
from econoserve.sim.routing import Router
from econoserve.workload.trace import TraceRequest

IDLE_S = 1e-3
"""How long an engine waits before it plans again, when a plan ran nothing. Ours."""

STUCK_S = 300.0
"""A policy that runs nothing for so long, though requests wait, makes no progress. Ours."""

WATCH_EVENTS = 256
"""Events between two looks of who watches a run. Ours."""

NEVER_S = float("inf")

Watch = Callable[[float, Sequence[RequestRecord]], bool]
"""Told the time and the records so far, by arrival; ``True`` ends the run."""


def nothing() -> None:
    """Progress that nobody looks at."""


class Server(Protocol):
    """What the clock runs."""

    def step(self, now_s: float) -> None:
        """End what ends by now, start what can start, and ask the clock to be woken again.

        Args:
            now_s: the time.
        """

    def close(self, now_s: float) -> None:
        """Count the time up to the run's end.

        Args:
            now_s: when the last request ended.
        """


class System(Protocol):
    """Servers that serve requests together.

    Attributes:
        servers: numbered by their place.
        records: of all requests that arrived, by arrival.
        use: how the KVC of all was used.
        busy: whether requests wait or run anywhere.
    """

    servers: Sequence[Server]
    records: list[RequestRecord]

    @property
    def use(self) -> KvcUse:
        """See above."""

    @property
    def busy(self) -> bool:
        """See above."""

    def arrive(self, rid: str, request: TraceRequest) -> None:
        """Take a request, and wake the server that has to know.

        Args:
            rid: its id.
            request: with its true length, which no server may use but to end its response.
        """


class Clock:
    """Wakes servers in the order of time, and at equal times of their numbers."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._due_s: dict[int, float] = {}

    @property
    def next_s(self) -> float:
        """When a server is to be woken next; infinity if none is."""
        return self._heap[0][0] if self._heap else NEVER_S

    def wake(self, number: int, at_s: float) -> None:
        """Wake a server; an earlier call for it stands, a later one is dropped.

        Args:
            number: of the server.
            at_s: when, not before now.
        """
        if at_s < self._due_s.get(number, NEVER_S):
            self._due_s[number] = at_s
            heappush(self._heap, (at_s, number))

    def pop(self) -> tuple[float, int | None]:
        """The next event.

        Returns:
            Its time, and the server to wake; ``None`` where that was asked to wake earlier.
        """
        at_s, number = heappop(self._heap)
        if self._due_s.get(number) != at_s:
            return at_s, None
        del self._due_s[number]
        return at_s, number


def run_events(
    system: System,
    clock: Clock,
    requests: Sequence[TraceRequest],
    progress: Callable[[], None] = nothing,
    watch: Watch | None = None,
) -> bool:
    """Let a system serve requests to the end.

    A request that arrives during an iteration is known to its server when that ends.

    Args:
        system: new, on this clock.
        clock: new.
        requests: by arrival.
        progress: called when a request arrives.
        watch: looks at the run now and then, and may end it.

    Returns:
        Whether all was served; ``False`` if ``watch`` ended it.

    Raises:
        SimulationError: a policy needs more KVC than there is, or makes no progress.
    """
    now_s = 0.0
    arrived = events = 0
    while True:
        arrival_s = requests[arrived].arrival_s if arrived < len(requests) else NEVER_S
        if clock.next_s < arrival_s:
            event_s, number = clock.pop()
            if number is not None:
                now_s = event_s
                system.servers[number].step(now_s)
        elif arrived < len(requests):
            now_s = arrival_s
            system.arrive(f"r{arrived}", requests[arrived])
            arrived += 1
            progress()
        else:
            break
        events += 1
        if watch is not None and not events % WATCH_EVENTS and watch(now_s, system.records):
            return False
    if system.busy:
        raise SimulationError(f"at {now_s:.3f} s requests wait, and no server goes on")
    for server in system.servers:
        server.close(now_s)
    return True


class Replica:
    """An instance on a shared clock.

    Args:
        instance: new.
        clock: wakes it.
        number: its number there.
        begin_s: when the run begins; what passes before is no part of it.
    """

    def __init__(self, instance: Instance, clock: Clock, number: int, begin_s: float) -> None:
        self.instance = instance
        self._clock, self._number = clock, number
        # Up to when its time is counted, and when the iteration under way ends.
        self._counted_s, self._due_s = begin_s, None
        self._stuck_s = 0.0

    def arrive(self, rid: str, request: TraceRequest) -> None:
        """See ``System.arrive``."""
        if self._due_s is None:
            self._idle_until(request.arrival_s)
            self._clock.wake(self._number, request.arrival_s)
        self.instance.arrive(rid, request)

    def step(self, now_s: float) -> None:
        """See ``Server.step``."""
        instance = self.instance
        if self._due_s is not None:
            instance.land(now_s)
            self._counted_s, self._due_s = now_s, None
        if not instance.busy:
            return
        elapsed_s = instance.launch(now_s)
        if elapsed_s is None:
            elapsed_s = IDLE_S
            self._stuck_s += IDLE_S
            if self._stuck_s > STUCK_S:
                raise SimulationError(
                    f"at {now_s:.3f} s requests wait, and for {STUCK_S:.0f} s no plan ran any: the "
                    "policy makes no progress; look at its constants and at the KVC's size"
                )
            instance.pass_time(IDLE_S)
        else:
            self._stuck_s = 0.0
        self._due_s = now_s + elapsed_s
        self._clock.wake(self._number, self._due_s)

    def close(self, now_s: float) -> None:
        """See ``Server.close``."""
        self._idle_until(now_s)

    def _idle_until(self, now_s: float) -> None:
        """Count time in which nothing runs."""
        self.instance.pass_time(now_s - self._counted_s)
        self._counted_s = now_s


class Cluster:
    """Replicas behind a router.

    Args:
        instances: new ones, at least one.
        router: chooses one for each request; it knows as many.
        clock: new.
        begin_s: when the run begins.

    Attributes:
        servers: the replicas.
        records: see ``System``.
    """

    def __init__(
        self, instances: Sequence[Instance], router: Router, clock: Clock, begin_s: float
    ) -> None:
        self.servers = [
            Replica(instance, clock, number, begin_s) for number, instance in enumerate(instances)
        ]
        self.records: list[RequestRecord] = []
        self._router = router
        for instance in instances:
            instance.on_end = router.on_end

    @property
    def use(self) -> KvcUse:
        """See ``System``."""
        return total_use([replica.instance.use for replica in self.servers])

    @property
    def busy(self) -> bool:
        """See ``System``."""
        return any(replica.instance.busy for replica in self.servers)

    def arrive(self, rid: str, request: TraceRequest) -> None:
        """See ``System.arrive``."""
        replica = self.servers[self._router.choose(rid, request.features)]
        replica.arrive(rid, request)
        self.records.append(replica.instance.records[-1])


def total_use(uses: Sequence[KvcUse]) -> KvcUse:
    """Sum the use of several KVCs.

    Args:
        uses: of each, at least one.

    Returns:
        The use of all; ``None`` for what one of them does not count.
    """
    sums: dict[str, float | None] = {}
    for part in fields(KvcUse):
        counts = [getattr(use, part.name) for use in uses]
        sums[part.name] = None if None in counts else sum(counts)
    return KvcUse(**sums)
