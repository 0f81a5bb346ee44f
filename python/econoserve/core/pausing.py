"""When prompts are computed alone and in small companies, so that they get their first token soon.

A prompt's first token comes at the end of its pass. What else is in the pass delays it: decode
tokens, and other prompts. Where decoding is faster than its objective asks for and the KVC is not
scarce, the running requests can sit a pass out, and prompts that would make others late can wait
for the next one. Both cost throughput, since passes have a fixed cost, and requests that take
longer hold their KVC for longer: so nothing of it happens where KVC is scarce. The rules are ours,
not the paper's; that prompts go alone and first is vLLM's rule of 2023 and SGLang's.
"""

import math
from dataclasses import dataclass

from econoserve.core.books import Books, TaskState
from econoserve.core.cost import CostModel
from econoserve.core.draft import Draft
from econoserve.core.order import Ordering
from econoserve.core.pace import DecodePace
from econoserve.core.types import View

NEAR = 4.0
"""Decodes pause for a prompt whose latest start is less than so many passes away."""

BURST = 2.0
"""Once decodes have paused for so many times the tightest TPOT objective, they take a token first.
Over many tokens their pace bounds pauses; a response of a few tokens may miss its TPOT by them."""


@dataclass(frozen=True, slots=True)
class PausingConfig:
    """The constant; ours, not the paper's.

    Attributes:
        kvc_fraction: nobody pauses where more than this share of the KVC is used; 0: never.

    Raises:
        ValueError: it is out of range.
    """

    kvc_fraction: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.kvc_fraction <= 1:
            raise ValueError(f"kvc_fraction={self.kvc_fraction}: give a share in [0, 1]")


class Company:
    """The prompts of one pass, none of which is to be late because of another.

    Args:
        now_s: when the pass begins.
        ordering: knows the latest starts.
        cost: knows what prompts take.
    """

    def __init__(self, now_s: float, ordering: Ordering, cost: CostModel) -> None:
        self._ordering = ordering
        self._cost = cost
        self._done_s = now_s
        self._limit_s = math.inf

    def welcomes(self, tokens: int) -> bool:
        """Whether so many more prompt tokens make nobody late.

        Args:
            tokens: of one prompt.

        Returns:
            ``True`` if they do not.
        """
        return self._done_s + self._cost.prefill_s(tokens) <= self._limit_s

    def add(self, tokens: int) -> None:
        """Take tokens of a prompt into the pass.

        Args:
            tokens: how many.
        """
        self._done_s += self._cost.prefill_s(tokens)

    def protect(self, state: TaskState) -> None:
        """Let nobody who comes later make a prompt late, unless it is late in any case.

        Args:
            state: the prompt, which gets its first token after this pass; its tokens were added.
        """
        if state.task.slo.ttft_s is None or state.demoted:
            return
        latest_s = self._ordering.latest_start_s(state, generating=False)
        # The latest start is for all that is left of it, cached or not.
        limit_s = latest_s + self._cost.prefill_s(state.prompt_left_tokens)
        if limit_s >= self._done_s:
            self._limit_s = min(self._limit_s, limit_s)


class Pausing:
    """Decides whether a pass is for prompts alone, and how many go together.

    Args:
        config: where it does not happen.
        books: the live tasks.
        ordering: knows the deadlines.
        cost: knows how long passes take.
        pace: knows whether the decodes have time.
    """

    def __init__(
        self,
        config: PausingConfig,
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

    def company(self, draft: Draft, view: View) -> Company | None:
        """What limits the prompts of this pass for each other's sake.

        Args:
            draft: the plan so far.
            view: the machine now.

        Returns:
            An empty company; ``None`` if they go together as the TFS allows.
        """
        if not self._has_time(draft, view):
            return None
        return Company(view.now_s, self._ordering, self._cost)

    def may_pause(self, draft: Draft, view: View) -> bool:
        """Whether those that run could sit this pass out, if a prompt of it needs that.

        Args:
            draft: the plan so far.
            view: the machine now.

        Returns:
            ``True`` if they have the time, and the KVC is not scarce.
        """
        tpot_s = draft.tpot_s
        # Where nobody measures, nothing would ever end it.
        if not self._pace.step_s:
            return False
        if not draft.decoding or tpot_s == math.inf or self._pace.paused_s > BURST * tpot_s:
            return False
        return self._has_time(draft, view)

    def pauses(self, draft: Draft, view: View) -> bool:
        """Whether those that run are to sit this pass out.

        Args:
            draft: the plan, with the prompts of the pass.
            view: the machine now.

        Returns:
            ``True`` if they do.
        """
        if not self.may_pause(draft, view):
            return False
        pass_s = self._cost.base_s(True, draft.decoding, self._books.ledger.decoding_tokens)
        near_s = view.now_s + NEAR * pass_s
        return any(self._is_near(self._books[rid], near_s) for rid in draft.prompts)

    def _is_near(self, state: TaskState, near_s: float) -> bool:
        if state.demoted or state.task.slo.ttft_s is None:
            return False
        return self._ordering.latest_start_s(state, generating=False) < near_s

    def _has_time(self, draft: Draft, view: View) -> bool:
        if view.used_tokens >= self.config.kvc_fraction * view.capacity_tokens:
            return False
        return self._pace.relaxed(draft.tpot_s)
