"""EconoServe on a small deterministic workload, one decode token per request and iteration.

Owns a machine that does what the plan says. It knows the true lengths; the policy is told
predictions only.
"""

import itertools
import random
from dataclasses import dataclass
from statistics import mean

from worked import KINDS, lognormal

from econoserve.core.cost import TfsConfig
from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.core.lengths import LengthPrediction
from econoserve.core.policy import Policy
from econoserve.core.types import Launch, Outcome, Prefilled, Task, View
from econoserve.policies.econoserve import EconoServe, EconoServeConfig

CAPACITY = 8000
REQUESTS = 320
ITERATION_S = 0.02

MODES = {
    "exact": KvcConfig(KvcMode.EXACT),
    "nested": KvcConfig(KvcMode.NESTED),
    "skyline": KvcConfig(KvcMode.SKYLINE),
    "risk 0.1": KvcConfig(KvcMode.RISK, risk=0.1),
    "risk 0.01": KvcConfig(KvcMode.RISK, risk=0.01),
}
"""What is compared, by its name."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One iteration.

    Attributes:
        used_tokens: KVC in use after it.
        promised_tokens: promised beyond that.
        running: requests that decoded.
        waiting: requests that wait, with or without KVC.
    """

    used_tokens: int
    promised_tokens: int
    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Run:
    """What became of a workload.

    Attributes:
        moments: its iterations.
        finished: the iteration in which each request ended.
        preempted: how often KVC was taken back.
    """

    moments: list[Moment]
    finished: list[int]
    preempted: int

    @property
    def busy(self) -> list[Moment]:
        """Iterations in which somebody waited."""
        return [moment for moment in self.moments if moment.waiting]

    @property
    def mean_running(self) -> float:
        """Requests that decode, while somebody waits."""
        return mean(moment.running for moment in self.busy)

    @property
    def mean_use(self) -> float:
        """Share of the KVC in use, while somebody waits."""
        return mean(moment.used_tokens for moment in self.busy) / CAPACITY

    @property
    def mean_completion(self) -> float:
        """Iterations until a request ends."""
        return mean(self.finished)


@dataclass(slots=True)
class Request:
    """A request on the machine.

    Attributes:
        task: as the policy knows it.
        length: its true RL.
        held: KVC that it holds.
        produced: output tokens so far.
    """

    task: Task
    length: int
    held: int = 0
    produced: int = 0


def workload(known: bool) -> list[Request]:
    """Requests of four kinds that arrive at once.

    Args:
        known: predict each length as it is; else only the lengths of its kind are known.

    Returns:
        The same requests whatever is known of them.
    """
    source = random.Random(1)
    kinds = {median: lognormal(median) for median in KINDS}
    requests = []
    for number in range(REQUESTS):
        lengths = kinds[source.choice(KINDS)]
        length, prompt_tokens = source.choice(lengths), source.randint(20, 120)
        prediction = (
            LengthPrediction((length,), 1.0, 2000)
            if known
            else LengthPrediction(lengths, 0.5, 2000)
        )
        requests.append(Request(Task(f"r{number}", 0.0, prompt_tokens, prediction), length))
    return requests


def run(policy: Policy, requests: list[Request]) -> Run:
    """Follow a policy's plans until all requests have ended.

    Args:
        policy: the policy.
        requests: all of them, at the beginning.

    Returns:
        The run.

    Raises:
        AssertionError: an allocation failed.
    """
    live = {request.task.rid: request for request in requests}
    running: dict[str, None] = {}
    moments, finished, preempted, used = [], [], 0, 0
    for request in requests:
        policy.add(request.task)
    while live:
        plan = policy.plan(View(len(moments) * ITERATION_S, CAPACITY, used, 1 << 20, 1 << 20))
        for rid, _ in plan.preempt:
            request = live[rid]
            used, request.held, preempted = used - request.held, 0, preempted + 1
            running.pop(rid, None)
            old = request.task
            request.task = Task(
                rid,
                old.arrival_s,
                old.prompt_tokens + request.produced - old.generated_tokens,
                old.prediction,
                generated_tokens=request.produced,
            )
            policy.requeue(request.task)
        running.update(dict.fromkeys(plan.resume))
        parts = []
        for rid, tokens in plan.prefill:
            live[rid].held += tokens
            done = live[rid].held == live[rid].task.prompt_tokens
            parts.append(Prefilled(rid, tokens, 0, done))
        for rid in running:
            live[rid].held += 1
        used += len(running) + sum(part.tokens for part in parts)
        if used > CAPACITY:
            raise AssertionError(f"iteration {len(moments)}: {used} tokens of {CAPACITY}")
        decoded = tuple(running)
        policy.on_launch(plan, Launch(tuple(parts), plan.resume, decoded=decoded))
        promised = policy.ledger.promised_tokens
        moments.append(Moment(used, promised, len(decoded), len(live) - len(decoded)))
        for rid in decoded:
            request = live[rid]
            request.produced += 1
            policy.on_tokens(rid, 1)
            if request.produced == request.length:
                used -= request.held
                finished.append(len(moments))
                del live[rid], running[rid]
                policy.remove(rid, Outcome.FINISHED)
    return Run(moments, finished, preempted)


def run_mode(config: KvcConfig, known: bool) -> Run:
    """EconoServe with one mode of the ledger on the workload.

    Args:
        config: of the ledger.
        known: whether lengths are predicted exactly.

    Returns:
        The run.
    """
    tfs = TfsConfig(pinned_tokens=512)
    return run(EconoServe(EconoServeConfig(CAPACITY, kvc=config, tfs=tfs)), workload(known))


def run_all() -> dict[tuple[str, bool], Run]:
    """The workload in each mode, with lengths known and with lengths predicted.

    Returns:
        Runs, by the mode's name and whether lengths were known.
    """
    both = itertools.product((True, False), MODES)
    return {(name, known): run_mode(MODES[name], known) for known, name in both}
