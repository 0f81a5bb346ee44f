"""A machine that only counts: it runs a policy at a fixed number of running and queued tasks.

Owns the true lengths. The policy sees predictions that are right in distribution only.
"""

import random
from dataclasses import dataclass
from time import perf_counter

from econoserve.core.lengths import LengthPrediction
from econoserve.core.policy import Policy
from econoserve.core.types import Launch, Outcome, Prefilled, Slo, Task, View

ITERATION_S = 0.02
"""Time between two plans."""

MAX_TOKENS = 2048
"""Cap of a response."""


@dataclass(slots=True)
class Cost:
    """What one iteration cost the scheduler, in seconds.

    Attributes:
        plan_s: ``plan``.
        books_s: ``on_launch``, ``on_tokens``, ``remove`` and ``add``.
        running: tasks that decoded.
    """

    plan_s: float
    books_s: float
    running: int


@dataclass(slots=True)
class _Request:
    """A task, the tokens that it still has to produce, and the KVC that it holds."""

    task: Task
    left: int
    held: int = 0


class CountingMachine:
    """Follows every plan, refills the queue, and measures.

    Args:
        policy: the policy.
        capacity_tokens: size of the KVC.
        max_running: most tasks that decode at once.
        queued: prompts that wait, at all times.
        seed: of lengths and arrivals.
    """

    def __init__(
        self, policy: Policy, capacity_tokens: int, max_running: int, queued: int, seed: int = 0
    ) -> None:
        self._policy = policy
        self._capacity_tokens = capacity_tokens
        self._max_running = max_running
        self._random = random.Random(seed)
        self._now_s = 60.0
        self._made = 0
        self._requests: dict[str, _Request] = {}
        self._running: dict[str, None] = {}
        self._used = 0
        quantiles = sorted(self._response() for _ in range(6400))[50::100]
        self._quantiles = tuple(quantiles)
        for _ in range(queued):
            self._arrive(self._now_s - self._random.uniform(0, 30))

    def step(self) -> Cost:
        """One iteration.

        Returns:
            What it cost.
        """
        view = View(self._now_s, self._capacity_tokens, self._used, 1 << 20, self._max_running)
        started_s = perf_counter()
        plan = self._policy.plan(view)
        plan_s = perf_counter() - started_s
        books_s = sum(self._preempt(rid) for rid, _ in plan.preempt)
        self._running.update(dict.fromkeys(plan.resume))
        decoded = tuple(self._running)
        parts = tuple(self._prefill(rid, tokens) for rid, tokens in plan.prefill)
        launch = Launch(prefilled=parts, resumed=plan.resume, decoded=decoded)
        started_s = perf_counter()
        self._policy.on_launch(plan, launch)
        for rid in decoded:
            self._policy.on_tokens(rid, 1)
        books_s += perf_counter() - started_s
        for rid in decoded:
            request = self._requests[rid]
            request.left -= 1
            request.held += 1
            self._used += 1
            if request.left == 0:
                books_s += self._finish(rid)
        self._now_s += ITERATION_S
        for rid, tokens in plan.prefill:
            # Each prompt that left the queue is replaced by a new one.
            if self._requests[rid].held == tokens:
                books_s += self._arrive(self._now_s)
        return Cost(plan_s, books_s, len(decoded))

    def _response(self) -> int:
        return min(max(int(self._random.lognormvariate(5.0, 0.8)), 2), MAX_TOKENS)

    def _arrive(self, arrival_s: float) -> float:
        self._made += 1
        prompt = min(max(int(self._random.lognormvariate(5.0, 1.0)), 4), MAX_TOKENS)
        # One request in three states an SLO; what is predicted varies from client to client.
        slo = Slo(e2e_s=self._random.uniform(60, 240)) if self._made % 3 == 0 else Slo()
        skew = self._random.choice((0.5, 0.7, 1.0, 1.4))
        quantiles = tuple(max(int(tokens * skew), 1) for tokens in self._quantiles)
        prediction = LengthPrediction(quantiles, 0.5, MAX_TOKENS)
        task = Task(f"r{self._made}", arrival_s, prompt, prediction, slo)
        self._requests[task.rid] = _Request(task, max(int(self._response() * skew), 2))
        started_s = perf_counter()
        self._policy.add(task)
        return perf_counter() - started_s

    def _prefill(self, rid: str, tokens: int) -> Prefilled:
        request = self._requests[rid]
        request.held += tokens
        self._used += tokens
        return Prefilled(rid, tokens, 0, request.held == request.task.prompt_tokens)

    def _preempt(self, rid: str) -> float:
        """It starts again from its prompt; its response so far is not asked for again."""
        request = self._requests[rid]
        self._used -= request.held
        request.held = 0
        self._running.pop(rid, None)
        started_s = perf_counter()
        self._policy.requeue(request.task)
        return perf_counter() - started_s

    def _finish(self, rid: str) -> float:
        self._used -= self._requests.pop(rid).held
        del self._running[rid]
        started_s = perf_counter()
        self._policy.remove(rid, Outcome.FINISHED)
        return perf_counter() - started_s
