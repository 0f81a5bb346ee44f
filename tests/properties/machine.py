"""A slow, obvious machine that runs a policy: one token per decode, a pool of KVC, true lengths.

It knows every response's true length; the policy only ever sees predictions. By default it has
rows enough and follows every plan; a ``World`` can be less kind.
"""

import random
from dataclasses import dataclass, field

from prefixes import PrefixCache, Segment

from econoserve.core.cost import IterationWork
from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import (
    CachedPrefix,
    IterationPlan,
    Launch,
    Outcome,
    Preemption,
    Prefilled,
    Slo,
    Task,
    View,
)


@dataclass
class Request:
    rid: str
    arrival: int
    prompt_tokens: int
    true_tokens: int
    prediction: LengthPrediction
    slo: Slo = field(default_factory=Slo)
    parkable: bool = True
    path: tuple[Segment, ...] = ()
    prefix: tuple[Segment, ...] = ()
    prefilled: int = 0
    held: int = 0
    produced: int = 0
    base: int = 0
    state: str = "new"
    preempted: int = 0
    moved: int = 0
    offloaded: int = 0
    finished_at: int | None = None
    first_token_at: int | None = None

    def task(self) -> Task:
        return Task(
            rid=self.rid,
            arrival_s=self.arrival * ITERATION_S,
            prompt_tokens=self.prompt_tokens + self.produced,
            prediction=self.prediction,
            slo=self.slo,
            parkable=self.parkable,
            generated_tokens=self.produced,
        )

    @property
    def shared(self):
        """Tokens of it that lie in the prefix cache."""
        return sum(segment.tokens for segment in self.prefix)


ITERATION_S = 0.01


@dataclass(frozen=True)
class World:
    """What a machine lacks or does that the default one does not; all of it is legal.

    Attributes:
        rows: requests that may hold KVC.
        skips: seed; a quarter of each of the planned resumes, decodes and prompt parts is left
            out, and an eighth of the parts is cut short.
        timed: whether the policy is told how long iterations took.
        cached: whether the prefixes are in the cache from the beginning.
    """

    rows: int = 256
    skips: int | None = None
    timed: bool = False
    cached: bool = False


KIND = World()


class Machine:
    """Runs a policy on requests; ``lag`` is 1 where results arrive one iteration late.

    ``drops`` is a random generator: as SGLang sometimes does, the machine then leaves out a third
    of the new prompts of each plan.
    """

    def __init__(self, policy, requests, capacity, max_running=64, lag=1, drops=None, world=KIND):
        self.drops, self.world = drops, world
        self.chance = None if world.skips is None else random.Random(world.skips)
        self.cache = PrefixCache()
        for request in requests if world.cached else ():
            self.cache.insert(request.path)
        self.policy, self.capacity, self.max_running, self.lag = policy, capacity, max_running, lag
        self.requests = {request.rid: request for request in requests}
        self.iteration = 0
        self.failures = 0
        self.log: list[IterationPlan] = []
        self.inflight: list[tuple[list[str], set[str]]] = []
        self.finish_order: list[str] = []
        self.rejected: list[str] = []
        self.peak = 0

    def alive(self):
        return [r for r in self.requests.values() if r.state != "done"]

    def used(self):
        return sum(r.held for r in self.requests.values()) + self.cache.used

    def free_rows(self):
        return self.world.rows - sum(bool(r.held or r.prefix) for r in self.requests.values())

    def view(self):
        return View(
            now_s=self.iteration * ITERATION_S,
            capacity_tokens=self.capacity,
            used_tokens=self.used(),
            free_rows=self.free_rows(),
            max_running=self.max_running,
            cached_prefix=self.cached_prefix,
        )

    def cached_prefix(self, rid):
        path = self.cache.match(self.requests[rid].path)
        if not path:
            return CachedPrefix()
        free = [segment for segment in path if not self.cache.cached[segment]]
        return CachedPrefix(tokens_of(path), tokens_of(free), path[-1].name)

    def skipped(self):
        return self.chance is not None and self.chance.random() < 1 / 4

    def run(self, limit):
        while self.alive():
            assert self.iteration < limit, "the policy makes no progress"
            self.step()
        while self.inflight:
            self.deliver()

    def step(self):
        for request in self.requests.values():
            if request.state == "new" and request.arrival <= self.iteration:
                request.state = "waiting"
                self.policy.add(request.task())
        plan = self.policy.plan(self.view())
        assert plan == self.policy.plan(self.view()), "planning changed the policy"
        self.log.append(plan)
        parked, offloaded = [], []
        for rid, how in plan.preempt:
            if how is Preemption.RECOMPUTE:
                self.preempt(rid)
                continue
            request = self.requests[rid]
            request.moved += 1
            if how is Preemption.PARK:
                assert request.state == "running"
                parked.append(rid)
            else:
                assert request.state in ("ready", "running") and not request.offloaded
                request.offloaded, request.held = request.held + request.shared, 0
                self.let_go(request)
                offloaded.append(rid)
            request.state = "ready"
        for rid, reason in plan.reject:
            assert self.requests[rid].state == "waiting" and reason
            self.requests[rid].state = "done"
            self.rejected.append(rid)
            self.policy.remove(rid, Outcome.REJECTED)
        resumed = []
        for rid in plan.resume:
            request = self.requests[rid]
            assert request.state == "ready"
            if self.skipped():
                continue
            resumed.append(rid)
            request.state = "running"
            request.held, request.offloaded = request.held + request.offloaded, 0
        running = [r for r in self.requests.values() if r.state == "running"]
        assert len(running) <= self.max_running
        assert plan.prefill or not plan.pauses
        decoding = [] if plan.pauses else [r for r in running if not self.skipped()]
        for request in decoding:
            request.held += 1
        prefilled = self.prefill(plan)
        used = self.used()
        self.peak = max(self.peak, used)
        if used > self.capacity:
            self.failures += 1
        self.cache.evict(used + self.cache.evictable - self.capacity)
        assert self.free_rows() >= 0, "more requests hold KVC than there are rows"
        self.policy.on_launch(
            plan,
            Launch(
                prefilled=tuple(prefilled),
                resumed=tuple(resumed),
                parked=tuple(parked),
                offloaded=tuple(offloaded),
                decoded=tuple(r.rid for r in decoding),
            ),
        )
        if self.world.timed:
            self.time(decoding, prefilled)
        done_prompts = {part.rid for part in prefilled if part.done}
        produced = [r.rid for r in decoding] + sorted(done_prompts)
        self.inflight.append((produced, {r.rid for r in decoding}))
        if len(self.inflight) > self.lag:
            self.deliver()
        self.iteration += 1

    def prefill(self, plan):
        parts, unfinished = [], 0
        for rid, tokens in plan.prefill:
            request = self.requests[rid]
            assert request.state in ("waiting", "prefilling")
            if request.state == "waiting" and self.drops and self.drops.random() < 1 / 3:
                continue
            assert tokens >= 1
            size = request.prompt_tokens + request.base
            cached, prefix = 0, self.cached_prefix(rid)
            if request.state == "waiting":
                cached = prefix.tokens
            planned = request.prefilled + cached + tokens
            assert planned <= size
            if self.chance is not None:
                tokens = self.part(request, tokens, planned == size)
            if not tokens:
                continue
            if cached:
                request.prefix = self.cache.match(request.path)
                self.cache.hold(request.prefix)
            request.prefilled += cached + tokens
            request.held += tokens
            done = request.prefilled == size
            unfinished += not done
            request.state = "ready" if done else "prefilling"
            parts.append(Prefilled(rid, tokens, cached, done, prefix.key if cached else None))
        assert unfinished <= 1, "two prompts end unfinished in one iteration"
        return parts

    def part(self, request, tokens, ends):
        """What is computed of a planned part; a second prompt is never left unfinished."""
        under_way = {r.rid for r in self.requests.values() if r.state == "prefilling"}
        alone = under_way <= {request.rid}
        if self.skipped() or not (ends or alone):
            return 0
        if tokens > 1 and alone and self.chance.random() < 1 / 8:
            return self.chance.randint(1, tokens - 1)
        return tokens

    def time(self, decoding, prefilled):
        """Tell the policy how long this iteration took; at times it took longer."""
        work = IterationWork(
            sum(part.tokens for part in prefilled),
            sum(part.tokens * self.requests[part.rid].prefilled for part in prefilled),
            len(decoding),
            sum(request.held + request.shared for request in decoding),
            0 if decoding else sum(r.state == "running" for r in self.requests.values()),
        )
        elapsed_s = 1e-3 + 1e-5 * work.prefill_tokens + 1e-4 * work.decoding
        elapsed_s += 1e-7 * (work.prefill_squared + work.context_tokens)
        self.policy.on_iteration(work, elapsed_s * (1 + self.iteration * 7 % 5 / 10))

    def let_go(self, request):
        self.cache.let_go(request.prefix)
        request.prefix = ()

    def preempt(self, rid):
        request = self.requests[rid]
        assert request.state in ("ready", "running")
        request.preempted += 1
        self.let_go(request)
        request.prefilled = request.held = 0
        request.base = request.produced
        request.state = "waiting"
        for produced, _ in self.inflight:
            if rid in produced:
                produced.remove(rid)
        self.policy.requeue(request.task())

    def deliver(self):
        produced, _ = self.inflight.pop(0)
        for rid in produced:
            request = self.requests[rid]
            if request.state == "done":
                continue
            request.produced += 1
            if request.first_token_at is None:
                request.first_token_at = self.iteration
            self.policy.on_tokens(rid, 1)
            if request.produced >= request.true_tokens:
                self.retire(request)
                request.finished_at = self.iteration
                self.finish_order.append(rid)
                self.policy.remove(rid, Outcome.FINISHED)

    def retire(self, request):
        """A request is gone; if its whole prompt was computed, its prefix is there for others."""
        request.state = "done"
        self.let_go(request)
        if request.produced:
            self.cache.insert(request.path)
        request.held = request.offloaded = 0

    def abort(self, rid):
        request = self.requests[rid]
        if request.state != "done":
            self.retire(request)
            self.policy.remove(rid, Outcome.ABORTED)
            self.finish_order.append(rid)


def tokens_of(path):
    return sum(segment.tokens for segment in path)
