"""An instance that computes prompts and keeps their KVC until it is fetched.

Owns the prompts from their arrival until then; ``sim.disaggregated`` says whose rules these are.
"""

from collections import deque
from collections.abc import Callable

from econoserve.sim.cluster import NEVER_S, Clock
from econoserve.sim.records import KvcUse
from econoserve.sim.stages import Job, Meter, Pipeline, StageMachine, blocks_of
from econoserve.sim.timing import Pass

MOST_PROMPTS = 128
MOST_PROMPT_TOKENS = 8192
"""Limits of a batch in DistServe's released evaluation. A longer prompt is computed alone: ours."""

HOP_S = 1e-3
"""Times the stages of a pipeline of two or more: what each takes longer (``simdistserve``)."""


class PrefillServer:
    """Computes whole prompts, first come, first served.

    Args:
        machine: what it has.
        clock: wakes it.
        number: its number there.
        begin_s: when the run begins.
        hand_over: takes a prompt whose first token is out; this server holds its KVC until
            ``fetched`` is called, unless that token was the last.
    """

    def __init__(
        self,
        machine: StageMachine,
        clock: Clock,
        number: int,
        begin_s: float,
        hand_over: Callable[["PrefillServer", Job, float], bool],
    ) -> None:
        self._machine, self._clock, self._number = machine, clock, number
        self._hand_over = hand_over
        self._meter = Meter(machine.capacity_tokens, begin_s)
        self._pipeline = Pipeline(machine.stages)
        self._waiting: deque[Job] = deque()
        self._passing: deque[tuple[float, list[Job]]] = deque()
        self._free_blocks = machine.blocks

    @property
    def load(self) -> int:
        """Requests that wait or are computed."""
        return len(self._waiting) + sum(len(batch) for _, batch in self._passing)

    @property
    def use(self) -> KvcUse:
        """How its KVC was used so far."""
        return self._meter.use

    def add(self, job: Job, now_s: float) -> None:
        """Take a request.

        Args:
            job: whose prompt fits into its KVC.
            now_s: the time.
        """
        self._waiting.append(job)
        self._clock.wake(self._number, max(now_s, self._pipeline.free_s))

    def fetched(self, job: Job, now_s: float) -> None:
        """Free the KVC of a prompt that has been fetched.

        Args:
            job: the request.
            now_s: the time.
        """
        self._meter.count(now_s)
        self._meter.held -= job.request.features.prompt_tokens
        self._free_blocks += blocks_of(job.request.features.prompt_tokens)
        if self._waiting:
            self._clock.wake(self._number, max(now_s, self._pipeline.free_s))

    def step(self, now_s: float) -> None:
        """See ``sim.cluster.Server``."""
        self._meter.count(now_s)
        while self._passing and self._passing[0][0] <= now_s:
            self._land(self._passing.popleft()[1], now_s)
        machine = self._machine
        while self._pipeline.free_s <= now_s and len(self._passing) < machine.stages:
            batch = self._take()
            if not batch:
                break
            tokens = [job.request.features.prompt_tokens for job in batch]
            squares = sum(count**2 for count in tokens)
            pass_s = machine.time.seconds(Pass(len(batch), sum(tokens), squares, squares))
            hop_s = HOP_S * machine.stages if machine.stages > 1 else 0.0
            stage_s = pass_s / machine.stages + hop_s
            end_s = self._pipeline.enter(now_s, stage_s, machine.overhead_s)
            self._passing.append((end_s, batch))
            self._meter.held += sum(tokens)
            self._meter.useful += sum(tokens)
        wake_s = self._passing[0][0] if self._passing else NEVER_S
        if self._waiting and now_s < self._pipeline.free_s:
            wake_s = min(wake_s, self._pipeline.free_s)
        if wake_s < NEVER_S:
            self._clock.wake(self._number, wake_s)

    def close(self, now_s: float) -> None:
        """See ``sim.cluster.Server``."""
        self._meter.count(now_s)

    def _take(self) -> list[Job]:
        """The next batch; its blocks are taken."""
        batch: list[Job] = []
        tokens = 0
        while self._waiting and len(batch) < MOST_PROMPTS:
            prompt_tokens = self._waiting[0].request.features.prompt_tokens
            if batch and tokens + prompt_tokens > MOST_PROMPT_TOKENS:
                break
            if blocks_of(prompt_tokens) > self._free_blocks:
                break
            self._free_blocks -= blocks_of(prompt_tokens)
            tokens += prompt_tokens
            batch.append(self._waiting.popleft())
        return batch

    def _land(self, batch: list[Job], now_s: float) -> None:
        """End a batch: its first tokens are out."""
        for job in batch:
            job.produced = 1
            job.record.first_token_s = now_s
            self._meter.useful -= job.request.features.prompt_tokens
            if not self._hand_over(self, job, now_s):
                self.fetched(job, now_s)
