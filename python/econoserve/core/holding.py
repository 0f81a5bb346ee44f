"""When waiting prompts start: in each pass, or several together in one of a few.

A pass that computes prompts beside decodes takes longer than the two by themselves: it may not use
a CUDA graph, and attention over both is slower than over either. Everybody who decodes waits for
that, once for each such pass, however many prompts are in it. So prompts are held back until the
time that they have waited outweighs it, but for a few steps only. (Where it is not known what is
still to come, that costs at most twice what the best hindsight would, as with the acknowledgements
of TCP: Dooly, Goldman and Scott, JACM 2001.) All of this is ours, not the paper's.
"""

import math
from dataclasses import dataclass
from itertools import islice

from econoserve.core.books import Books
from econoserve.core.checks import check_least
from econoserve.core.cost import CostModel
from econoserve.core.draft import Draft
from econoserve.core.order import Ordering
from econoserve.core.pace import DecodePace
from econoserve.core.types import Launch, View

PROMPTS = 16
"""Prompts that are looked at; bounds the cost."""

SLACK_SHARE = 0.25
"""Share of the time until its latest start, less two passes, for which a prompt may be held."""

WEIGHT = 2.0
"""A second before the first token counts as so many between tokens."""

SLOW_STEPS = 64
"""Steps for which prompts wait at most because the pace is too slow."""

SPARE = 1.1
"""They do not wait where decoding alone takes more than the objective over this."""


@dataclass(frozen=True, slots=True)
class HoldingConfig:
    """How long prompts are held; ours, not the paper's.

    Attributes:
        steps: decode steps between two passes with prompts, at most; 0: prompts never wait.
        pace: prompts wait longer while the decodes' pace is slower than this share of the tightest
            TPOT objective, although it would be kept without prompts.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int = 8
    pace: float = 0.97

    def __post_init__(self) -> None:
        check_least(self, steps=0)
        if not self.pace > 0:
            raise ValueError(f"pace={self.pace}: give more than 0")


class Holding:
    """Decides whether prompts wait for another pass.

    Args:
        config: how long at most.
        books: the live tasks.
        ordering: knows the deadlines.
        cost: knows what prompts cost those that decode.
        pace: knows whether the decodes have time.
    """

    def __init__(
        self,
        config: HoldingConfig,
        books: Books,
        ordering: Ordering,
        cost: CostModel,
        pace: DecodePace,
    ) -> None:
        self.config = config
        self._books = books
        self._ordering = ordering
        self._cost = cost
        self._pace = pace
        self._steps = config.steps

    def on_launch(self, launch: Launch) -> None:
        """Count the steps since prompts were in a pass.

        Args:
            launch: the iteration as launched.
        """
        self._steps = 0 if launch.prefilled else self._steps + 1

    def holds(self, draft: Draft, view: View) -> bool:
        """Whether waiting prompts are not to start in this pass.

        Args:
            draft: the plan so far.
            view: the machine now.

        Returns:
            ``True`` if they wait.
        """
        decoding, context_tokens = draft.decoding, self._books.ledger.decoding_tokens
        if not decoding or not self.config.steps or not len(self._books.waiting):
            return False
        # What keeps nobody's SLO would lose some.
        relaxed = self._pace.relaxed(draft.tpot_s)
        if relaxed and draft.tpot_s < math.inf:
            return False
        limit_s = self.config.pace * draft.tpot_s
        pace = self._pace
        if pace.step_s > limit_s > SPARE * pace.alone_s and self._steps < SLOW_STEPS:
            return True
        if self._steps >= self.config.steps:
            return False
        step_s, mixed_s = (
            self._cost.base_s(mixed, decoding, context_tokens) for mixed in (False, True)
        )
        lost_s = decoding * (mixed_s - step_s)
        for state in islice(self._books.waiting, PROMPTS):
            if state.demoted or state.deferred or draft.is_out(state):
                continue
            waited_s = view.now_s - state.task.arrival_s
            lost_s -= WEIGHT * waited_s
            if lost_s <= 0:
                return False
            if self._ordering.has_slo(state):
                if relaxed:
                    return False
                latest_s = self._ordering.latest_start_s(state, generating=False)
                # Its own pass takes longer than what it adds, and the one under way comes before.
                slack_s = latest_s - state.task.arrival_s - 2 * mixed_s
                if waited_s > SLACK_SHARE * slack_s:
                    return False
        return lost_s > 0
