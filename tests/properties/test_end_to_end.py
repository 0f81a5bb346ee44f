"""Each policy end to end on the obvious machine: iterations of one cost, a KVC that is too small.

What is asserted are the relations that the policies exist for; the figures are of this machine.
"""

import random
import statistics
from dataclasses import replace
from functools import cache

import pytest
from machine import ITERATION_S, Machine, Request

from econoserve.core.cost import TfsConfig
from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import Slo
from econoserve.policies import POLICIES, make_policy
from econoserve.policies.econoserve import VARIANTS

CAPACITY = 4_000
LONGEST = 600


def between(value, least, most):
    return min(max(int(value), least), most)


def workload(known, seed=0, count=150):
    """A burst; lengths are known, or only their distribution is."""
    draw = random.Random(seed)
    past = sorted(between(draw.lognormvariate(4.5, 0.8), 2, LONGEST) for _ in range(640))
    requests = []
    for number in range(count):
        prompt = between(draw.lognormvariate(4.5, 1.0), 4, 800)
        true = between(draw.lognormvariate(4.5, 0.8), 2, LONGEST)
        prediction = LengthPrediction(tuple(past[5::10]), 0.5, LONGEST)
        if known:
            prediction = LengthPrediction((true,), 1.0, true)
        requests.append(Request(f"r{number}", 0, prompt, true, prediction))
    return requests


def urgent_workload(known, seed=0):
    """The same requests as fast as they can just be served, half of them with a tight SLO."""
    draw = random.Random(seed)
    return [
        replace(
            request,
            arrival=int(draw.uniform(0, 1_000)),
            slo=Slo(e2e_s=ITERATION_S * (request.true_tokens + draw.choice((200, 1_200)))),
        )
        for request in workload(known, seed)
    ]


def served(name, requests):
    """The machine after it served all of them."""
    constants = {"tfs": TfsConfig(512)} if name in VARIANTS else {}
    machine = Machine(make_policy(name, CAPACITY, **constants), requests, CAPACITY, 256)
    machine.run(limit=50_000)
    assert machine.failures == 0 and len(machine.finish_order) == len(requests)
    return machine


@cache
def outcome(name, known):
    """Iterations until all are done, their mean completion, and how many were recomputed."""
    requests = workload(known)
    machine = served(name, requests)
    completion = statistics.mean(request.finished_at for request in requests)
    return machine.iteration, completion, sum(request.preempted for request in requests)


@pytest.mark.parametrize("known", [True, False], ids=["known lengths", "known distribution"])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_serves_everything(name, known):
    iterations, completion, _ = outcome(name, known)
    # Fewer than one after the other, more than if the KVC were unlimited.
    alone = sum(request.true_tokens + 1 for request in workload(known))
    longest = max(request.true_tokens for request in workload(known))
    assert longest < iterations < alone / 2
    assert completion < iterations


def test_each_step_of_the_ablation_helps_where_lengths_are_known():
    completions = {name: outcome(name, known=True)[1] for name in VARIANTS}
    assert completions["sd"] < completions["d"]
    # Without SLOs the order is worth nothing; see the next test.
    assert completions["sdo"] < 1.05 * completions["sd"]
    assert completions["full"] < completions["sdo"]
    assert completions["plus"] < 0.8 * completions["full"]


@pytest.mark.parametrize("known", [True, False], ids=["known lengths", "known distribution"])
def test_the_order_by_urgency_keeps_more_slos(known):
    kept = {}
    for name in (*VARIANTS, "vllm_v1"):
        requests = urgent_workload(known)
        served(name, requests)
        kept[name] = sum(
            (request.finished_at - request.arrival) * ITERATION_S <= request.slo.e2e_s
            for request in requests
        )
    assert kept["sdo"] > 1.25 * kept["sd"]
    assert min(kept["full"], kept["plus"]) > 0.98 * kept["sdo"]
    assert kept["plus"] > 1.1 * kept["vllm_v1"]


def test_plus_needs_no_more_iterations_than_vllm_and_recomputes_nobody():
    iterations, completion, preempted = outcome("plus", known=True)
    others = outcome("vllm_v1", known=True)
    assert preempted == 0 < others[2]
    assert iterations < 1.05 * others[0]
    assert completion < 0.9 * others[1]


def test_with_only_the_distribution_known_plus_recomputes_few_and_loses_little():
    iterations, completion, preempted = outcome("plus", known=False)
    others = outcome("vllm_v1", known=False)
    assert preempted < others[2] / 5
    assert iterations < 1.1 * others[0]
    assert completion < others[1]


def test_orca_reserves_the_longest_response_and_pays_for_it():
    assert outcome("orca", known=False)[0] > 1.5 * outcome("vllm", known=False)[0]
