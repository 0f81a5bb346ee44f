"""A slow, obvious machine that runs a policy: one token per decode, a pool of KVC, true lengths.

It knows every response's true length; the policy only ever sees predictions.
"""

from dataclasses import dataclass, field

from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import (
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


ITERATION_S = 0.01


class Machine:
    """Runs a policy on requests; ``lag`` is 1 where results arrive one iteration late.

    ``drops`` is a random generator: as SGLang sometimes does, the machine then leaves out a third
    of the new prompts of each plan.
    """

    def __init__(self, policy, requests, capacity, max_running=64, lag=1, drops=None):
        self.drops = drops
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
        return sum(r.held for r in self.requests.values())

    def view(self):
        holders = [r for r in self.requests.values() if r.held]
        return View(
            now_s=self.iteration * ITERATION_S,
            capacity_tokens=self.capacity,
            used_tokens=self.used(),
            free_rows=256 - len(holders),
            max_running=self.max_running,
        )

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
                request.offloaded, request.held = request.held, 0
                offloaded.append(rid)
            request.state = "ready"
        for rid, reason in plan.reject:
            assert self.requests[rid].state == "waiting" and reason
            self.requests[rid].state = "done"
            self.rejected.append(rid)
            self.policy.remove(rid, Outcome.REJECTED)
        for rid in plan.resume:
            request = self.requests[rid]
            assert request.state == "ready"
            request.state = "running"
            request.held, request.offloaded = request.held + request.offloaded, 0
        decoding = [r for r in self.requests.values() if r.state == "running"]
        assert len(decoding) <= self.max_running
        for request in decoding:
            request.held += 1
        prefilled = self.prefill(plan)
        self.peak = max(self.peak, self.used())
        if self.used() > self.capacity:
            self.failures += 1
        self.policy.on_launch(
            plan,
            Launch(
                prefilled=tuple(prefilled),
                resumed=plan.resume,
                parked=tuple(parked),
                offloaded=tuple(offloaded),
                decoded=tuple(r.rid for r in decoding),
            ),
        )
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
            assert request.prefilled + tokens <= size
            request.prefilled += tokens
            request.held += tokens
            done = request.prefilled == size
            unfinished += not done
            request.state = "ready" if done else "prefilling"
            parts.append(Prefilled(rid, tokens, 0, done))
        assert unfinished <= 1, "two prompts end unfinished in one iteration"
        return parts

    def preempt(self, rid):
        request = self.requests[rid]
        assert request.state in ("ready", "running")
        request.preempted += 1
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
                request.state = "done"
                request.held = 0
                request.finished_at = self.iteration
                self.finish_order.append(rid)
                self.policy.remove(rid, Outcome.FINISHED)
