"""A plan in the making: the ledger's figures as they change with each decision.

Owns nothing beyond one call of ``plan``; the ledger and the books stay as they are.
"""

from econoserve.core.books import Books, TaskState
from econoserve.core.types import IterationPlan, Preemption, View


class Draft:
    """Decisions taken so far in this iteration, and what KVC they leave.

    Args:
        view: the machine now.
        books: the live tasks and their claims.

    Attributes:
        free_tokens: KVC neither used nor promised after these decisions, the reserve included.
        blocked: a task waited too long; nobody may pass it.
    """

    def __init__(self, view: View, books: Books) -> None:
        self.free_tokens = books.ledger.free_tokens(view.used_tokens)
        self.blocked = False
        self._ledger = books.ledger
        self._books = books
        self._promises: dict[str, int] = {}
        self._resume: list[str] = []
        self._prefill: list[tuple[str, int]] = []
        self._preempt: dict[str, Preemption] = {}

    @property
    def admissible_tokens(self) -> int:
        """KVC that an admission may take: what is free, less the reserve."""
        return self.free_tokens - self._ledger.reserve_tokens

    @property
    def decoding(self) -> int:
        """Tasks that will decode in this iteration."""
        leaving = sum(rid in self._books.running for rid in self._preempt)
        return len(self._books.running) - leaving + len(self._resume)

    @property
    def empty(self) -> bool:
        """Whether nothing was resumed or prefilled so far."""
        return not self._resume and not self._prefill

    def promised_tokens(self, state: TaskState) -> int:
        """KVC still to come that a task is owed.

        Args:
            state: a task, with or without a claim.

        Returns:
            Tokens, with this draft's promise if it has one.
        """
        rid = state.task.rid
        standing = self._ledger[rid].promised_tokens if rid in self._ledger else 0
        return self._promises.get(rid, standing)

    def promise(self, state: TaskState, tokens: int) -> None:
        """Owe a task this much KVC from now on.

        Args:
            state: the task.
            tokens: KVC still to come; replaces what it was owed.
        """
        self.free_tokens -= tokens - self.promised_tokens(state)
        self._promises[state.task.rid] = tokens

    def resume(self, state: TaskState, tokens: int) -> None:
        """Let a GT join the batch.

        Args:
            state: a task in the GT queue.
            tokens: KVC that it is owed.
        """
        self.promise(state, tokens)
        self._resume.append(state.task.rid)

    def prefill(self, state: TaskState, tokens: int) -> None:
        """Put prompt tokens into the forward pass.

        Args:
            state: a task whose prompt is unfinished.
            tokens: how many, at least 1.
        """
        self._prefill.append((state.task.rid, tokens))

    def recompute(self, state: TaskState) -> None:
        """Take a task's KVC back; its prefix that came from the cache may stay in use.

        Args:
            state: a task in the GT queue or running.
        """
        claim = self._ledger[state.task.rid]
        self.free_tokens += self.promised_tokens(state) + claim.held_tokens - state.cached_tokens
        self._promises.pop(state.task.rid, None)
        self._preempt[state.task.rid] = Preemption.RECOMPUTE

    def is_leaving(self, state: TaskState) -> bool:
        """Whether a task's KVC is taken back in this iteration.

        Args:
            state: the task.

        Returns:
            ``True`` after ``recompute``.
        """
        return state.task.rid in self._preempt

    def plan(self) -> IterationPlan:
        """The decisions as a plan.

        Returns:
            The plan.
        """
        return IterationPlan(
            prefill=tuple(self._prefill),
            resume=tuple(self._resume),
            preempt=tuple(self._preempt.items()),
            promises=tuple(self._promises.items()),
        )
