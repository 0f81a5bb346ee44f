"""How fast the running requests decode, and whether that leaves time for others.

Owns the means over recent iterations. It never reads a clock: whoever runs the policy measures.
"""

from econoserve.core.books import Books
from econoserve.core.cost import CostModel, IterationWork
from econoserve.core.types import Launch

MEMORY_STEPS = 256
"""Iterations over which the pace is averaged."""

OUTLIER = 4.0
"""An iteration counts as no longer than so many times what was expected."""

TIGHT = 0.8
"""A pace that takes less than this share of the TPOT objective leaves time to spare."""


class DecodePace:
    """The decodes' pace.

    Args:
        books: the live tasks.
        cost: knows how long iterations should take.

    Attributes:
        step_s: mean time from one token of a response to its next.
        alone_s: mean time of iterations that did nothing but decode.
        paused_s: time since the last iteration that decoded, in which prompts were computed alone.
    """

    def __init__(self, books: Books, cost: CostModel) -> None:
        self._books = books
        self._cost = cost
        self.step_s = self.alone_s = self.paused_s = 0.0
        self._steps = self._alone = 0

    def on_launch(self, launch: Launch) -> None:
        """Forget the pace when nobody runs.

        Args:
            launch: the iteration as launched.
        """
        if not launch.decoded and not self._books.running:
            self.step_s = self.alone_s = self.paused_s = 0.0
            self._steps = self._alone = 0

    def on_iteration(self, work: IterationWork, elapsed_s: float) -> None:
        """Learn from an iteration.

        Args:
            work: what it computed.
            elapsed_s: how long it took.
        """
        elapsed_s = min(elapsed_s, OUTLIER * self._cost.seconds(work))
        if not work.decoding:
            if work.sitting_out:
                self.paused_s += elapsed_s
            return
        if not work.mixed:
            self._alone = min(self._alone + 1, MEMORY_STEPS)
            self.alone_s += (elapsed_s - self.alone_s) / self._alone
        self._steps = min(self._steps + 1, MEMORY_STEPS)
        self.step_s += (elapsed_s + self.paused_s - self.step_s) / self._steps
        self.paused_s = 0.0

    def relaxed(self, tpot_s: float) -> bool:
        """Whether decoding is faster than it must be.

        Args:
            tpot_s: the tightest TPOT objective; infinity without one.

        Returns:
            ``True`` if there is time to spare.
        """
        return self.step_s + self.paused_s / max(self._steps, 1) < TIGHT * tpot_s
