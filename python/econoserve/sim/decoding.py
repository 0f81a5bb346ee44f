"""An instance that fetches the KVC of prompts and generates their responses.

Owns the requests from there to their ends; ``sim.disaggregated`` says whose rules these are.
"""

from collections import deque
from collections.abc import Callable

from econoserve.sim.cluster import NEVER_S, Clock
from econoserve.sim.prefilling import PrefillServer
from econoserve.sim.records import KvcUse
from econoserve.sim.stages import BLOCK_TOKENS, Job, Meter, Pipeline, StageMachine, blocks_of
from econoserve.sim.timing import Pass

WAITING_SHARE = 0.05
"""Share of the blocks below which waiting prompts let another one be fetched: DistServe's."""


class DecodeBatch:
    """Requests that decode together. An iteration costs time in proportion to what changes.

    Attributes:
        running: by id, in the order of joining.
        context: tokens of KVC that they hold.
        passing: whether an iteration is under way.
    """

    def __init__(self) -> None:
        self.running: dict[str, Job] = {}
        self.context = 0
        self.passing = False
        self._iteration = 0
        self._ending: dict[int, dict[str, Job]] = {}
        # Requests that open a block in an iteration, by its number modulo the size of a block.
        self._opening = [0] * BLOCK_TOKENS

    @property
    def opening(self) -> int:
        """Blocks that the next iteration needs."""
        return self._opening[self._iteration % BLOCK_TOKENS]

    def join(self, job: Job) -> None:
        """Let a request run from the next iteration on.

        Args:
            job: the request, with part of its response to come.
        """
        job.joined = self._iteration
        job.ends = self._iteration + job.request.output_tokens - job.produced - 1
        self.running[job.record.rid] = job
        self._ending.setdefault(job.ends, {})[job.record.rid] = job
        self._opening[(job.joined - job.held) % BLOCK_TOKENS] += 1
        self.context += job.held

    def leave(self, job: Job) -> None:
        """Let a request stop between two iterations.

        Args:
            job: a running request; it keeps what it holds.
        """
        rid = job.record.rid
        del self.running[rid]
        del self._ending[job.ends][rid]
        if not self._ending[job.ends]:
            del self._ending[job.ends]
        self._opening[(job.joined - job.held) % BLOCK_TOKENS] -= 1
        steps = self._iteration - job.joined
        job.held += steps
        job.produced += steps
        self.context -= job.held

    def begin(self) -> Pass:
        """Begin an iteration: every request takes a token of KVC.

        Returns:
            What it computes.
        """
        self.passing = True
        self.context += len(self.running)
        return Pass(decoding=len(self.running), context_tokens=self.context)

    def end(self) -> list[Job]:
        """End the iteration.

        Returns:
            Requests that produced their last token in it, and have left.
        """
        self.passing = False
        ended = list(self._ending.get(self._iteration, {}).values())
        self._iteration += 1
        for job in ended:
            self.leave(job)
        return ended


class DecodeServer:
    """Decodes what prefill servers hand over, first come, first served.

    Args:
        machine: what it has.
        clock: wakes it.
        number: its number there.
        begin_s: when the run begins.
        finish: takes requests that have ended.
    """

    def __init__(
        self,
        machine: StageMachine,
        clock: Clock,
        number: int,
        begin_s: float,
        finish: Callable[[Job, float], None],
    ) -> None:
        self._machine, self._clock, self._number = machine, clock, number
        self._finish = finish
        self._meter = Meter(machine.capacity_tokens, begin_s)
        self._pipeline = Pipeline(machine.stages)
        self._batches = [DecodeBatch() for _ in range(machine.stages)]
        self._turn = 0
        self._passing: deque[tuple[float, DecodeBatch]] = deque()
        # On their prefill servers; being fetched; here, without a token decoded; in host memory.
        self._offered: deque[tuple[PrefillServer, Job]] = deque()
        self._fetching: deque[tuple[float, PrefillServer, Job]] = deque()
        self._waiting: deque[Job] = deque()
        self._swapped: deque[Job] = deque()
        self._link_free_s = 0.0
        self._free_blocks = machine.blocks
        # Blocks of prompts that wait here or are being fetched, and the tokens in them.
        self._waiting_blocks = self._waiting_tokens = 0
        self.load = 0

    @property
    def use(self) -> KvcUse:
        """How its KVC was used so far."""
        return self._meter.use

    def offer(self, source: PrefillServer, job: Job, now_s: float) -> None:
        """Take a request whose first token is out.

        Args:
            source: where its KVC is.
            job: the request.
            now_s: the time.
        """
        self.load += 1
        self._offered.append((source, job))
        self._clock.wake(self._number, now_s)

    def step(self, now_s: float) -> None:
        """See ``sim.cluster.Server``."""
        self._meter.count(now_s)
        while self._passing and self._passing[0][0] <= now_s:
            self._land(self._passing.popleft()[1], now_s)
        while self._fetching and self._fetching[0][0] <= now_s:
            _, source, job = self._fetching.popleft()
            source.fetched(job, now_s)
            self._waiting.append(job)
        self._fetch(now_s)
        if self._pipeline.free_s <= now_s:
            self._launch(now_s)
            # Those that joined wait no more, so others may come.
            self._fetch(now_s)
        self._meter.useful = sum(batch.context for batch in self._batches)
        self._meter.held = self._meter.useful + self._waiting_tokens
        self._wake(now_s)

    def close(self, now_s: float) -> None:
        """See ``sim.cluster.Server``."""
        self._meter.count(now_s)

    def _wake(self, now_s: float) -> None:
        """Ask to be woken when something changes next."""
        wake_s = NEVER_S
        if self._passing:
            wake_s = self._passing[0][0]
            if now_s < self._pipeline.free_s:
                wake_s = min(wake_s, self._pipeline.free_s)
        if self._fetching:
            wake_s = min(wake_s, self._fetching[0][0])
        if wake_s < NEVER_S:
            self._clock.wake(self._number, wake_s)

    def _fetch(self, now_s: float) -> None:
        """Begin to fetch prompts for which there are blocks."""
        machine = self._machine
        while self._offered and self._waiting_blocks < WAITING_SHARE * machine.blocks:
            source, job = self._offered[0]
            if blocks_of(job.held) > self._free_blocks:
                break
            self._offered.popleft()
            self._free_blocks -= blocks_of(job.held)
            self._waiting_blocks += blocks_of(job.held)
            self._waiting_tokens += job.held
            begin_s = max(now_s, self._link_free_s)
            self._link_free_s = begin_s + job.held * machine.link_s_per_token
            self._fetching.append((self._link_free_s, source, job))

    def _launch(self, now_s: float) -> None:
        """Start an iteration of the batch whose turn it is; turns of empty ones pass."""
        for _ in self._batches:
            batch = self._batches[self._turn]
            if batch.passing:
                return
            moved = self._make_room(batch)
            moved += self._admit(batch)
            self._turn = (self._turn + 1) % len(self._batches)
            if not batch.running:
                continue
            self._free_blocks -= batch.opening
            machine = self._machine
            stage_s = machine.time.seconds(batch.begin()) / machine.stages
            wait_s = moved * machine.move_s_per_token + machine.overhead_s
            self._passing.append((self._pipeline.enter(now_s, stage_s, wait_s), batch))
            return

    def _make_room(self, batch: DecodeBatch) -> int:
        """Move the last to join to host memory until the rest can grow; tokens that are moved."""
        moved = 0
        while batch.opening > self._free_blocks:
            job = next(reversed(batch.running.values()))
            batch.leave(job)
            self._free_blocks += blocks_of(job.held)
            job.record.preemptions += 1
            self._swapped.append(job)
            moved += job.held
        return moved

    def _admit(self, batch: DecodeBatch) -> int:
        """Let requests join, those in host memory first; tokens that are moved."""
        moved = 0
        while len(batch.running) < self._machine.max_running and (self._swapped or self._waiting):
            queue = self._swapped or self._waiting
            if not self._fits(queue, batch):
                if not self._waiting or any(other.running for other in self._batches):
                    break
                # Nothing that runs will free a block: prompts that wait here hold them.
                queue = self._waiting
                moved += self._clear(batch)
                if not self._fits(queue, batch):
                    break
            job = queue.popleft()
            if queue is self._waiting:
                self._waiting_blocks -= blocks_of(job.held)
                self._waiting_tokens -= job.held
            else:
                self._free_blocks -= blocks_of(job.held)
                moved += job.held
            batch.join(job)
        return moved

    def _fits(self, queue: deque[Job], batch: DecodeBatch) -> bool:
        """Whether there are blocks for the first in a queue to run in a batch."""
        job = queue[0]
        has = blocks_of(job.held) if queue is self._waiting else 0
        return blocks_of(job.held + 1) - has + batch.opening <= self._free_blocks

    def _clear(self, batch: DecodeBatch) -> int:
        """Move the last to wait to host memory until the first can run; tokens that are moved.

        Where prompts are still being fetched one of them may be it, so nothing moves.
        """
        moved = 0
        while not self._fetching and len(self._waiting) > 1:
            if self._fits(self._waiting, batch):
                break
            job = self._waiting.pop()
            self._free_blocks += blocks_of(job.held)
            self._waiting_blocks -= blocks_of(job.held)
            self._waiting_tokens -= job.held
            job.record.preemptions += 1
            self._swapped.append(job)
            moved += job.held
        return moved

    def _land(self, batch: DecodeBatch, now_s: float) -> None:
        """End an iteration."""
        for job in batch.end():
            self._free_blocks += blocks_of(job.held)
            self.load -= 1
            self._finish(job, now_s)
