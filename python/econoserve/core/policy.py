"""The interface between a scheduling policy and whoever runs it: the engine or the simulator.

A policy's ``plan`` decides and changes nothing; ``on_launch`` and ``on_tokens`` tell it what came
of it. The books therefore follow what ran, even where the runner could not follow the plan.
"""

from collections.abc import Iterable
from typing import Protocol

from econoserve.core.books import Books
from econoserve.core.cost import IterationWork
from econoserve.core.types import IterationPlan, Launch, Outcome, Task, View


class Policy(Protocol):
    """Decides what runs in each iteration. Every method is deterministic in its inputs."""

    def add(self, task: Task) -> None:
        """Take a request into the PT queue.

        Args:
            task: the request; a ``rid`` that is known already is refused.

        Raises:
            NeverFits: its prompt is larger than the KVC.
            ValueError: the ``rid`` is known.
        """

    def plan(self, view: View) -> IterationPlan:
        """Decide the next iteration without changing anything.

        Args:
            view: the machine now.

        Returns:
            What to prefill, resume, preempt, refuse and demote.
        """

    def on_launch(self, plan: IterationPlan, launch: Launch) -> None:
        """Record what started.

        Tasks preempted for ``RECOMPUTE`` are not in it: they are requeued before. Rejected ones
        are removed. Parked and offloaded ones are in ``launch``.

        Args:
            plan: the plan that was followed, for its promises; empty if none was.
            launch: the iteration as it was launched.
        """

    def on_tokens(self, rid: str, tokens: int) -> None:
        """Record output that came back.

        Args:
            rid: request id.
            tokens: output tokens produced since the last call.
        """

    def on_step(self, rids: Iterable[str]) -> None:
        """Record one output token of each of these, as ``on_tokens`` does.

        Args:
            rids: request ids.
        """

    def on_iteration(self, work: IterationWork, elapsed_s: float) -> None:
        """Learn how long an iteration took; with several ranks, the same figure on all.

        Args:
            work: what it computed.
            elapsed_s: how long it took.
        """

    def requeue(self, task: Task) -> None:
        """Let a request wait again that gave up its KVC; it keeps its place in the arrival order.

        Args:
            task: the request with what it generated counted as prompt; an id that is not known
                is added.
        """

    def remove(self, rid: str, outcome: Outcome) -> None:
        """Forget a request; unknown ids are ignored.

        Args:
            rid: request id.
            outcome: how it ended.
        """


class BookedPolicy:
    """A policy's bookkeeping; subclasses only decide, in ``plan``.

    Args:
        books: the live tasks and their claims.
    """

    def __init__(self, books: Books) -> None:
        self.books = books
        self.ledger = books.ledger

    def add(self, task: Task) -> None:
        """See ``Policy.add``."""
        self.books.add(task)

    def on_launch(self, plan: IterationPlan, launch: Launch) -> None:
        """See ``Policy.on_launch``."""
        if plan.promises:
            self._promise(plan, launch)
        for rid in plan.demote:
            self.books.demote(rid)
        self.books.on_launch(launch)

    def _promise(self, plan: IterationPlan, launch: Launch) -> None:
        launched = {*launch.resumed, *(part.rid for part in launch.prefilled)}
        for promise in plan.promises:
            rid = promise.rid
            # What was planned and not launched is owed nothing, unless it was owed something.
            owed = rid in self.ledger and self.ledger[rid].since is not None
            if rid in self.books and (rid in launched or owed):
                self.ledger.promise(
                    rid, promise.prompt_tokens, promise.response_tokens, promise.host
                )

    def on_tokens(self, rid: str, tokens: int) -> None:
        """See ``Policy.on_tokens``."""
        self.books.on_tokens(rid, tokens)

    def on_step(self, rids: Iterable[str]) -> None:
        """See ``Policy.on_step``."""
        self.books.on_step(rids)

    def on_iteration(self, work: IterationWork, elapsed_s: float) -> None:
        """See ``Policy.on_iteration``; ignored unless a policy wants it."""

    def requeue(self, task: Task) -> None:
        """See ``Policy.requeue``."""
        if task.rid in self.books:
            self.books.requeue(task)
        else:
            self.add(task)

    def remove(self, rid: str, outcome: Outcome) -> None:
        """See ``Policy.remove``."""
        self.books.remove(rid)
