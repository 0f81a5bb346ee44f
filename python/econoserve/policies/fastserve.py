"""FastServe: a skip-join multi-level feedback queue, preemptive at every token, KVC swapped.

A request joins the first level whose quantum covers its prompt, and sinks by one when it used its
quantum up. Each iteration takes requests by level, those that ran before those that did not, until
one does not fit; prompts are computed whole, beside decodes. KVC that is short, or would be in the
next iteration, is swapped out from the lowest level up; who starves is promoted.

Checked against arXiv 2305.05920 and LLMServe/FastServe 6da4b75 (fastserve/scheduler.py, class
MLFQ; request.py, block_manager.py, benchmarks/artifact-evaluation). Where this differs:

- Times of prompts and iterations are the cost model's, which learns from measured ones; there a
  profile and a clock.
- Who ran in the same iteration keeps its order; there each iteration reverses it.
- KVC comes back when its request runs; there also ahead of that, where there is room.
- Where host memory is full too, the lowest are computed again, for the others to go on.
- A prompt larger than a batch is the only one in it; there it waits for ever.
- Swapping frees no prefix from the cache, which may stay in use. With prefix caching, what it
  frees is therefore understated: all cached tokens count as shared.
- The batch is as large as the machine allows; the evaluation's scripts take 16, 64 and 128.
- Who may run but is left out is parked. Where the machine cannot park one, it decodes along.
"""

from dataclasses import dataclass

from sortedcontainers import SortedList

from econoserve.core.books import Books, Phase, TaskState
from econoserve.core.checks import check_least
from econoserve.core.cost import CostModel, IterationWork
from econoserve.core.paged import unfinished_prompts
from econoserve.core.plain import PlainLedger
from econoserve.core.policy import BookedPolicy
from econoserve.core.queues import Place
from econoserve.core.types import IterationPlan, Launch, Outcome, Preemption, Task, View


@dataclass(frozen=True, slots=True)
class FastServeConfig:
    """The policy's constants; the defaults are FastServe's.

    Attributes:
        capacity_tokens: size of the KVC.
        base_quantum_s: quantum of the highest level.
        quantum_ratio: quantum of a level over that of the level above it.
        max_batch_tokens: most prompt tokens in one iteration.
        host_tokens: KVC that host memory holds (56 GB in the evaluation, of OPT-13B); ``None``
            where that is no limit.
        least_host_fraction: no prompt starts while less of it is free.
        starvation_s: who did not run for so long goes to the front of the highest level.
        starvation_iterations: every so many iterations.

    Raises:
        ValueError: a value is out of range.
    """

    capacity_tokens: int
    base_quantum_s: float = 0.01
    quantum_ratio: float = 2.0
    max_batch_tokens: int = 2048
    host_tokens: int | None = None
    least_host_fraction: float = 0.1
    starvation_s: float = 3.0
    starvation_iterations: int = 1000

    def __post_init__(self) -> None:
        check_least(self, capacity_tokens=1, max_batch_tokens=1)
        check_least(self, starvation_s=0, starvation_iterations=1)
        if not self.base_quantum_s > 0:
            raise ValueError(f"base_quantum_s={self.base_quantum_s}: give more than 0 seconds")
        if not self.quantum_ratio > 1:
            raise ValueError(f"quantum_ratio={self.quantum_ratio}: give a ratio above 1")
        if self.host_tokens is not None and self.host_tokens < 0:
            raise ValueError(f"host_tokens={self.host_tokens}: give 0 or more, or None")
        if not 0.0 <= self.least_host_fraction <= 1.0:
            fraction = self.least_host_fraction
            raise ValueError(f"least_host_fraction={fraction}: give a share in [0, 1]")


@dataclass(slots=True)
class Standing:
    """Where a request stands in the feedback queue.

    Attributes:
        level: 0 is the highest.
        last_run_s: when it last ran, or arrived, on the policy's clock.
        served_s: time of the iterations it was in since it came to this level.
        last_iteration: the last one it was in; 0 before the first.
    """

    level: int
    last_run_s: float
    served_s: float = 0.0
    last_iteration: int = 0


class FastServe(BookedPolicy):
    """The policy; ``core.policy.Policy`` describes its methods.

    Args:
        config: its constants.
        cost: estimates iteration times; a new model if none is given.

    Attributes:
        standings: where each live request stands.
    """

    def __init__(self, config: FastServeConfig, cost: CostModel | None = None) -> None:
        self.config = config
        self.cost = CostModel() if cost is None else cost
        self.standings: dict[str, Standing] = {}
        self._ranking: SortedList = SortedList()
        self._iteration = 0
        self._clock_s = 0.0
        super().__init__(Books(PlainLedger(config.capacity_tokens), _place, _place))

    def add(self, task: Task) -> None:
        """See ``Policy.add``; it joins the first level whose quantum covers its prompt."""
        super().add(task)
        work = IterationWork(task.prompt_tokens, task.prompt_tokens**2)
        standing = self.standings[task.rid] = Standing(0, self._clock_s)
        while self._quantum_s(standing.level) < self.cost.seconds(work):
            standing.level += 1
        self._ranking.add(self._rank(task.rid))

    def remove(self, rid: str, outcome: Outcome) -> None:
        """See ``Policy.remove``."""
        if rid in self.standings:
            self._ranking.remove(self._rank(rid))
            del self.standings[rid]
        super().remove(rid, outcome)

    def on_iteration(self, work: IterationWork, elapsed_s: float) -> None:
        """See ``Policy.on_iteration``."""
        self.cost.observe(work, elapsed_s)

    def on_launch(self, plan: IterationPlan, launch: Launch) -> None:
        """See ``Policy.on_launch``; who is in the iteration uses up its quantum."""
        super().on_launch(plan, launch)
        parts = [part for part in launch.prefilled if part.rid in self.books]
        work = IterationWork(
            sum(part.tokens for part in parts),
            sum(part.tokens * self.books[part.rid].prefilled_tokens for part in parts),
            len(launch.decoded),
            self.ledger.decoding_tokens,
        )
        elapsed_s = self.cost.seconds(work)
        self._iteration += 1
        self._clock_s += elapsed_s
        for rid in (*launch.decoded, *(part.rid for part in parts)):
            if rid in self.standings:
                self._serve(rid, elapsed_s)
        if self._iteration % self.config.starvation_iterations == 0:
            for rid, standing in self.standings.items():
                if self._clock_s - standing.last_run_s >= self.config.starvation_s:
                    self._move(rid, level=0)

    def plan(self, view: View) -> IterationPlan:
        """See ``Policy.plan``."""
        holders = [*self.books.running.values(), *self.books.ready]
        rids = [state.task.rid for state in holders if not state.offloaded_tokens]
        residents = {rid: self._freed(rid) for rid in sorted(rids, key=self._rank, reverse=True)}
        movable, shut = self._movable(residents)
        evictable = movable
        prompts, gts, needed = self._batch(view, evictable, shut)
        if residents and not (prompts or gts):
            evictable = residents
            prompts, gts, needed = self._batch(view, evictable, shut=True)
        free, preempt = view.capacity_tokens - view.used_tokens, []
        # Proactively: whoever is in the next batch may need a token.
        ahead = min(view.max_running, len(self.books))
        for rid, freed in residents.items():
            if rid in gts:
                continue
            if rid in movable and free < needed + ahead:
                preempt.append((rid, Preemption.OFFLOAD))
                free += freed
            elif rid in evictable and free < needed:
                preempt.append((rid, Preemption.RECOMPUTE))
                free += freed
            elif rid in self.books.running:
                preempt.append((rid, Preemption.PARK))
        resume = tuple(rid for rid in gts if rid not in self.books.running)
        return IterationPlan(tuple(prompts.items()), resume, tuple(preempt))

    def _batch(
        self, view: View, evictable: dict[str, int], shut: bool
    ) -> tuple[dict[str, int], dict[str, None], int]:
        """The next prompts and GTs by rank, and the KVC they take, if others may give way."""
        prompts = dict(unfinished_prompts(self.books))
        gts: dict[str, None] = {}
        needed, rows = sum(prompts.values()), view.free_rows
        budget = self.config.max_batch_tokens - needed
        room = view.capacity_tokens - view.used_tokens + sum(evictable.values())
        for *_, rid in self._ranking:
            state, starts = self.books[rid], 0
            if rid in prompts or (shut and state.phase is Phase.WAITING):
                continue
            takes, keeps = state.offloaded_tokens + 1, evictable.get(rid, 0)
            if state.phase is Phase.WAITING:
                cached = view.cached_prefix(rid)
                starts = state.task.prompt_tokens - cached.tokens
                takes = starts + cached.evictable_tokens
            row = 1 if starts or state.offloaded_tokens else 0
            full = row > rows or len(prompts) + len(gts) == view.max_running
            if full or needed + takes + keeps > room or (prompts and starts > budget):
                if prompts or gts:
                    break
                continue  # Whoever can run does, or the KVC would never be free.
            if starts:
                prompts[rid] = starts
            else:
                gts[rid] = None
            budget, rows = budget - starts, rows - row
            needed, room = needed + takes, room - keeps
        return prompts, gts, needed

    def _movable(self, residents: dict[str, int]) -> tuple[dict[str, int], bool]:
        """Whose KVC host memory holds, the first ones first, and whether prompts must wait."""
        host = self.config.host_tokens
        if host is None:
            return residents, False
        free = host - sum(state.offloaded_tokens for state in self.books.ready)
        shut = free < self.config.least_host_fraction * host
        movable = {}
        for rid, freed in residents.items():
            if (held := self.ledger.held_by(rid)) <= free:
                movable[rid] = freed
                free -= held
        return movable, shut

    def _serve(self, rid: str, elapsed_s: float) -> None:
        """Count an iteration of it; it sinks by a level when its quantum is used up."""
        standing = self.standings[rid]
        standing.served_s += elapsed_s
        standing.last_run_s = self._clock_s
        if standing.served_s > self._quantum_s(standing.level):
            standing.served_s = 0.0
            self._move(rid, standing.level + 1)
        else:
            self._move(rid, standing.level)

    def _move(self, rid: str, level: int) -> None:
        """Put it at the front of a level."""
        self._ranking.remove(self._rank(rid))
        self.standings[rid].level = level
        self.standings[rid].last_iteration = self._iteration
        self._ranking.add(self._rank(rid))

    def _rank(self, rid: str) -> tuple[int, int, int, str]:
        """Smallest first: the highest level, then who ran last, then arrival."""
        standing = self.standings[rid]
        return (standing.level, -standing.last_iteration, self.books[rid].number, rid)

    def _quantum_s(self, level: int) -> float:
        return self.config.base_quantum_s * self.config.quantum_ratio**level

    def _freed(self, rid: str) -> int:
        """KVC that is free again when a GT gives it up."""
        return self.ledger.held_by(rid) - self.books[rid].cached_tokens


def _place(state: TaskState) -> Place:
    return Place((), 0, state.number)
