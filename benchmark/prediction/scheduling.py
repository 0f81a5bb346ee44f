"""What predictions do to scheduling: policy ``plus`` on a machine that only counts.

Owns the machine: iterations of a fixed cost model, a KVC that is the bottleneck, true lengths that
the policy never sees. Which tokens come out does not matter here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np

from benchmark.prediction.accuracy import replay
from econoserve.core.cost import TfsConfig
from econoserve.core.types import Launch, Outcome, Preemption, Prefilled, Slo, Task, View
from econoserve.policies import make_policy
from econoserve.prediction.predictor import Predictor
from econoserve.workload.trace import TraceRequest

CONCURRENT = 48
"""Requests of mean size, prompt and half a response, that fill the KVC."""

LARGEST = 1 / 8
"""Share of the KVC that a prompt, and a response, may have at most; longer ones are shortened."""

LOAD = 1.1
"""Arrivals, in units of what a KVC that is always full would serve."""

SLO = Slo(ttft_s=10.0, tpot_s=0.1)
"""Objectives of every request; none depends on its true length."""

BASE_S, PROMPT_TOKEN_S, REQUEST_S = 0.015, 1e-5, 1e-4
"""Time of an iteration, and what each prompt token and each decoding request add to it."""

PASS_TOKENS = 2048
"""The target forward size."""

LEVEL = 0.5
"""Promised where one length is needed; ``plus`` mostly uses the whole distribution."""


@dataclass(frozen=True, slots=True)
class Load:
    """Requests for the machine.

    Attributes:
        past: what the predictor has learned before.
        requests: what is served, by arrival.
        capacity_tokens: size of the KVC.
    """

    past: list[TraceRequest]
    requests: list[TraceRequest]
    capacity_tokens: int


@dataclass(frozen=True, slots=True)
class Service:
    """What came of a load.

    Attributes:
        goodput_per_s: requests within their SLO, per second of arrivals.
        preemptions: requests' KVC thrown away and computed again.
        kvc_used: mean share of the KVC in use while requests arrive.
        jct_s: mean time from arrival to the last token.
    """

    goodput_per_s: float
    preemptions: int
    kvc_used: float
    jct_s: float


def make_load(trace: Sequence[TraceRequest], past: int, served: int, load: float = LOAD) -> Load:
    """A load from a part of a trace, as fast as fills the KVC.

    Args:
        trace: by arrival.
        past: requests to learn from before.
        served: requests to serve after these.
        load: see ``LOAD``.

    Returns:
        The load; its arrivals keep the trace's bursts, but not its rate.
    """
    past = min(past, len(trace) // 2)
    part = list(trace[: past + served])
    later = part[past:]
    size = mean(r.features.prompt_tokens + r.output_tokens / 2 for r in later)
    capacity_tokens = int(CONCURRENT * size)
    most = int(capacity_tokens * LARGEST)
    part = [_shortened(request, most) for request in part]
    later = part[past:]
    step_s = BASE_S + REQUEST_S * CONCURRENT
    held = mean(
        (r.features.prompt_tokens + r.output_tokens / 2) * r.output_tokens * step_s for r in later
    )
    span_s = later[-1].arrival_s - later[0].arrival_s
    scale = len(later) / (load * capacity_tokens / held) / span_s
    first_s = later[0].arrival_s
    requests = [replace(r, arrival_s=(r.arrival_s - first_s) * scale) for r in later]
    return Load(part[:past], requests, capacity_tokens)


def _shortened(request: TraceRequest, most: int) -> TraceRequest:
    features = replace(
        request.features,
        prompt_tokens=min(request.features.prompt_tokens, most),
        cap_tokens=most,
    )
    return TraceRequest(request.arrival_s, features, min(request.output_tokens, most))


@dataclass(slots=True)
class _Live:
    number: int
    task: Task
    held: int = 0
    produced: int = 0
    first_s: float = 0.0


class _Machine:
    def __init__(self, load: Load, predictor: Predictor) -> None:
        self._load, self._predictor = load, predictor
        self._policy = make_policy("plus", load.capacity_tokens, tfs=TfsConfig(PASS_TOKENS))
        self._live: dict[str, _Live] = {}
        self._running: dict[str, None] = {}
        self._now_s, self._used, self._next = 0.0, 0, 0
        self.preemptions, self.met = 0, 0
        self.jcts_s: list[float] = []
        self.occupancy: list[tuple[float, float]] = []

    def run(self, progress: Callable[[], None]) -> None:
        requests = self._load.requests
        while self._live or self._next < len(requests):
            if not self._live:
                self._now_s = max(self._now_s, requests[self._next].arrival_s)
            while self._next < len(requests) and requests[self._next].arrival_s <= self._now_s:
                self._arrive()
                progress()
            self._step()

    def _arrive(self) -> None:
        request, rid = self._load.requests[self._next], f"r{self._next}"
        prediction = self._predictor.predict(request.features)
        task = Task(rid, request.arrival_s, request.features.prompt_tokens, prediction, SLO)
        self._live[rid] = _Live(self._next, task)
        self._policy.add(task)
        self._next += 1

    def _step(self) -> None:
        capacity = self._load.capacity_tokens
        view = View(self._now_s, capacity, self._used, 4096, 4096)
        plan = self._policy.plan(view)
        for rid, how in plan.preempt:
            self._running.pop(rid, None)
            if how is Preemption.RECOMPUTE:
                self._recompute(self._live[rid])
        for rid, _ in plan.reject:
            raise RuntimeError(f"{rid} was refused")
        self._running.update(dict.fromkeys(plan.resume))
        decoded = () if plan.pauses else tuple(self._running)
        for rid in decoded:
            self._live[rid].held += 1
        parts = tuple(self._prefill(rid, tokens) for rid, tokens in plan.prefill)
        prompt_tokens = sum(part.tokens for part in parts)
        self._used += len(decoded) + prompt_tokens
        if self._used > capacity:
            raise RuntimeError("the KVC is overfull")
        parked = tuple(rid for rid, how in plan.preempt if how is Preemption.PARK)
        launch = Launch(prefilled=parts, resumed=plan.resume, parked=parked, decoded=decoded)
        self._policy.on_launch(plan, launch)
        spent_s = BASE_S + PROMPT_TOKEN_S * prompt_tokens + REQUEST_S * len(decoded)
        if self._next < len(self._load.requests):
            self.occupancy.append((self._used / capacity, spent_s))
        self._now_s += spent_s
        for rid in (*decoded, *(part.rid for part in parts if part.done)):
            self._produce(rid)

    def _prefill(self, rid: str, tokens: int) -> Prefilled:
        live = self._live[rid]
        live.held += tokens
        return Prefilled(rid, tokens, 0, live.held == live.task.prompt_tokens)

    def _recompute(self, live: _Live) -> None:
        self.preemptions += 1
        self._used -= live.held
        live.held = 0
        prompt_tokens = live.task.prompt_tokens - live.task.generated_tokens + live.produced
        live.task = replace(live.task, prompt_tokens=prompt_tokens, generated_tokens=live.produced)
        self._policy.requeue(live.task)

    def _produce(self, rid: str) -> None:
        live = self._live[rid]
        request = self._load.requests[live.number]
        live.produced += 1
        self._policy.on_tokens(rid, 1)
        if live.produced == 1:
            live.first_s = self._now_s
        if live.produced < request.output_tokens:
            return
        self._used -= live.held
        self._running.pop(rid, None)
        del self._live[rid]
        self._policy.remove(rid, Outcome.FINISHED)
        by_itself = request.output_tokens < request.features.cap_tokens
        self._predictor.observe(request.features, request.output_tokens, by_itself)
        tpot_s = (self._now_s - live.first_s) / max(live.produced - 1, 1)
        ttft_s = live.first_s - request.arrival_s
        self.met += ttft_s <= SLO.ttft_s and tpot_s <= SLO.tpot_s
        self.jcts_s.append(self._now_s - request.arrival_s)


def serve(load: Load, predictor: Predictor, progress: Callable[[], None]) -> Service:
    """Serve a load with a predictor.

    Args:
        load: what arrives.
        predictor: new; it learns from the past first.
        progress: called at each arrival.

    Returns:
        What came of it.
    """
    replay(load.past, predictor)
    machine = _Machine(load, predictor)
    machine.run(progress)
    used, weights = zip(*machine.occupancy, strict=True)
    return Service(
        goodput_per_s=machine.met / load.requests[-1].arrival_s,
        preemptions=machine.preemptions,
        kvc_used=float(np.average(used, weights=weights)),
        jct_s=mean(machine.jcts_s),
    )
