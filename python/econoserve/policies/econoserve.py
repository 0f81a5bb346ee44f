"""EconoServe, first version: decoupled PT and GT queues on exact allocation (arXiv 2411.06364).

Each iteration keeps the promises made to running GTs, resumes GTs whose whole predicted response
fits, then fills the forward pass with prompts up to the TFS. All constants are ours.
"""

from dataclasses import dataclass
from enum import Enum

from econoserve.core.books import Books, TaskState
from econoserve.core.draft import Draft
from econoserve.core.ledger import ExactLedger
from econoserve.core.policy import BookedPolicy
from econoserve.core.types import IterationPlan, View

SCAN = 64
"""Queued tasks looked at behind one that does not fit; bounds the cost of a plan."""

EXACT = 4
"""Prompts whose cached prefix is looked up although they do not fit without one."""


class LengthOrder(Enum):
    """Which of two equally urgent tasks goes first."""

    LONGER = "longer"
    SHORTER = "shorter"


@dataclass(frozen=True, slots=True)
class EconoServeConfig:
    """The policy's constants.

    Attributes:
        capacity_tokens: size of the KVC.
        tfs_tokens: target forward size: decode and prompt tokens of one forward pass.
        reserve_fraction: share of the KVC kept for responses that outlive their prediction.
        parked_fraction: share of the KVC for prompts whose response does not fit yet.
        window_s: deadlines closer than this count as equal.
        best_effort_s: deadline assumed for requests without an SLO, from arrival.
        starvation_s: a task that waited this long lets nobody past it.
        lead_tokens: a promise is renewed when so little of it is left.
        length_order: which length goes first within a window.
    """

    capacity_tokens: int
    tfs_tokens: int = 512
    reserve_fraction: float = 0.02
    parked_fraction: float = 0.2
    window_s: float = 1.0
    best_effort_s: float = 10.0
    starvation_s: float = 30.0
    lead_tokens: int = 8
    length_order: LengthOrder = LengthOrder.SHORTER


class EconoServe(BookedPolicy):
    """The policy; ``core.policy.Policy`` describes its methods."""

    def __init__(self, config: EconoServeConfig) -> None:
        self.config = config
        self._sign = -1 if config.length_order is LengthOrder.LONGER else 1
        capacity = config.capacity_tokens
        ledger = ExactLedger(capacity, int(capacity * config.reserve_fraction))
        super().__init__(Books(ledger, self._pt_key, self._gt_key))

    def plan(self, view: View) -> IterationPlan:
        """See ``Policy.plan``."""
        draft = Draft(view, self.books)
        self._keep_promises(draft)
        self._resume(view, draft)
        self._prefill(view, draft)
        return draft.plan()

    def _keep_promises(self, draft: Draft) -> None:
        """Renew the promises that run out; where nothing is left, the least urgent gives way."""
        short = []
        for state in self.books.running.values():
            if (promised := draft.promised_tokens(state)) > self.config.lead_tokens:
                continue
            owed = state.response_left_tokens
            if owed - promised <= draft.free_tokens:
                if owed > promised:
                    draft.promise(state, owed)
            elif promised == 0:
                short.append(state)
        for state in sorted(short, key=self._urgency):
            while draft.free_tokens < 1 and not draft.is_leaving(state):
                holders = [*self.books.running.values(), *self.books.ready]
                victims = [holder for holder in holders if not draft.is_leaving(holder)]
                if len(victims) == 1 and not self.books.prefilling:
                    break  # Alone: the pool holds any single request to its end.
                draft.recompute(max(victims, key=self._urgency))
            if not draft.is_leaving(state):
                draft.promise(state, 1)

    def _resume(self, view: View, draft: Draft) -> None:
        """Let GTs join whose whole predicted response fits."""
        skipped = 0
        for state in self.books.ready:
            if draft.decoding >= view.max_running:
                return
            promised = draft.promised_tokens(state)
            owed = max(state.response_left_tokens, promised, 1)
            waits = owed > promised and (draft.blocked or skipped == SCAN)
            if draft.is_leaving(state) or waits:
                continue
            idle = draft.decoding == 0 and not self.books.prefilling
            if idle and owed - promised > draft.free_tokens:
                self._make_room(state, owed - promised, draft)
                owed = max(min(owed, promised + draft.free_tokens), 1)
            elif not idle and owed - promised > max(draft.admissible_tokens, 0):
                draft.blocked = self._starves(state, view)
                skipped += 1
                continue
            draft.resume(state, owed)

    def _make_room(self, head: TaskState, tokens: int, draft: Draft) -> None:
        """With nothing running, parked tasks give way, last first, so that the head can run."""
        for state in reversed(self.books.ready):
            if draft.free_tokens >= tokens:
                return
            if state is not head and not draft.is_leaving(state):
                draft.recompute(state)

    def _prefill(self, view: View, draft: Draft) -> None:
        """Fill the forward pass with prompts, first the one that is under way."""
        config = self.config
        budget = max(config.tfs_tokens - draft.decoding, config.tfs_tokens // 8, 1)
        for state in self.books.prefilling.values():
            tokens = min(state.prompt_left_tokens, budget)
            draft.prefill(state, tokens)
            budget -= tokens
        rows = view.free_rows
        parkable_tokens = int(config.parked_fraction * config.capacity_tokens)
        parkable_tokens -= self._parked_tokens(draft)
        skipped = 0
        for state in self.books.waiting:
            alone = draft.empty and len(self.ledger) == 0
            room = draft.admissible_tokens
            if min(budget, rows) < 1 or skipped == SCAN or draft.blocked:
                return
            if room < 1 and not alone:
                return
            if skipped >= EXACT and state.task.prompt_tokens > room:
                skipped += 1
                continue
            cached = view.cached_prefix(state.task.rid)
            prompt = state.task.prompt_tokens - cached.tokens
            taken = prompt + cached.evictable_tokens
            whole = taken + max(state.response_left_tokens, 1)
            if whole <= room:
                promised = whole
            elif alone:
                promised = min(whole, max(draft.free_tokens, taken))
            elif state.task.parkable and taken <= min(room, parkable_tokens):
                promised = taken
                parkable_tokens -= taken
            else:
                draft.blocked = self._starves(state, view)
                skipped += 1
                continue
            # What others pin costs nothing, but the claim will count it as held.
            draft.promise(state, promised + (shared := cached.tokens - cached.evictable_tokens))
            draft.free_tokens += shared
            tokens = min(prompt, budget)
            draft.prefill(state, tokens)
            budget -= tokens
            rows -= 1

    def _parked_tokens(self, draft: Draft) -> int:
        """KVC of prompts that were started without their response being promised."""
        started = [*self.books.ready, *self.books.prefilling.values()]
        return sum(
            state.prefilled_tokens + state.prompt_left_tokens
            for state in started
            if not draft.is_leaving(state)
            and draft.promised_tokens(state) <= state.prompt_left_tokens
        )

    def _starves(self, state: TaskState, view: View) -> bool:
        return view.now_s - state.task.arrival_s > self.config.starvation_s

    def _deadline_s(self, state: TaskState, generating: bool) -> float:
        task, slo = state.task, state.task.slo
        limits = [] if slo.e2e_s is None else [slo.e2e_s]
        if generating and slo.tpot_s is not None:
            limits.append((slo.ttft_s or 0.0) + slo.tpot_s * task.prediction.tokens)
        elif not generating and slo.ttft_s is not None:
            limits.append(slo.ttft_s)
        return task.arrival_s + min(limits, default=self.config.best_effort_s)

    def _urgency(self, state: TaskState) -> tuple[float, int]:
        return (self._deadline_s(state, generating=True), state.number)

    def _pt_key(self, state: TaskState) -> tuple[float, int, int]:
        window = self._deadline_s(state, generating=False) // self.config.window_s
        return (window, self._sign * state.task.prompt_tokens, state.number)

    def _gt_key(self, state: TaskState) -> tuple[float, int, int, int]:
        """Urgency window, then held KVC (by powers of two, larger first), then RL."""
        window = self._deadline_s(state, generating=True) // self.config.window_s
        held = self.ledger[state.task.rid].held_tokens.bit_length()
        return (window, -held, self._sign * state.response_left_tokens, state.number)
