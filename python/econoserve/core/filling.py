"""Fills the forward pass with prompts: what is left of the TFS after the decode tokens.

Owns the choice between starting a prompt whose response is promised at once, and parking it.
"""

import math
from itertools import islice

from econoserve.core.books import Books, TaskState
from econoserve.core.draft import Draft, Prompt
from econoserve.core.order import Ordering
from econoserve.core.pausing import Company
from econoserve.core.queues import from_rank
from econoserve.core.types import View

TRIES = 2
"""Prompts that are tested in vain in one plan; bounds its cost."""

HELD_UP = 16
"""Prompts in one plan that step back, or for which something else than KVC is missing, likewise."""

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
        margin_tokens: KVC that deferred prompts leave free.
    """

    def __init__(
        self,
        books: Books,
        ordering: Ordering,
        parked_fraction: float,
        starvation_s: float,
        margin_tokens: int = 0,
    ) -> None:
        self._books = books
        self._ledger = books.ledger
        self._ordering = ordering
        self._starvation_s = starvation_s
        self._margin_tokens = margin_tokens
        self._parkable_tokens = parked_fraction * books.ledger.capacity_tokens

    def fill(
        self, draft: Draft, view: View, tfs_tokens: int, company: Company | None = None
    ) -> None:
        """Plan prompts, first the one that is under way.

        If that goes on beyond this pass, it leaves part of it to prompts that are computed whole,
        so that short ones need not wait for the end of a long one; unless tasks run strictly in
        order.

        Args:
            draft: the plan so far.
            view: the machine now.
            tfs_tokens: decode and prompt tokens of the forward pass.
            company: keeps out prompts that would make others late; ``None``: nobody does.
        """
        budget = max(tfs_tokens - draft.decoding, tfs_tokens // LEAST_SHARE, 1)
        under_way = next(iter(self._books.prefilling.values()), None)
        if under_way is None:
            self._start_waiting(draft, view, budget, company)
            return
        left = under_way.prompt_left_tokens
        tokens = min(left, budget, draft.free_tokens)
        if tokens < 1:
            return
        goes_on = tokens < left
        if goes_on and tokens == budget and not self._ordering.strict:
            self._share(under_way, tokens, draft, view)
            return
        draft.prefill(under_way, tokens)
        if not goes_on:
            if company is not None:
                company.add(tokens)
                company.protect(under_way)
            self._start_waiting(draft, view, budget - tokens, company)

    def _start_waiting(
        self, draft: Draft, view: View, budget: int, company: Company | None
    ) -> None:
        """Start prompts in order; the last one may go on in the next pass."""
        misses = held_up = 0
        for index, (key, group) in enumerate(islice(self._books.waiting.groups(), GROUPS)):
            for state in from_rank(group, lambda index=index: self._least_rank(index, draft)):
                if min(budget, draft.rows, draft.free_tokens) < 1 or draft.blocked:
                    return
                if draft.is_out(state):
                    continue
                if not view.startable(state.task.rid) or self._steps_back(state, draft, view):
                    held_up += 1
                elif (prompt := self._next(state, budget, draft, view)) is None:
                    misses += 1
                elif company is not None and not (
                    company.welcomes(prompt.now_tokens)
                    or self._ordering.starves(key, view.now_s, self._starvation_s)
                ):
                    return
                elif self._start(state, prompt, draft, view):
                    budget -= prompt.now_tokens
                    if company is not None:
                        company.add(prompt.now_tokens)
                        if prompt.done:
                            company.protect(state)
                    continue
                else:
                    misses += 1
                draft.blocked = self._ordering.starves(key, view.now_s, self._starvation_s)
                if misses == TRIES or held_up == HELD_UP or self._ordering.strict:
                    return

    def _share(self, under_way: TaskState, tokens: int, draft: Draft, view: View) -> None:
        """Give a prompt under way what whole prompts leave of so many tokens, at least one.

        Those of an earlier window may take the rest, others half of it; if the prompt under way
        has an SLO, those of later windows nothing. The pass has as many tokens whoever shares it,
        so nobody in it is later for another's sake.
        """
        own = self._ordering.pt_place(under_way).group[0]
        last = own if self._ordering.has_slo(under_way) else math.inf
        draft.prefill(under_way, 1)
        used = misses = held_up = 0
        for key, group in islice(self._books.waiting.groups(), GROUPS):
            most = tokens - 1 if key[0] < own else tokens // 2
            if key[0] > last or misses == TRIES or held_up == HELD_UP or draft.blocked:
                break
            for state in group:
                if draft.is_out(state):
                    continue
                if not view.startable(state.task.rid) or self._steps_back(state, draft, view):
                    held_up += 1
                    break
                prompt = self._next(state, most - used, draft, view)
                if prompt is None or not prompt.done:
                    # The others of its group are about as long.
                    break
                if not self._start(state, prompt, draft, view):
                    misses += 1
                    draft.blocked = self._ordering.starves(key, view.now_s, self._starvation_s)
                    break
                used += prompt.now_tokens
        draft.prefill_more(under_way, tokens - 1 - used)

    def _least_rank(self, index: int, draft: Draft) -> float:
        """Where to begin in a group: at what fits; in the first, what is cached may help."""
        if index == 0 or self._ordering.shorter_first:
            return -math.inf
        return self._ordering.rank_of(draft.trial.headroom_tokens)

    def _next(self, state: TaskState, budget: int, draft: Draft, view: View) -> Prompt | None:
        """What a waiting prompt would take in this pass; ``None`` if no token of it has room."""
        cached = view.cached_prefix(state.task.rid)
        tokens = state.task.prompt_tokens - cached.tokens
        now_tokens = min(tokens, budget, draft.free_tokens - cached.evictable_tokens)
        if now_tokens < 1 or draft.rows < 1:
            return None
        return Prompt(tokens, cached.evictable_tokens, now_tokens)

    def _start(self, state: TaskState, prompt: Prompt, draft: Draft, view: View) -> bool:
        """Start a waiting prompt if it fits; whether it does."""
        taken, response = prompt.taken_tokens, state.needed
        # In strict order a prompt must not take what a GT waits for, unless it cannot be parked.
        behind = draft.gts_wait and self._ordering.strict and state.task.parkable
        runs_next = not behind and draft.committed < view.max_running
        # Alone, it runs whatever is kept in reserve.
        alone = draft.idle and not len(self._ledger)
        if (
            runs_next
            and prompt.done
            and (alone or draft.fits(taken + draft.early_tokens, response))
        ):
            draft.admit(state, prompt, response)
        elif runs_next and not prompt.done and (alone or draft.fits(taken + response[-1], ())):
            draft.reserve(state, prompt, response)
        elif self._may_park(state, taken, draft):
            draft.park(state, prompt, response)
        else:
            return False
        return True

    def _steps_back(self, state: TaskState, draft: Draft, view: View) -> bool:
        """Whether a prompt waits because too little KVC would be left for others.

        Only those are asked that are deferred or demoted, and not due; what has generated tokens
        already goes on.
        """
        if not (state.deferred or state.demoted) or state.task.generated_tokens:
            return False
        if view.now_s >= self._ordering.latest_start_s(state, generating=False):
            return False
        # Alone it runs, whatever it leaves.
        if draft.idle and not len(self._ledger):
            return False
        taken = state.task.prompt_tokens - view.cached_prefix(state.task.rid).tokens
        return not draft.fits(taken + self._margin_tokens, state.needed)

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
