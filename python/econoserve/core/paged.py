"""What policies share that take KVC in blocks as they go, first come, first served.

A token-level pool has no blocks; these policies count as if it had, so that they decide as their
originals do.
"""

from econoserve.core.books import Books, TaskState
from econoserve.core.plain import PlainLedger
from econoserve.core.policy import BookedPolicy
from econoserve.core.queues import Place
from econoserve.core.types import View


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


class PagedPolicy(BookedPolicy):
    """Counts KVC in blocks; subclasses decide, in ``plan``.

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

    def freed_tokens(self, state: TaskState) -> int:
        """KVC that a preemption frees.

        Args:
            state: a task that holds KVC.

        Returns:
            Tokens in its blocks, without a prefix from the cache, which may stay in use.
        """
        return self.in_blocks(self.ledger.held_by(state.task.rid)) - state.cached_tokens

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

    def unfinished_chunks(self, budget: int) -> list[tuple[str, int]]:
        """The next chunk of the prompt under way, whose blocks are taken already.

        Args:
            budget: most tokens.

        Returns:
            ``(rid, tokens)``, at most one.
        """
        parts = []
        for state in self.books.prefilling.values():
            tokens = min(state.prompt_left_tokens, budget)
            if tokens > 0:
                parts.append((state.task.rid, tokens))
                budget -= tokens
        return parts

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


def check_paged(sizes: dict[str, int], watermark_fraction: float) -> None:
    """Refuse sizes that no block manager can have.

    Args:
        sizes: values that must be at least 1, by name.
        watermark_fraction: share of the blocks to keep free.

    Raises:
        ValueError: names the value and the fix.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value}: give 1 or more")
    if not 0.0 <= watermark_fraction < 1.0:
        raise ValueError(f"watermark_fraction={watermark_fraction}: give 0 or more, below 1")
