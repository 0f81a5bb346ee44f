"""EconoServe, first version: decoupled PT and GT queues on exact allocation (arXiv 2411.06364).

Each iteration keeps the promises made to running GTs, resumes GTs whose whole predicted response
fits, then fills the forward pass with prompts up to the TFS. All constants are ours.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from econoserve.core.books import Books, TaskState
from econoserve.core.ledger import ExactLedger
from econoserve.core.types import IterationPlan, Launch, Preemption, Task, View

SCAN = 64
"""Queued tasks looked at behind one that does not fit; bounds the cost of a plan."""


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
        parked_fraction: share of the KVC that prompts may hold while their response does not
            fit yet; 0 starts no such prompt.
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
    length_order: LengthOrder = LengthOrder.LONGER


class _Draft:
    """A plan in the making: the ledger's figures as they change with each decision."""

    def __init__(self, view: View, ledger: ExactLedger) -> None:
        self.free_tokens = ledger.free_tokens(view.used_tokens)
        self.promises: dict[str, int] = {}
        self.resume: list[str] = []
        self.prefill: list[tuple[str, int]] = []
        self.preempt: dict[str, Preemption] = {}
        self.blocked = False

    def promise(self, rid: str, tokens: int, formerly: int) -> None:
        self.promises[rid] = tokens
        self.free_tokens -= tokens - formerly


class EconoServe:
    """The policy; see ``econoserve.core.policy.Policy`` for the interface.

    Args:
        config: its constants.
    """

    def __init__(self, config: EconoServeConfig) -> None:
        self.config = config
        reserve = int(config.capacity_tokens * config.reserve_fraction)
        self.ledger = ExactLedger(config.capacity_tokens, reserve)
        self.books = Books(self.ledger, self._pt_key, self._gt_key)
        self._sign = -1 if config.length_order is LengthOrder.LONGER else 1

    def add(self, task: Task) -> None:
        """See ``Policy.add``."""
        self.books.add(task)

    def on_launch(self, plan: IterationPlan, launch: Launch) -> None:
        """See ``Policy.on_launch``."""
        for rid, tokens in plan.promises:
            if rid in self.books:
                self.ledger.promise(rid, tokens)
        self.books.on_launch(launch)

    def on_tokens(self, rid: str, tokens: int) -> None:
        """See ``Policy.on_tokens``."""
        self.books.on_tokens(rid, tokens)

    def remove(self, rid: str) -> None:
        """See ``Policy.remove``."""
        self.books.remove(rid)

    def plan(self, view: View) -> IterationPlan:
        """See ``Policy.plan``."""
        draft = _Draft(view, self.ledger)
        self._keep_promises(draft)
        self._resume(view, draft)
        self._prefill(view, draft)
        return IterationPlan(
            prefill=tuple(draft.prefill),
            resume=tuple(draft.resume),
            preempt=tuple(draft.preempt.items()),
            promises=tuple(draft.promises.items()),
        )

    def _keep_promises(self, draft: _Draft) -> None:
        """Renew the promises that run out; where nothing is left, the least urgent gives way."""
        short = []
        for rid, state in self.books.running.items():
            promised = self.ledger[rid].promised_tokens
            if promised > self.config.lead_tokens:
                continue
            owed = state.response_left_tokens
            if owed - promised <= draft.free_tokens:
                if owed > promised:
                    draft.promise(rid, owed, promised)
            elif promised == 0:
                short.append(state)
        for state in sorted(short, key=self._urgency):
            rid = state.task.rid
            while draft.free_tokens < 1 and rid not in draft.preempt:
                victims = [*self.books.running.values(), *self.books.ready]
                victims = [v for v in victims if v.task.rid not in draft.preempt]
                if len(victims) == 1 and not self.books.prefilling:
                    break  # Alone: the pool holds any single request to its end.
                self._preempt(max(victims, key=self._urgency), draft)
            if rid not in draft.preempt:
                draft.promise(rid, 1, 0)

    def _resume(self, view: View, draft: _Draft) -> None:
        """Let GTs join whose whole predicted response fits."""
        running = self._still_running(draft)
        idle = running <= 0 and not self.books.prefilling
        for scanned, state in enumerate(self.books.ready):
            rid = state.task.rid
            if running >= view.max_running or scanned == SCAN or draft.blocked:
                return
            if rid in draft.preempt:
                continue
            promised = self.ledger[rid].promised_tokens
            owed = max(state.response_left_tokens, 1)
            room = draft.free_tokens - (0 if idle else self.ledger.reserve_tokens)
            if idle and owed - promised > room:
                room = self._make_room(state, owed - promised, draft)
                owed = min(owed, promised + max(room, 1))
            if owed - promised > max(room, 0):
                draft.blocked = self._starves(state, view)
                continue
            draft.promise(rid, max(owed, promised), promised)
            draft.resume.append(rid)
            running += 1
            idle = False

    def _make_room(self, head: TaskState, tokens: int, draft: _Draft) -> int:
        """With nothing running, parked tasks give way, last first, so that the head can run."""
        for state in reversed(self.books.ready):
            if draft.free_tokens >= tokens:
                break
            if state is not head and state.task.rid not in draft.preempt:
                self._preempt(state, draft)
        return draft.free_tokens

    def _prefill(self, view: View, draft: _Draft) -> None:
        """Fill the forward pass with prompts, first the one that is under way."""
        config = self.config
        decoding = self._still_running(draft) + len(draft.resume)
        budget = max(config.tfs_tokens - decoding, config.tfs_tokens // 8, 1)
        for state in self.books.prefilling.values():
            tokens = min(state.prompt_left_tokens, budget)
            draft.prefill.append((state.task.rid, tokens))
            budget -= tokens
        rows = view.free_rows
        parked_tokens = self._parked_tokens(draft)
        for scanned, state in enumerate(self.books.waiting):
            if budget < 1 or rows < 1 or scanned == SCAN or draft.blocked:
                return
            rid = state.task.rid
            cached = view.cached_prefix(rid)
            prompt = state.task.prompt_tokens - cached.tokens
            pinned = prompt + cached.evictable_tokens
            response = max(state.response_left_tokens, 1)
            room = draft.free_tokens - self.ledger.reserve_tokens
            alone = not draft.prefill and not draft.resume and len(self.ledger) == 0
            if pinned + response <= room:
                promised = pinned + response
            elif alone:
                promised = min(pinned + response, max(draft.free_tokens, pinned))
            elif (
                state.task.parkable
                and pinned <= room
                and parked_tokens + pinned <= config.parked_fraction * config.capacity_tokens
            ):
                promised = pinned
                parked_tokens += pinned
            else:
                draft.blocked = self._starves(state, view)
                continue
            # A cached prefix that others pin costs nothing, but the claim takes it as held.
            draft.promise(rid, promised, 0)
            draft.promises[rid] += cached.tokens - cached.evictable_tokens
            tokens = min(prompt, budget)
            draft.prefill.append((rid, tokens))
            budget -= tokens
            rows -= 1

    def _parked_tokens(self, draft: _Draft) -> int:
        """KVC held by prompts whose response is not promised."""
        idle = [*self.books.ready, *self.books.prefilling.values()]
        return sum(
            self.ledger[state.task.rid].held_tokens + state.prompt_left_tokens
            for state in idle
            if state.task.rid not in draft.promises
            and self.ledger[state.task.rid].promised_tokens <= state.prompt_left_tokens
        )

    def _preempt(self, state: TaskState, draft: _Draft) -> None:
        claim = self.ledger[state.task.rid]
        draft.preempt[state.task.rid] = Preemption.RECOMPUTE
        promised = draft.promises.pop(state.task.rid, claim.promised_tokens)
        draft.free_tokens += promised + claim.held_tokens - state.cached_tokens

    def _still_running(self, draft: _Draft) -> int:
        return len(self.books.running) - sum(rid in self.books.running for rid in draft.preempt)

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

    def _pt_key(self, state: TaskState) -> Any:
        window = self._deadline_s(state, generating=False) // self.config.window_s
        return (window, self._sign * state.task.prompt_tokens, state.number)

    def _gt_key(self, state: TaskState) -> Any:
        """Urgency window, then held KVC (by powers of two, larger first), then RL."""
        window = self._deadline_s(state, generating=True) // self.config.window_s
        held = self.ledger[state.task.rid].held_tokens.bit_length()
        return (window, -held, self._sign * state.response_left_tokens, state.number)
