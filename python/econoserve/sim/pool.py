"""The KVC of an instance, counted to the token, and who runs on it.

Owns what every request holds and how long it held it. It must not decide: it follows plans.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

from econoserve.core.types import Task
from econoserve.sim.prefix import PrefixCache
from econoserve.sim.records import KvcUse, RequestRecord
from econoserve.workload.trace import TraceRequest


class SimulationError(RuntimeError):
    """A policy asked for what no machine can do, or for nothing at all."""


class Sums(NamedTuple):
    """Sums over the iterations of an instance so far.

    Attributes:
        passed_s: of their times.
        numbered_s: of their numbers times their times.
        backlog_s: of the times of those in a backlog.
        backlog_numbered_s: of their numbers times their times.
    """

    passed_s: float = 0.0
    numbered_s: float = 0.0
    backlog_s: float = 0.0
    backlog_numbered_s: float = 0.0


@dataclass(slots=True, eq=False)
class Live:
    """A request on an instance.

    While it runs, it takes a token of KVC and produces one in every iteration; ``held``,
    ``produced`` and ``token_s`` are then those of the iteration before it joined.

    Attributes:
        request: as it arrived, with its true length.
        task: as the policy knows it.
        record: what came of it.
        held: KVC that it holds.
        offloaded: KVC of it in host memory.
        produced: output tokens that are out.
        cached: KVC that it found in the prefix cache when it began.
        blocks: names of the blocks that it uses in the prefix cache, all counted in ``held``.
        token_s: KVC that it computed and used in forward passes, times seconds, since it last
            held none.
        backlog_token_s: what of it was in a backlog.
        joined: number of the first iteration that it runs in.
        ends: number of the iteration that produces its last token, if it runs on.
        marks: the pool's sums when it joined.
    """

    request: TraceRequest
    task: Task
    record: RequestRecord
    held: int = 0
    offloaded: int = 0
    produced: int = 0
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    token_s: float = 0.0
    backlog_token_s: float = 0.0
    joined: int = 0
    ends: int = 0
    marks: Sums = field(default_factory=Sums)


class Pool:
    """The KVC and the running batch.

    An iteration costs time in proportion to what changes, not to how many run.

    Args:
        capacity_tokens: size of the KVC.

    Attributes:
        used: KVC that is held; what several requests use counts once.
        cache: the prefix cache, in the KVC that is not held.
        context: what those hold that run, each its own.
        found: what of that they found in the prefix cache.
        holders: requests that hold KVC.
        running: who decodes, by id, in the order of joining.
        iteration: number of the iteration that comes next, or is under way.
        paused: iterations so far that those that ran sat out; not counted in ``iteration``.
        forward_tokens: tokens that the iterations so far computed.
        backlog: whether requests wait that hold no KVC; for the time that is counted next.
    """

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.used = self.context = self.found = self.holders = self.iteration = 0
        self.paused = 0
        self.forward_tokens = 0
        self.backlog = False
        self.running: dict[str, Live] = {}
        self.cache = PrefixCache()
        # Of who runs, the iteration at which its context would have been empty.
        self._longest: list[tuple[int, int, str]] = []
        self._ending: dict[int, dict[str, Live]] = {}
        self._sums = Sums()
        self._held_s = self._useful_s = self._offered_s = 0.0
        self._backlog_useful_s = self._backlog_s = 0.0

    @property
    def use(self) -> KvcUse:
        """How the machine was used so far."""
        backlog_s = self.capacity_tokens * self._backlog_s
        return KvcUse(
            self._held_s,
            self._useful_s,
            self._offered_s,
            self._backlog_useful_s,
            backlog_s,
            self.iteration + self.paused,
            self.forward_tokens,
        )

    def take(self, live: Live, tokens: int) -> None:
        """Give KVC to a request that does not run.

        Args:
            live: the request.
            tokens: how many.
        """
        self.holders += not live.held
        live.held += tokens
        self.used += tokens

    def release(self, live: Live) -> int:
        """Take all KVC of a request that does not run.

        Args:
            live: the request.

        Returns:
            Tokens that it held.
        """
        held, live.held = live.held, 0
        self.holders -= held > 0
        block_tokens = live.request.block_tokens
        self.used -= held - len(live.blocks) * block_tokens
        self.used -= self.cache.leave(live.blocks, block_tokens)
        live.blocks, live.cached = [], 0
        return held

    def find(self, live: Live, blocks: Sequence[int]) -> None:
        """Let a request that holds nothing begin with blocks of the prefix cache.

        Args:
            live: the request.
            blocks: their names; all are there.
        """
        live.blocks = list(blocks)
        live.held = live.cached = len(blocks) * live.request.block_tokens
        self.holders += live.held > 0
        self.used += self.cache.use(blocks)

    def share(self, live: Live, blocks: Sequence[int]) -> None:
        """Put blocks that a request computed into the prefix cache; it goes on using them.

        Args:
            live: the request.
            blocks: names of all its full blocks, from the first on.
        """
        live.blocks += self.cache.add(blocks)

    def join(self, live: Live) -> None:
        """Let a request run from the next iteration on.

        Args:
            live: the request, with KVC and part of its response to come.
        """
        rid = live.task.rid
        live.joined, live.marks = self.iteration, self._sums
        live.ends = self.iteration + live.request.output_tokens - live.produced - 1
        self.running[rid] = live
        self._ending.setdefault(live.ends, {})[rid] = live
        self.context += live.held
        self.found += live.cached
        heappush(self._longest, (self.iteration - live.held, live.ends, rid))

    def leave(self, live: Live) -> None:
        """Let a request stop running between two iterations; it keeps its KVC.

        Args:
            live: a running request.
        """
        rid = live.task.rid
        del self.running[rid]
        ending = self._ending[live.ends]
        del ending[rid]
        if not ending:
            del self._ending[live.ends]
        steps = self.iteration - live.joined
        now, mark = self._sums, live.marks
        # In iteration k it held what it held before, and k - joined + 1 tokens.
        held = live.held - live.cached - live.joined + 1
        numbered_s = now.numbered_s - mark.numbered_s
        live.token_s += held * (now.passed_s - mark.passed_s) + numbered_s
        numbered_s = now.backlog_numbered_s - mark.backlog_numbered_s
        live.backlog_token_s += held * (now.backlog_s - mark.backlog_s) + numbered_s
        live.held += steps
        live.produced += steps
        self.context -= live.held
        self.found -= live.cached

    @property
    def longest(self) -> int:
        """The longest context of those that run, with the token of this iteration."""
        while self._longest:
            empty, ends, rid = self._longest[0]
            live = self.running.get(rid)
            if live is not None and (live.joined - live.held, live.ends) == (empty, ends):
                return self.iteration - empty + 1
            heappop(self._longest)
        return 0

    def decode(self) -> tuple[str, ...]:
        """Give every running request the token of KVC that this iteration takes.

        Returns:
            Their ids.
        """
        self.used += len(self.running)
        self.context += len(self.running)
        return tuple(self.running)

    def released(self, live: Live) -> int:
        """KVC that nobody would hold any more if a request gave up its own.

        Args:
            live: the request.

        Returns:
            Tokens. While it runs, with the tokens that it took since it joined.
        """
        held = live.held
        if live.task.rid in self.running:
            held += self.iteration - live.joined
        shared = len(live.blocks) - self.cache.alone(live.blocks)
        return held - shared * live.request.block_tokens

    def pass_time(self, elapsed_s: float) -> None:
        """Count time in which the KVC is held as it is, and no iteration runs.

        Args:
            elapsed_s: how long.
        """
        self._held_s += self.used * elapsed_s
        self._offered_s += self.capacity_tokens * elapsed_s
        if self.backlog:
            self._backlog_s += elapsed_s

    def end_iteration(
        self, elapsed_s: float, forward_tokens: int = 0, sitting_out: int = 0
    ) -> list[Live]:
        """Count an iteration.

        Args:
            elapsed_s: how long it took.
            forward_tokens: tokens that it computed.
            sitting_out: how many run and sat it out, all or none; if so, it has no number.

        Returns:
            Requests that produced their last token in it; they still run.
        """
        self.pass_time(elapsed_s)
        self.forward_tokens += forward_tokens
        paused = sitting_out > 0
        self.paused += paused
        passed_s, numbered_s, backlog_s, backlog_numbered_s = self._sums
        # While paused, everybody holds what it held in the iteration before.
        numbered = (self.iteration - paused) * elapsed_s
        if self.backlog:
            backlog_s, backlog_numbered_s = backlog_s + elapsed_s, backlog_numbered_s + numbered
        self._sums = Sums(
            passed_s + elapsed_s, numbered_s + numbered, backlog_s, backlog_numbered_s
        )
        if paused:
            return []
        ended = list(self._ending.get(self.iteration, {}).values())
        self.iteration += 1
        return ended

    def count_prompt(self, live: Live, elapsed_s: float) -> None:
        """Count the iteration that just ended for a request whose prompt it computed.

        Args:
            live: a request that does not run.
            elapsed_s: how long the iteration took.
        """
        used = (live.held - live.cached) * elapsed_s
        live.token_s += used
        if self.backlog:
            live.backlog_token_s += used

    def count_useful(self, live: Live) -> None:
        """Count what a request used, once it is served.

        Args:
            live: a request that has ended.
        """
        self._useful_s += live.token_s
        self._backlog_useful_s += live.backlog_token_s
