"""Fills the forward pass with prompts: what is left of the TFS after the decode tokens.

Owns the choice between starting a prompt whose response is promised at once, and parking it.
"""

import math
from itertools import islice

from econoserve.core.books import Books, TaskState
from econoserve.core.draft import Draft, Prompt
from econoserve.core.order import Ordering
from econoserve.core.queues import from_rank
from econoserve.core.types import View

TRIES = 2
"""Prompts that are tested in vain in one plan; bounds its cost."""

HELD_UP = 16
"""Prompts in one plan for which something else than KVC is missing, likewise."""

GROUPS = 16
"""Groups of prompts looked at in one plan, likewise."""

LEAST_SHARE = 8
"""Prompts get one part in so many of the TFS even where decode tokens exceed it."""


class PromptFiller:
    """Starts prompts.

    Args:
        books: the live tasks.
        ordering: the order of the PT queue.
        parked_fraction: share of the KVC for prompts whose response was promised nothing yet.
        starvation_s: a prompt that waited so long beyond its latest start lets nobody past it.
    """

    def __init__(
        self, books: Books, ordering: Ordering, parked_fraction: float, starvation_s: float
    ) -> None:
        self._books = books
        self._ledger = books.ledger
        self._ordering = ordering
        self._starvation_s = starvation_s
        self._parkable_tokens = parked_fraction * books.ledger.capacity_tokens

    def fill(self, draft: Draft, view: View, tfs_tokens: int) -> None:
        """Plan prompts, first the one that is under way.

        One that goes on beyond this pass leaves up to half of it to prompts that are computed
        whole, so that short ones need not wait for the end of a long one; unless that has an SLO
        and they are less urgent, or tasks run strictly in order.

        Args:
            draft: the plan so far.
            view: the machine now.
            tfs_tokens: decode and prompt tokens of the forward pass.
        """
        budget = max(tfs_tokens - draft.decoding, tfs_tokens // LEAST_SHARE, 1)
        under_way = next(iter(self._books.prefilling.values()), None)
        if under_way is None:
            self._start_waiting(draft, view, budget)
            return
        tokens = min(under_way.prompt_left_tokens, budget, draft.free_tokens)
        if tokens < 1:
            return
        if tokens == under_way.prompt_left_tokens:
            draft.prefill(under_way, tokens)
            self._start_waiting(draft, view, budget - tokens)
            return
        shared = 0 if tokens < budget or self._ordering.strict else tokens // 2
        draft.prefill(under_way, tokens - shared)
        if shared:
            window = self._ordering.last_window_beside(under_way)
            left = self._start_waiting(draft, view, shared, window)
            draft.prefill_more(under_way, left)

    def _start_waiting(
        self, draft: Draft, view: View, budget: int, last_window: float | None = None
    ) -> int:
        """Start prompts in order; the tokens of the budget that are left.

        With a ``last_window``, only whole ones, and none of a later window.
        """
        whole, misses, held_up = last_window is not None, 0, 0
        for index, (key, group) in enumerate(islice(self._books.waiting.groups(), GROUPS)):
            if whole and key[0] > last_window:
                return budget
            for state in from_rank(group, lambda index=index: self._least_rank(index, draft)):
                if min(budget, draft.rows, draft.free_tokens) < 1 or draft.blocked:
                    return budget
                if draft.is_out(state):
                    continue
                startable = view.startable(state.task.rid)
                tokens = self._start(state, budget, view, draft, whole) if startable else 0
                budget -= tokens
                if not tokens:
                    misses, held_up = misses + startable, held_up + (not startable)
                    draft.blocked = self._ordering.starves(key, view.now_s, self._starvation_s)
                    if misses == TRIES or held_up == HELD_UP or self._ordering.strict:
                        return budget
        return budget

    def _least_rank(self, index: int, draft: Draft) -> float:
        """Where to begin in a group: at what fits; in the first, what is cached may help."""
        if index == 0 or self._ordering.shorter_first:
            return -math.inf
        return self._ordering.rank_of(draft.trial.headroom_tokens)

    def _start(self, state: TaskState, budget: int, view: View, draft: Draft, whole: bool) -> int:
        """Start a waiting prompt if it fits; the tokens of it to compute now, else 0."""
        cached = view.cached_prefix(state.task.rid)
        tokens = state.task.prompt_tokens - cached.tokens
        now_tokens = min(tokens, budget, draft.free_tokens - cached.evictable_tokens)
        if now_tokens < (tokens if whole else 1):
            return 0
        prompt = Prompt(tokens, cached.evictable_tokens, now_tokens)
        taken, response = prompt.taken_tokens, state.needed
        # In strict order a prompt must not take what a GT waits for, unless it cannot be parked.
        behind = draft.gts_wait and self._ordering.strict and state.task.parkable
        runs_next = not behind and draft.committed < view.max_running
        # Alone, it runs whatever is kept in reserve.
        alone = draft.idle and not len(self._ledger)
        if runs_next and prompt.done and (alone or draft.fits(taken, response)):
            draft.admit(state, prompt, response)
        elif runs_next and not prompt.done and (alone or draft.fits(taken + response[-1], ())):
            draft.reserve(state, prompt, response)
        elif self._may_park(state, taken, draft):
            draft.park(state, prompt, response)
        else:
            return 0
        return now_tokens

    def _may_park(self, state: TaskState, taken: int, draft: Draft) -> bool:
        """Whether a prompt may be computed although its response must wait.

        Together with the longest response that waits, parked prompts never fill the KVC: when
        nothing runs, the first GT fits.
        """
        parked = self._ledger.waiting_tokens + draft.parked_tokens + taken
        if not state.task.parkable or parked > self._parkable_tokens:
            return False
        waiting = self._books.ready_responses
        longest = max(
            state.needed[-1],
            draft.longest_parked_tokens,
            waiting[-1] if waiting else 0,
            *(other.needed[-1] for other in self._books.prefilling.values()),
        )
        left = self._ledger.capacity_tokens - self._ledger.reserve_tokens
        return parked + longest <= left and draft.fits(taken, ())
