"""What the baselines share: the order of arrival, and KVC taken in blocks.

A token-level pool has no blocks; the policies that take them count as if it had, so that they
decide as their originals do. Which policy does what, and when, is in its own file.
"""

import math
from collections import deque
from typing import NamedTuple

from econoserve.core.books import Books, Phase, TaskState
from econoserve.core.plain import PlainLedger
from econoserve.core.policy import BookedPolicy
from econoserve.core.queues import Place
from econoserve.core.types import IterationPlan, Preemption, View


def came(state: TaskState) -> tuple[float, int]:
    """The order of arrival; a task that gave up its KVC keeps its place in it.

    Args:
        state: the task.

    Returns:
        A key, smallest first.
    """
    return (state.task.arrival_s, state.number)


def arrival_place(state: TaskState) -> Place:
    """A place in a queue ordered by arrival.

    Args:
        state: the task.

    Returns:
        The place.
    """
    return Place(came(state), 0, state.number)


def unfinished_prompts(books: Books, budget_tokens: float = math.inf) -> list[tuple[str, int]]:
    """What is left of prompts under way, cut by a policy or cut short by the machine.

    Args:
        books: the live tasks.
        budget_tokens: most tokens in all.

    Returns:
        ``(rid, tokens)`` of each that has its turn.
    """
    parts = []
    for state in books.prefilling.values():
        tokens = int(min(state.prompt_left_tokens, budget_tokens))
        if tokens > 0:
            parts.append((state.task.rid, tokens))
            budget_tokens -= tokens
    return parts


class Decodes(NamedTuple):
    """Who decodes in an iteration, and what it costs the others.

    Attributes:
        stay: tasks that decode.
        preempt: tasks that give way, and how.
        free_tokens: KVC in free blocks then.
        all_stay: whether nobody is left out.
    """

    stay: list[TaskState]
    preempt: list[tuple[str, Preemption]]
    free_tokens: int
    all_stay: bool

    def plan(self, prefill: list[tuple[str, int]]) -> IterationPlan:
        """The iteration.

        Args:
            prefill: its prompts.

        Returns:
            The plan.
        """
        resume = tuple(state.task.rid for state in self.stay if state.phase is Phase.READY)
        return IterationPlan(tuple(prefill), resume, tuple(self.preempt))


class PagedPolicy(BookedPolicy):
    """Counts KVC in blocks, first come, first served; subclasses decide, in ``plan``.

    Args:
        capacity_tokens: size of the KVC.
        block_tokens: KVC is taken in blocks of so many tokens.
        watermark_fraction: share of the blocks that starting a prompt leaves free.
    """

    def __init__(
        self, capacity_tokens: int, block_tokens: int, watermark_fraction: float = 0.0
    ) -> None:
        super().__init__(Books(PlainLedger(capacity_tokens), arrival_place, arrival_place))
        self.block_tokens = block_tokens
        self.watermark_tokens = (
            int(watermark_fraction * (capacity_tokens // block_tokens)) * block_tokens
        )

    @property
    def holders(self) -> int:
        """Tasks that hold KVC."""
        return len(self.books.prefilling) + len(self.books.ready) + len(self.books.running)

    def decoders(self) -> list[TaskState]:
        """Tasks whose prompt is done, by arrival.

        Returns:
            Those that run and those that could.
        """
        return sorted([*self.books.running.values(), *self.books.ready], key=came)

    def free_tokens(self, view: View) -> int:
        """KVC in free blocks: what the pool has, less the rest of everybody's last block.

        Args:
            view: the machine now.

        Returns:
            Tokens. A prompt takes its blocks when it starts.
        """
        rest = 0
        for state in (*self.books.running.values(), *self.books.ready):
            rest += -self.ledger.held_by(state.task.rid) % self.block_tokens
        for state in self.books.prefilling.values():
            rest += self.in_blocks(state.task.prompt_tokens) - state.prefilled_tokens
        return view.capacity_tokens - view.used_tokens - rest

    def freed_tokens(self, state: TaskState, view: View | None = None) -> int:
        """KVC that a preemption frees.

        Args:
            state: a task that holds KVC.
            view: the machine now, if it is to be asked.

        Returns:
            Tokens in its blocks, without those that others use; where the machine does not say,
            without a prefix from the cache, which may stay in use.
        """
        held = self.ledger.held_by(state.task.rid)
        released = view.released(state.task.rid) if view else None
        return self.in_blocks(held) - (state.cached_tokens if released is None else held - released)

    def grows(self, state: TaskState) -> bool:
        """Whether a task's next token needs a new block.

        Args:
            state: a task that holds KVC.

        Returns:
            ``True`` if its last block is full.
        """
        return self.ledger.held_by(state.task.rid) % self.block_tokens == 0

    def in_blocks(self, tokens: int) -> int:
        """Tokens rounded up to whole blocks.

        Args:
            tokens: how many are needed.

        Returns:
            Tokens.
        """
        return tokens + -tokens % self.block_tokens

    def asked_tokens(self, state: TaskState) -> int:
        """KVC that must be free for a task to decode; where there is less, somebody gives way.

        Args:
            state: a task whose prompt is done.

        Returns:
            Tokens of the block that it takes, if its last one is full.
        """
        return self.block_tokens if self.grows(state) else 0

    def decode(self, free_tokens: int, view: View | None = None) -> Decodes:
        """Let decode who came first, as far as the blocks go; the last to come gives way.

        Args:
            free_tokens: KVC in free blocks.
            view: the machine now, if it is to be asked what a preemption frees.

        Returns:
            Who decodes and who does not. Who is alone always does.
        """
        left = deque(self.decoders())
        count, stay = len(left), []
        preempt: list[tuple[str, Preemption]] = []
        while left:
            state = left.popleft()
            asked = self.asked_tokens(state)
            while free_tokens < asked and left:
                victim = left.pop()
                preempt.append((victim.task.rid, Preemption.RECOMPUTE))
                free_tokens += self.freed_tokens(victim, view)
            if free_tokens < asked and stay:
                preempt.append((state.task.rid, Preemption.RECOMPUTE))
                break
            taken = self.block_tokens if self.grows(state) else 0
            if free_tokens < taken and self.books.prefilling:
                # The prompt under way cannot give way: the last one waits for it to end.
                if state.phase is Phase.RUNNING:
                    preempt.append((state.task.rid, Preemption.PARK))
                break
            stay.append(state)
            free_tokens -= taken
        return Decodes(stay, preempt, free_tokens, len(stay) == count)

    def decodes_and_chunks(self, view: View, budget: int, most_holders: int) -> IterationPlan:
        """Spend a budget on decodes, then the prompt under way, then, if nobody gave way, new ones.

        Args:
            view: the machine now.
            budget: most tokens in the iteration.
            most_holders: most tasks that may hold KVC.

        Returns:
            The iteration.
        """
        decodes = self.decode(self.free_tokens(view), view)
        budget -= len(decodes.stay)
        # The blocks of the prompt under way are taken already.
        parts = unfinished_prompts(self.books, budget)
        if decodes.all_stay:
            budget -= sum(tokens for _, tokens in parts)
            parts += self.new_chunks(view, decodes.free_tokens, budget, most_holders)
        return decodes.plan(parts)

    def new_chunks(
        self, view: View, free_tokens: int, budget: int, most_holders: int
    ) -> list[tuple[str, int]]:
        """The first chunks of new prompts, whose blocks are all taken now; nobody passes another.

        Args:
            view: the machine now.
            free_tokens: KVC in free blocks.
            budget: most tokens.
            most_holders: most tasks that may hold KVC.

        Returns:
            ``(rid, tokens)`` of each.
        """
        parts: list[tuple[str, int]] = []
        places = min(min(most_holders, view.max_running) - self.holders, view.free_rows)
        free_tokens -= self.watermark_tokens
        for state in self.books.waiting:
            if min(places, budget) < 1:
                break
            cached = view.cached_prefix(state.task.rid)
            needed = self.in_blocks(state.task.prompt_tokens)
            needed -= cached.tokens - cached.evictable_tokens
            alone = not self.holders and not parts
            if needed > free_tokens and not alone:
                break
            tokens = min(state.task.prompt_tokens - cached.tokens, budget)
            parts.append((state.task.rid, tokens))
            free_tokens -= needed
            budget -= tokens
            places -= 1
        return parts
