"""Shortest remaining time first: preemptive, on predicted response lengths.

Each iteration takes requests by the predicted rest of their response, whether they run or wait,
until one does not fit the budget of tokens or the KVC; a prompt that the budget cuts goes on later.
Who is left out keeps its KVC while there is room, and gives it up from the last one up where there
is not. A response that is nearly done is not preempted any more.

Checked against hao-ai-lab/vllm-ltr 8886f1e (vllm/core/scheduler.py: schedule type srtf,
_general_schedule, reserve_free_blocks) and TRAIL (arXiv 2410.01035, no public code), whose
predictions follow the response and whose preemption is limited. Where this differs:

- One prompt at a time may be unfinished: it is not preempted, its KVC is kept free, and other
  prompts are not cut meanwhile.
- A prediction follows its response by what survival tells, not by what the model computes.
- A preemption frees no prefix from the cache, which may stay in use. With prefix caching, what it
  frees is therefore understated: all cached tokens count as shared.
- The batch is as large as the machine allows.
- Where the machine cannot park one who is left out, it decodes along.
"""

import heapq
import math
from dataclasses import dataclass

from econoserve.core.books import Books, Phase, TaskState
from econoserve.core.checks import check_least
from econoserve.core.plain import PlainLedger
from econoserve.core.policy import BookedPolicy
from econoserve.core.queues import Place
from econoserve.core.types import IterationPlan, Preemption, View


@dataclass(frozen=True, slots=True)
class SrtfConfig:
    """The policy's constants; the defaults are vLLM's then, and TRAIL's.

    Attributes:
        capacity_tokens: size of the KVC.
        max_batch_tokens: decode and prompt tokens of one iteration.
        preemptible_fraction: a GT that generated this share of the response predicted at first is
            not preempted any more (TRAIL's c); from 1 on every GT may be, as in vllm-ltr.
        preemption: how KVC is given up; vllm-ltr swaps.

    Raises:
        ValueError: a value is out of range.
    """

    capacity_tokens: int
    max_batch_tokens: int = 512
    preemptible_fraction: float = 0.8
    preemption: Preemption = Preemption.OFFLOAD

    def __post_init__(self) -> None:
        check_least(self, capacity_tokens=1, max_batch_tokens=1, preemptible_fraction=0)
        if self.preemption is Preemption.PARK:
            raise ValueError("preemption=PARK frees no KVC: give OFFLOAD or RECOMPUTE")


class _Batch:
    """An iteration in the making, as if everybody who is not in it gave way.

    Attributes:
        budget_tokens: tokens that it may still compute.
        room_tokens: KVC that is left.
        rows: further requests that may hold KVC.
        needed_tokens: KVC that it takes beyond what its members hold.
        prompts: tokens by prompt.
        gts: those that decode.
    """

    def __init__(self, budget_tokens: int, room_tokens: int, rows: int) -> None:
        self.budget_tokens = budget_tokens
        self.room_tokens = room_tokens
        self.rows = rows
        self.needed_tokens = 0
        self.prompts: dict[str, int] = {}
        self.gts: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self.prompts) + len(self.gts)

    def compute(self, rid: str, tokens: int) -> None:
        """Put prompt tokens into it, whose KVC was counted."""
        self.prompts[rid] = tokens
        self.budget_tokens -= tokens

    def decode(self, rid: str) -> None:
        """Put a GT into it, whose KVC was counted."""
        self.gts[rid] = None
        self.budget_tokens -= 1

    def take(self, held_tokens: int, taken_tokens: int, row: int) -> bool:
        """Count a member's KVC, what it holds and what it takes, if it fits."""
        if held_tokens + taken_tokens > self.room_tokens or row > self.rows:
            return False
        self.room_tokens -= held_tokens + taken_tokens
        self.needed_tokens += taken_tokens
        self.rows -= row
        return True


class Srtf(BookedPolicy):
    """The policy; ``core.policy.Policy`` describes its methods.

    Args:
        config: its constants.
    """

    def __init__(self, config: SrtfConfig) -> None:
        self.config = config
        super().__init__(Books(PlainLedger(config.capacity_tokens), self._place, self._place))

    def plan(self, view: View) -> IterationPlan:
        """See ``Policy.plan``."""
        gts = sorted([*self.books.running.values(), *self.books.ready], key=self._rank)
        free = view.capacity_tokens - view.used_tokens
        batch = self._batch(view, gts, free)
        # A prefix that came from the cache may be all that is in the way: then everybody goes.
        needed = batch.needed_tokens if len(batch) else math.inf
        preempt = []
        for state in reversed(gts):
            if state.task.rid in batch.gts or state.offloaded_tokens:
                continue
            if free < needed:
                preempt.append((state.task.rid, self.config.preemption))
                free += self._freed(state)
            elif state.phase is Phase.RUNNING:
                preempt.append((state.task.rid, Preemption.PARK))
        resume = tuple(rid for rid in batch.gts if self.books[rid].phase is Phase.READY)
        # The prompt under way comes first, whatever its rank.
        order = sorted(batch.prompts.items(), key=lambda item: not self.books.has_started(item[0]))
        return IterationPlan(tuple(order), resume, tuple(preempt))

    def _batch(self, view: View, gts: list[TaskState], free: int) -> _Batch:
        """Who is in the next iteration, by rank."""
        under_way = self.books.prefilling
        room = free + sum(map(self._freed, gts))
        batch = _Batch(self.config.max_batch_tokens, room, view.free_rows)
        if not batch.take(0, sum(state.prompt_left_tokens for state in under_way.values()), 0):
            return batch
        unfinished = len(under_way)
        ranked = sorted([*gts, *under_way.values()], key=self._rank)
        for state in heapq.merge(ranked, self.books.waiting, key=self._rank):
            rid = state.task.rid
            if len(batch) >= view.max_running or batch.budget_tokens < 1:
                break
            if state.phase is Phase.PREFILLING:
                batch.compute(rid, min(state.prompt_left_tokens, batch.budget_tokens))
                unfinished -= batch.prompts[rid] == state.prompt_left_tokens
            elif state.phase is Phase.WAITING:
                cached = view.cached_prefix(rid)
                prompt = state.task.prompt_tokens - cached.tokens
                tokens = min(prompt, batch.budget_tokens)
                if tokens < prompt and unfinished:
                    continue
                if not batch.take(0, prompt + cached.evictable_tokens, 1):
                    break
                batch.compute(rid, tokens)
            else:
                moved = state.offloaded_tokens
                if not batch.take(self._freed(state), moved + 1, 1 if moved else 0):
                    break
                batch.decode(rid)
        for rid, state in under_way.items():
            # Where its KVC keeps the first one out, it is done first.
            if not len(batch):
                batch.compute(rid, min(state.prompt_left_tokens, batch.budget_tokens))
        return batch

    def _place(self, state: TaskState) -> Place:
        """Where a task waits; in the PT queue this is the order of ranks."""
        return Place((1, self._left(state)), 0, state.number)

    def _rank(self, state: TaskState) -> tuple[int, int, int]:
        """Smallest first: GTs that are nearly done, then the shortest rest, then arrival."""
        waits = state.phase in (Phase.WAITING, Phase.PREFILLING)
        predicted = state.task.prediction.tokens
        kept = state.generated_tokens >= self.config.preemptible_fraction * predicted
        protected = kept and not waits and self.config.preemptible_fraction < 1
        return (0 if protected else 1, self._left(state), state.number)

    def _left(self, state: TaskState) -> int:
        """Tokens that its response still needs, as predicted now."""
        return self.books.response_left(state)[-1]

    def _freed(self, state: TaskState) -> int:
        """KVC that is free again when a GT gives way."""
        if state.offloaded_tokens:
            return 0
        return self.ledger.held_by(state.task.rid) - state.cached_tokens
