"""Every policy on the obvious machine: what each promises, and what none may ever do."""

import copy
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import Machine, Request

from econoserve.core.lengths import LengthPrediction
from econoserve.core.order import OrderConfig
from econoserve.core.types import NeverFits, Outcome, Slo, Task
from econoserve.policies import POLICIES, make_policy

CAPACITY = 200

NEVER_PREEMPT = ("d", "sd", "sdo", "full", "plus", "orca")
"""Policies that promise it, given that predictions and limits are exact."""

names = st.sampled_from(sorted(POLICIES))


def exact(tokens):
    return LengthPrediction((tokens,), level=1.0, cap_tokens=tokens)


@st.composite
def requests_of(draw, wrong=False, most=15):
    requests = []
    for number in range(draw(st.integers(1, most))):
        prompt = draw(st.integers(1, 120))
        # The default reserve is a fiftieth; what needs it, too, can only run alone.
        true = draw(st.integers(1, min(100, CAPACITY - CAPACITY // 50 - prompt - 1)))
        prediction = exact(true)
        if wrong:
            quantiles = draw(st.lists(st.integers(1, 120), max_size=6).map(sorted))
            level = draw(st.sampled_from((0.3, 0.8, 1.0)))
            prediction = LengthPrediction(tuple(quantiles), level, CAPACITY - prompt - 1)
        slo = draw(st.sampled_from((Slo(), Slo(ttft_s=0.2), Slo(e2e_s=1.0), Slo(tpot_s=0.02))))
        arrival = draw(st.integers(0, 60))
        requests.append(Request(f"r{number}", arrival, prompt, true, prediction, slo))
    return requests


def work(requests):
    return sum(request.prompt_tokens + request.true_tokens for request in requests)


def assert_drained(machine):
    policy = machine.policy
    assert machine.failures == 0
    assert len(policy.ledger) == policy.ledger.held_tokens == policy.ledger.promised_tokens == 0
    assert len(policy.books) == 0
    finished = sorted(machine.finish_order + machine.rejected)
    assert finished == sorted(machine.requests)


@settings(max_examples=400)
@given(names, requests_of(), st.integers(1, 8), st.integers(0, 1))
def test_exact_predictions(name, requests, max_running, lag):
    machine = Machine(make_policy(name, CAPACITY), requests, CAPACITY, max_running, lag)
    machine.run(limit=1_000 + 60 * work(requests))
    assert_drained(machine)
    if name in NEVER_PREEMPT:
        assert all(request.preempted == 0 for request in requests)


@settings(max_examples=400)
@given(names, requests_of(wrong=True), st.integers(1, 8), st.integers(0, 1), st.integers(0, 99))
def test_wrong_predictions(name, requests, max_running, lag, seed):
    policy = make_policy(name, CAPACITY)
    machine = Machine(policy, requests, CAPACITY, max_running, lag, random.Random(seed))
    machine.run(limit=3_000 + 300 * work(requests))
    assert_drained(machine)
    assert all(request.produced == request.true_tokens for request in requests)


@settings(max_examples=100)
@given(names, requests_of(wrong=True), st.integers(0, 40))
def test_a_restored_policy_plans_the_same(name, requests, steps):
    machine = Machine(make_policy(name, CAPACITY), requests, CAPACITY)
    for _ in range(steps):
        if machine.alive():
            machine.step()
    others = (pickle.loads(pickle.dumps(machine)), copy.deepcopy(machine))
    for other in others:
        for _ in range(30):
            if other.alive():
                other.step()
    assert others[0].log == others[1].log
    assert others[0].finish_order == others[1].finish_order


@settings(max_examples=100)
@given(names, requests_of(wrong=True), st.data())
def test_aborts_at_any_moment_leave_nothing(name, requests, data):
    machine = Machine(make_policy(name, CAPACITY), requests, CAPACITY)
    doomed = data.draw(st.sets(st.sampled_from([request.rid for request in requests])))
    for _ in range(data.draw(st.integers(0, 80))):
        if machine.alive():
            machine.step()
    for rid in sorted(doomed):
        request = machine.requests[rid]
        if request.state != "done":
            request.state, request.held, request.offloaded = "done", 0, 0
            machine.policy.remove(rid, Outcome.ABORTED)
            machine.finish_order.append(rid)
    machine.run(limit=200_000)
    assert_drained(machine)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_task_that_can_never_fit_is_refused_before_it_costs_anything(name):
    policy = make_policy(name, CAPACITY)
    with pytest.raises(NeverFits, match=f"prompt_tokens={CAPACITY}.*--max-total-tokens"):
        policy.add(Task("big", 0.0, CAPACITY, exact(10)))
    machine = Machine(policy, [Request("small", 0, 10, 5, exact(5))], CAPACITY)
    machine.run(limit=100)
    assert_drained(machine)


def stream(count, every, prompt, true, slo, first=1):
    return [
        Request(f"s{number}", first + number * every, prompt, true, exact(true), slo)
        for number in range(count)
    ]


ADVERSARIES = {
    "a flood of short prompts": stream(1500, 1, 8, 12, Slo()),
    "a flood with tight deadlines": stream(1500, 1, 8, 12, Slo(ttft_s=0.01, e2e_s=0.2)),
    "a flood of equal size": stream(400, 4, 90, 30, Slo(e2e_s=2.0)),
}


@pytest.mark.parametrize("flood", sorted(ADVERSARIES))
@pytest.mark.parametrize("name", ["d", "sd", "sdo", "full", "plus"])
def test_no_task_starves(name, flood):
    """A large request without an SLO is served long before the flood is over."""
    constants = {"starvation_s": 1.0}
    policy = make_policy(name, CAPACITY, **constants)
    large = Request("large", 0, 120, 60, exact(60))
    # It meets a machine that is busy already.
    early = stream(12, 0, 30, 40, Slo(ttft_s=5.0), first=0)
    for number, request in enumerate(early):
        request.rid = f"e{number}"
    requests = [*early, large, *copy.deepcopy(ADVERSARIES[flood])]
    machine = Machine(policy, requests, CAPACITY, max_running=8)
    patience = (10.0 + 1.0 + 2.0) / 0.01
    while large.state != "done":
        assert machine.iteration < patience + 400, "the large request starves"
        machine.step()
    assert machine.alive()


def test_a_demoted_task_does_not_starve():
    """Requests that keep their SLO fill the machine; one that lost its own has its turn."""
    order = OrderConfig(demoted_s=6.0)
    policy = make_policy("plus", CAPACITY, order=order, starvation_s=1.0)
    late = Request("late", 40, 120, 60, exact(60), Slo(ttft_s=0.001))
    flow = stream(800, 2, 8, 15, Slo(ttft_s=1.0), first=0)
    machine = Machine(policy, [*flow, late], CAPACITY, max_running=8)
    while late.state != "done":
        assert machine.iteration < (6.0 + 1.0 + 1.0) / 0.01 + 200, "the demoted request starves"
        machine.step()
    assert machine.iteration > 500, "it was not demoted"


SCRIPT = """
import json, random, sys
sys.path.insert(0, sys.argv[1])
from machine import Machine, Request
from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import Slo
from econoserve.policies import POLICIES, make_policy
out = {}
for name in sorted(POLICIES):
    draw = random.Random(11)
    requests = []
    for number in range(40):
        prompt, true = draw.randint(1, 120), draw.randint(1, 70)
        quantiles = tuple(sorted(draw.randint(1, 90) for _ in range(6)))
        prediction = LengthPrediction(quantiles, 0.5, 199 - prompt)
        slo = draw.choice((Slo(), Slo(ttft_s=0.2), Slo(e2e_s=1.0), Slo(tpot_s=0.02)))
        rid = f"{draw.getrandbits(64):x}"
        requests.append(Request(rid, draw.randint(0, 60), prompt, true, prediction, slo))
    machine = Machine(make_policy(name, 200), requests, 200, max_running=8)
    machine.run(limit=100_000)
    out[name] = [repr(plan) for plan in machine.log]
print(json.dumps(out))
"""


def test_plans_do_not_depend_on_the_hash_seed():
    logs = []
    for seed in ("0", "1", "4242"):
        answer = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        logs.append(json.loads(answer.stdout))
    assert logs[0] == logs[1] == logs[2]
    assert all(len(log) > 40 for log in logs[0].values())


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'best'.*plus.*vllm"):
        make_policy("best", 100)
