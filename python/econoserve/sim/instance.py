"""One instance: a policy on a machine whose iterations take a profile's time.

Owns the execution of plans. It knows the true lengths; the policy only ever sees predictions, which
the predictor makes on arrival and learns from when a response has ended.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from econoserve.core.policy import Policy
from econoserve.core.types import (
    CachedPrefix,
    IterationPlan,
    Launch,
    NeverFits,
    Outcome,
    Preemption,
    Prefilled,
    Task,
    View,
)
from econoserve.prediction.predictor import Predictor
from econoserve.prediction.request import fingerprint
from econoserve.sim.machine import Machine, Results
from econoserve.sim.pool import Live, Pool, SimulationError
from econoserve.sim.prefix import PrefixCaching
from econoserve.sim.records import KvcUse, RequestRecord
from econoserve.sim.series import Series
from econoserve.sim.timing import Pass
from econoserve.workload.trace import TraceRequest


def unheard(rid: str, output_tokens: int | None) -> None:
    """The end of a request that nobody waits for."""


class Instance:
    """Runs a policy, one iteration at a time.

    Args:
        machine: what it has.
        policy: new, for a KVC of this size.
        predictor: predicts response lengths; it learns here.
        series: what it did over time goes there, if wanted.

    Attributes:
        records: of all requests that arrived here, by arrival.
        on_end: told of a request that has left, and of the length of its response; ``None`` for
            one that was refused.
    """

    def __init__(
        self,
        machine: Machine,
        policy: Policy,
        predictor: Predictor,
        series: Series | None = None,
    ) -> None:
        self.machine = machine
        self.records: list[RequestRecord] = []
        self.on_end: Callable[[str, int | None], None] = unheard
        self._policy = policy
        self._predictor = predictor
        self._series = series
        self._pool = Pool(machine.capacity_tokens)
        self._live: dict[str, Live] = {}
        # When it began, and the policy's target then, if the series wants it.
        self._launched: tuple[Launch, Pass, float, int | None] | None = None
        self._elapsed_s = 0.0
        # KVC that was moved since the last iteration began; the next one waits for it.
        self._moved = 0
        # What the scheduler does not know yet: who came, and who has ended.
        self._came: list[Live] = []
        self._gone: dict[str, Live] = {}
        # Without a prefix cache, policies see that there is none, as in the engine.
        on = machine.caching is not PrefixCaching.OFF
        self._caching = {"cached_prefix": self._prefix, "released": self._released} if on else {}

    @property
    def busy(self) -> bool:
        """Whether requests wait or run here."""
        return bool(self._live)

    @property
    def use(self) -> KvcUse:
        """How the machine was used so far."""
        return self._pool.use

    @property
    def held_tokens(self) -> int:
        """KVC that is held."""
        return self._pool.used

    def arrive(self, rid: str, request: TraceRequest) -> None:
        """Take a request; what can never fit is refused at once.

        Args:
            rid: its id.
            request: with its true length, which ends its response.
        """
        features = request.features
        record = RequestRecord(
            rid, request.arrival_s, features.prompt_tokens, request.output_tokens, request.slo
        )
        self.records.append(record)
        prediction = self._predictor.predict(features)
        task = Task(rid, request.arrival_s, features.prompt_tokens, prediction, request.slo)
        live = self._live[rid] = Live(request, task, record)
        if self.machine.results is Results.LATE and self._launched is not None:
            self._came.append(live)
        else:
            self._add(live)

    def launch(self, now_s: float) -> float | None:
        """Plan an iteration and start it.

        Args:
            now_s: the time.

        Returns:
            How long it takes; ``None`` if the plan runs nothing.

        Raises:
            SimulationError: the plan needs more KVC than there is.
        """
        machine, pool = self.machine, self._pool
        view = View(
            now_s=now_s,
            capacity_tokens=machine.capacity_tokens,
            used_tokens=pool.used,
            free_rows=machine.rows - pool.holders,
            max_running=machine.max_running,
            **self._caching,
        )
        plan = self._policy.plan(view)
        launch, work, moved = self._follow(plan, now_s)
        if pool.used > machine.capacity_tokens:
            raise SimulationError(
                f"{type(self._policy).__name__} at {now_s:.3f} s: used_tokens={pool.used} of "
                f"capacity_tokens={machine.capacity_tokens}: its plan needs KVC that is not free"
            )
        pool.cache.evict(machine.capacity_tokens - pool.used)
        self._policy.on_launch(plan, launch)
        self._know()
        pool.backlog = len(self._live) > pool.holders
        self._moved += moved
        if not launch.decoded and not launch.prefilled:
            return None
        self._launched = launch, work, now_s, self._target(work, now_s)
        moving_s, self._moved = self._moved * machine.move_s_per_token, 0
        self._elapsed_s = machine.time.seconds(work) + moving_s + machine.overhead_s
        return self._elapsed_s

    def land(self, now_s: float) -> None:
        """End the iteration under way: its tokens are out.

        Args:
            now_s: the time.
        """
        if self._launched is None:
            return
        (launch, work, began_s, tfs_tokens), self._launched = self._launched, None
        elapsed_s = self._elapsed_s
        sitting_out = 0 if launch.decoded else len(self._pool.running)
        self._policy.on_iteration(work.work(sitting_out), elapsed_s)
        if self._series is not None:
            self._sample(launch, work, began_s, tfs_tokens)
        forward_tokens = work.prompt_tokens + work.decoding
        ended = self._pool.end_iteration(elapsed_s, forward_tokens, sitting_out)
        self._policy.on_step(launch.decoded)
        for live in ended:
            self._pool.leave(live)
            self._end(live, now_s)
        for part in launch.prefilled:
            live = self._live[part.rid]
            self._pool.count_prompt(live, elapsed_s)
            if part.done:
                self._share(live)
                self._first_token(live, now_s)
        if len(self._gone) == len(self._live):
            self._know()

    def pass_time(self, elapsed_s: float) -> None:
        """Let time pass without an iteration.

        Args:
            elapsed_s: how long.
        """
        self._pool.backlog = len(self._live) > self._pool.holders
        self._pool.pass_time(elapsed_s)

    def _follow(self, plan: IterationPlan, now_s: float) -> tuple[Launch, Pass, int]:
        """Do what a plan says; what was launched, and tokens of KVC that are moved."""
        pool, moved = self._pool, 0
        parked, offloaded = [], []
        for rid, how in plan.preempt:
            if rid in self._gone:
                # It has ended, which the policy did not know: its KVC is free now.
                self._finish(self._gone.pop(rid))
                continue
            live = self._live[rid]
            if rid in pool.running:
                pool.leave(live)
            if how is Preemption.RECOMPUTE:
                self._recompute(live)
            elif how is Preemption.OFFLOAD:
                live.record.preemptions += 1
                live.offloaded = pool.release(live)
                moved += live.offloaded
                offloaded.append(rid)
            else:
                parked.append(rid)
        for rid, _ in plan.reject:
            live = self._live.pop(rid)
            live.record.outcome, live.record.end_s = Outcome.REJECTED, now_s
            self._policy.remove(rid, Outcome.REJECTED)
            self.on_end(rid, None)
        for rid in plan.resume:
            if rid in self._gone:
                continue
            live = self._live[rid]
            if live.offloaded:
                moved += live.offloaded
                pool.take(live, live.offloaded)
                live.offloaded = 0
            pool.join(live)
        decoded = () if plan.pauses else pool.decode()
        parts, squares, squared = [], 0, 0
        for rid, tokens in plan.prefill:
            live = self._live[rid]
            found = None if live.held else self._find(live)
            tokens = min(tokens, live.task.prompt_tokens - live.held)
            before = live.held
            pool.take(live, tokens)
            squares += live.held**2 - before**2
            squared += tokens * live.held
            done = live.held == live.task.prompt_tokens
            parts.append(Prefilled(rid, tokens, before if found else 0, done, found))
        prompt_tokens = sum(part.tokens for part in parts)
        context, longest = (0, 0) if plan.pauses else (pool.context, pool.longest)
        work = Pass(len(parts), prompt_tokens, squares, squared, len(decoded), context, longest)
        launch = Launch(
            prefilled=tuple(parts),
            resumed=tuple(rid for rid in plan.resume if rid not in self._gone),
            parked=tuple(parked),
            offloaded=tuple(offloaded),
            decoded=decoded,
        )
        return launch, work, moved

    def _target(self, work: Pass, now_s: float) -> int | None:
        """The policy's target forward size for a pass that begins, where the series wants it."""
        target = getattr(self._policy, "tfs_tokens", None)
        if target is None or self._series is None or not self._series.begins(now_s):
            return None
        limits = (live.request.slo.tpot_s for live in self._pool.running.values())
        tpot_s = min((limit for limit in limits if limit is not None), default=math.inf)
        return target(work.decoding, tpot_s)

    def _sample(self, launch: Launch, work: Pass, began_s: float, tfs_tokens: int | None) -> None:
        """Count the iteration under way in the series."""
        pool = self._pool
        prompts = [self._live[rid] for rid in {part.rid: part for part in launch.prefilled}]
        self._series.add(
            began_s,
            self._elapsed_s,
            held=pool.used,
            used=pool.context - pool.found + sum(live.held - live.cached for live in prompts),
            running=work.decoding,
            waiting=max(len(self._live) - pool.holders, 0),
            forward_tokens=work.prompt_tokens + work.decoding,
            tfs_tokens=tfs_tokens,
        )

    def _blocks(self, live: Live, tokens: int) -> tuple[int, ...]:
        """Names of a request's full blocks among its first tokens; of its response, its own."""
        request, caching = live.request, self.machine.caching
        blocks, whole = request.blocks, tokens // request.block_tokens
        if caching is PrefixCaching.BLOCKS and whole > len(blocks):
            # Others have names of 64 bits without a sign.
            first = -(1 + fingerprint(live.task.rid))
            blocks += tuple(first - number for number in range(whole - len(blocks)))
        return blocks[:whole]

    def _cached(self, live: Live) -> tuple[int, ...]:
        """What a request finds in the prefix cache; a token of a prompt is always computed."""
        blocks = self._blocks(live, live.task.prompt_tokens - 1)
        return blocks[: self._pool.cache.found(blocks)]

    def _prefix(self, rid: str) -> CachedPrefix:
        """See ``View.cached_prefix``."""
        live = self._live[rid]
        blocks, block_tokens = self._cached(live), live.request.block_tokens
        if not blocks:
            return CachedPrefix()
        unused = self._pool.cache.unused(blocks)
        return CachedPrefix(len(blocks) * block_tokens, unused * block_tokens, blocks[-1])

    def _released(self, rid: str) -> int:
        """See ``View.released``."""
        return self._pool.released(self._live[rid])

    def _find(self, live: Live) -> int | None:
        """Begin a prompt with what the prefix cache has of it; its name, if there is any."""
        if self.machine.caching is PrefixCaching.OFF:
            return None
        blocks = self._cached(live)
        if not blocks:
            return None
        self._pool.find(live, blocks)
        if live.produced:
            live.record.recomputed_tokens -= live.cached
        else:
            live.record.cached_tokens = live.cached
        return blocks[-1]

    def _share(self, live: Live) -> None:
        """Put what a request computed into the prefix cache."""
        if self.machine.caching is not PrefixCaching.OFF:
            self._pool.share(live, self._blocks(live, live.held))

    def _leave_blocks(self, live: Live) -> None:
        """Keep what a request gives up, where the engine keeps all."""
        if self.machine.caching is PrefixCaching.BLOCKS:
            self._share(live)

    def _recompute(self, live: Live) -> None:
        """Throw a request's KVC away; what it generated is part of its prompt from now on."""
        live.record.preemptions += 1
        self._leave_blocks(live)
        live.record.recomputed_tokens += self._pool.release(live) + live.offloaded
        live.offloaded, live.token_s, live.backlog_token_s = 0, 0.0, 0.0
        prompt_tokens = live.request.features.prompt_tokens + live.produced
        live.task = replace(live.task, prompt_tokens=prompt_tokens, generated_tokens=live.produced)
        self._policy.requeue(live.task)

    def _first_token(self, live: Live, now_s: float) -> None:
        """A prompt is complete: it produced a token."""
        live.produced += 1
        self._policy.on_tokens(live.task.rid, 1)
        if live.record.first_token_s is None:
            live.record.first_token_s = now_s
        if live.produced == live.request.output_tokens:
            self._end(live, now_s)

    def _end(self, live: Live, now_s: float) -> None:
        live.record.outcome, live.record.end_s = Outcome.FINISHED, now_s
        if self.machine.results is Results.LATE:
            self._gone[live.task.rid] = live
        else:
            self._finish(live)

    def _add(self, live: Live) -> None:
        """Tell the policy of a request, unless it never fits."""
        task = live.task
        try:
            if task.prompt_tokens + live.request.output_tokens > self.machine.capacity_tokens:
                raise NeverFits.of(task.prompt_tokens, self.machine.capacity_tokens)
            self._policy.add(task)
        except NeverFits:
            live.record.outcome, live.record.end_s = Outcome.REJECTED, task.arrival_s
            del self._live[task.rid]
            self.on_end(task.rid, None)

    def _know(self) -> None:
        """Let the policy know of all that happened."""
        for live in self._gone.values():
            self._finish(live)
        self._gone.clear()
        for live in self._came:
            self._add(live)
        self._came.clear()

    def _finish(self, live: Live) -> None:
        self._pool.count_useful(live)
        self._leave_blocks(live)
        self._pool.release(live)
        del self._live[live.task.rid]
        self._policy.remove(live.task.rid, Outcome.FINISHED)
        features, output_tokens = live.request.features, live.request.output_tokens
        self._predictor.observe(features, output_tokens, output_tokens < features.cap_tokens)
        self.on_end(live.task.rid, output_tokens)
