"""A plan in the making: the KVC as it changes with each decision.

Owns nothing beyond one call of ``plan``; the ledger and the books stay as they are.
"""

import math
from dataclasses import dataclass

from econoserve.core.books import Books, TaskState
from econoserve.core.types import IterationPlan, Preemption, Promise, View

NOTHING = IterationPlan()
"""Of most iterations: all that run decode."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What starting a waiting prompt takes.

    Attributes:
        tokens: prompt tokens to compute.
        pinned_tokens: cached tokens that nobody else holds.
        now_tokens: those to compute in this iteration.
    """

    tokens: int
    pinned_tokens: int
    now_tokens: int

    @property
    def taken_tokens(self) -> int:
        """KVC that it takes until its prompt is done."""
        return self.tokens + self.pinned_tokens

    @property
    def done(self) -> bool:
        """Whether this iteration computes all of it."""
        return self.now_tokens == self.tokens


class Draft:
    """Decisions taken so far in this iteration, and what KVC they leave.

    Args:
        view: the machine now.
        books: the live tasks and their claims.

    Attributes:
        trial: what the ledger still admits after these decisions.
        free_tokens: KVC that can be had physically in this iteration, whoever it is promised to.
        decoding: tasks that decode in this iteration.
        committed: tasks that decode, or will as soon as their prompt is done.
        rows: further requests that may hold KVC.
        tpot_s: the tightest TPOT objective of those that decode; infinity without one.
        blocked: a task waited too long; nobody may pass it.
        gts_wait: a GT did not fit.
        parked_tokens: KVC of prompts started here whose response is promised nothing yet.
        longest_parked_tokens: the longest response among those.
        early_tokens: 1 where those that run may sit this pass out: prompts of it would decode a
            step earlier than otherwise, beside what runs, and with 1 token more a claim covers
            both.
    """

    def __init__(self, view: View, books: Books) -> None:
        self.trial = books.ledger.trial(view.used_tokens)
        self.decoding = len(books.running)
        self.free_tokens = view.capacity_tokens - view.used_tokens - self.decoding
        self.committed = self.decoding + len(books.starting) + len(books.prefilling)
        self.rows = view.free_rows
        self.tpot_s = next(iter(books.running_tpots_s), math.inf)
        self.blocked = False
        self.gts_wait = False
        self.parked_tokens = 0
        self.longest_parked_tokens = 0
        self.early_tokens = 0
        self._books = books
        self._released = view.released
        self._promises: dict[str, Promise] = {}
        self._resume: list[str] = []
        self._prefill: list[tuple[str, int]] = []
        self._preempt: dict[str, Preemption] = {}
        self._reject: list[tuple[str, str]] = []
        self._demote: list[str] = []
        self._pauses = False
        self._passed: dict[str, None] = {}
        self._too_much: list[tuple[int, int]] = []

    @property
    def idle(self) -> bool:
        """Whether nothing is to run so far."""
        return not self.decoding and not self._prefill

    @property
    def prompts(self) -> list[str]:
        """Ids of the prompts in the pass so far."""
        return [rid for rid, _ in self._prefill]

    def pause(self) -> None:
        """Let those that run sit this pass out."""
        self._pauses = True

    def fits(self, tokens: int, response: tuple[int, ...]) -> bool:
        """Whether a new claim can be admitted; what is more than was too much is not tried.

        Admissions only ever leave less; when somebody gives way, all is tried again.

        Args:
            tokens: KVC that it takes soon and keeps.
            response: equally likely lengths that it then decodes, ascending; may be empty.

        Returns:
            ``True`` if it fits.
        """
        if not response:
            return self.trial.fits(tokens, ())
        length = sum(response)
        if any(tokens >= refused and length >= longer for refused, longer in self._too_much):
            return False
        fits = self.trial.fits(tokens, response)
        if not fits:
            self._too_much.append((tokens, length))
        return fits

    def extend(self, state: TaskState, response: tuple[int, ...]) -> None:
        """Replace what a decoding task is owed, whether or not there is room.

        Args:
            state: a task whose claim decodes.
            response: equally likely remaining lengths, ascending.
        """
        host = self.trial.extend(state.task.rid, response)
        self._promise(state, 0, response, host)

    def resume(self, state: TaskState, response: tuple[int, ...]) -> None:
        """Let a GT join the batch and promise it its response.

        Args:
            state: a task in the GT queue.
            response: equally likely remaining lengths, ascending.
        """
        if state.offloaded_tokens:
            # It decodes in this step, one earlier than what ``take`` is for.
            host = self.trial.take(
                state.task.rid, state.offloaded_tokens + 1, tuple(left - 1 for left in response)
            )
            self.free_tokens -= state.offloaded_tokens
            self.rows -= 1
        else:
            host = self.trial.start(state.task.rid, response)
        self._promise(state, state.offloaded_tokens, response, host)
        self.committed += 1
        self.join(state)

    def fits_back(self, state: TaskState) -> bool:
        """Whether an offloaded GT may come back.

        Args:
            state: a task in the GT queue whose KVC lies in host memory.

        Returns:
            ``True`` if what it held and its response fit, and its slots are free now.
        """
        response = tuple(left - 1 for left in state.needed)
        enough = state.offloaded_tokens < self.free_tokens and self.rows > 0
        return enough and self.trial.fits(state.offloaded_tokens + 1, response)

    def join(self, state: TaskState) -> None:
        """Let a GT join the batch that was promised its response before.

        Args:
            state: a task in the GT queue.
        """
        self._resume.append(state.task.rid)
        self.tpot_s = min(self.tpot_s, state.task.slo.tpot_s or math.inf)
        self.decoding += 1
        self.free_tokens -= 1

    def admit(self, state: TaskState, prompt: "Prompt", response: tuple[int, ...]) -> None:
        """Start a prompt that is computed in one pass, and promise its response from then on.

        Args:
            state: a task in the PT queue.
            prompt: what it takes.
            response: equally likely lengths, ascending.
        """
        taken = prompt.taken_tokens + self.early_tokens
        host = self.trial.take(state.task.rid, taken, response)
        self.committed += 1
        self._start(state, prompt, response, host)

    def reserve(self, state: TaskState, prompt: "Prompt", response: tuple[int, ...]) -> None:
        """Start a prompt of several passes, and keep the KVC for its response meanwhile.

        Args:
            state: a task in the PT queue.
            prompt: what it takes.
            response: equally likely lengths, ascending.
        """
        self.trial.take(state.task.rid, prompt.taken_tokens + response[-1], ())
        self.committed += 1
        self._start(state, prompt, response, None)

    def park(self, state: TaskState, prompt: "Prompt", response: tuple[int, ...]) -> None:
        """Start a prompt whose response is promised nothing yet.

        Args:
            state: a task in the PT queue.
            prompt: what it takes.
            response: equally likely lengths that it will need, ascending.
        """
        self.trial.take(state.task.rid, prompt.taken_tokens, ())
        self.parked_tokens += prompt.taken_tokens
        self.longest_parked_tokens = max(self.longest_parked_tokens, response[-1])
        self._start(state, prompt, (), None)

    def prefill(self, state: TaskState, tokens: int) -> None:
        """Put prompt tokens into the forward pass.

        Args:
            state: a task whose prompt is unfinished.
            tokens: how many, at least 1.
        """
        self._prefill.append((state.task.rid, tokens))
        self.free_tokens -= tokens

    def prefill_more(self, state: TaskState, tokens: int) -> None:
        """Add to the prompt tokens that come first in the forward pass.

        Args:
            state: the task that ``prefill`` was called for first.
            tokens: how many more.
        """
        rid, planned = self._prefill[0]
        assert rid == state.task.rid
        tokens = min(tokens, self.free_tokens)
        self._prefill[0] = (rid, planned + tokens)
        self.free_tokens -= tokens

    def preempt(self, state: TaskState, how: Preemption) -> None:
        """Take a task's KVC back; its prefix that came from the cache may stay in use.

        Args:
            state: a task in the GT queue or running.
            how: ``RECOMPUTE`` or ``OFFLOAD``.
        """
        rid = state.task.rid
        self.trial.release(rid)
        self._too_much.clear()
        released = self._released(rid)
        held = self._books.ledger.held_by(rid)
        self.free_tokens += held - state.cached_tokens if released is None else released
        if rid in self._books.running or rid in self._books.starting:
            self.committed -= 1
        if rid in self._books.running:
            self.decoding -= 1
            self.free_tokens += 1
        self._promises.pop(rid, None)
        self._preempt[rid] = how

    def reject(self, state: TaskState, reason: str) -> None:
        """Refuse a waiting task.

        Args:
            state: a task in the PT queue.
            reason: a sentence for its sender.
        """
        self._reject.append((state.task.rid, reason))
        self._passed[state.task.rid] = None

    def demote(self, state: TaskState) -> None:
        """Let a waiting task go on as best effort, from the next plan on.

        Args:
            state: a task in the PT queue.
        """
        self._demote.append(state.task.rid)
        self._passed[state.task.rid] = None

    def is_out(self, state: TaskState) -> bool:
        """Whether this plan preempts, rejects or demotes a task.

        Args:
            state: the task.

        Returns:
            ``True`` if nothing else may be decided about it.
        """
        return state.task.rid in self._preempt or state.task.rid in self._passed

    def plan(self) -> IterationPlan:
        """The decisions as a plan.

        Returns:
            The plan.
        """
        if not (self._prefill or self._resume or self._preempt or self._promises or self._passed):
            return NOTHING
        return IterationPlan(
            prefill=tuple(self._prefill),
            resume=tuple(self._resume),
            preempt=tuple(self._preempt.items()),
            reject=tuple(self._reject),
            demote=tuple(self._demote),
            promises=tuple(self._promises.values()),
            pauses=self._pauses,
        )

    def _start(
        self, state: TaskState, prompt: "Prompt", response: tuple[int, ...], host: str | None
    ) -> None:
        self._promise(state, prompt.tokens, response, host)
        self.free_tokens -= prompt.pinned_tokens
        self.rows -= 1
        self.prefill(state, prompt.now_tokens)

    def _promise(
        self, state: TaskState, tokens: int, response: tuple[int, ...], host: str | None
    ) -> None:
        self._promises[state.task.rid] = Promise(state.task.rid, tokens, response, host)
