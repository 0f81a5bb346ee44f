"""The interface between a scheduling policy and whoever runs it: the engine or the simulator.

A policy's ``plan`` decides and changes nothing; ``on_launch`` and ``on_tokens`` tell it what came
of it. The books therefore follow what ran, even where the runner could not follow the plan.
"""

from typing import Protocol

from econoserve.core.books import Books
from econoserve.core.types import IterationPlan, Launch, Task, View


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
            What to prefill, resume and preempt.
        """

    def on_launch(self, plan: IterationPlan, launch: Launch) -> None:
        """Record what started. Preempted tasks are not in it: they are removed and added again.

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

    def remove(self, rid: str) -> None:
        """Forget a request that finished, was aborted, or gave up its KVC; unknown ids are ignored.

        Args:
            rid: request id.
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
        launched = {part.rid for part in launch.prefilled}
        for rid, tokens in plan.promises:
            # A prompt that was planned and not launched holds nothing and is owed nothing.
            if rid in launched or (rid in self.books and self.books.has_started(rid)):
                self.ledger.promise(rid, tokens)
        self.books.on_launch(launch)

    def on_tokens(self, rid: str, tokens: int) -> None:
        """See ``Policy.on_tokens``."""
        self.books.on_tokens(rid, tokens)

    def remove(self, rid: str) -> None:
        """See ``Policy.remove``."""
        self.books.remove(rid)
