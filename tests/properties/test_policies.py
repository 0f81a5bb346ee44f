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
from drawn import CAPACITY, exact, followers, run_some, work, workloads, worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import Machine, Request, World

from econoserve.core.order import OrderConfig
from econoserve.core.types import NeverFits, Slo, Task
from econoserve.policies import POLICIES, make_policy

NEVER_PREEMPT = ("d", "sd", "sdo", "full", "plus", "orca")
"""Policies that promise it, given that predictions and limits are exact."""

names = st.sampled_from(sorted(POLICIES))
# The default reserve is a fiftieth; what needs it, too, can only run alone.
requests = workloads(most=15, spare=CAPACITY // 50)
mispredicted = workloads(most=15, spare=CAPACITY // 50, wrong=True)


def assert_drained(machine):
    policy = machine.policy
    assert machine.failures == 0
    assert len(policy.ledger) == policy.ledger.held_tokens == policy.ledger.promised_tokens == 0
    assert len(policy.books) == 0
    finished = sorted(machine.finish_order + machine.rejected)
    assert finished == sorted(machine.requests)


@settings(max_examples=300)
@given(names, requests, st.integers(1, 8), st.integers(0, 1), followers)
def test_exact_predictions(name, requests, max_running, lag, world):
    machine = Machine(
        make_policy(name, CAPACITY), requests, CAPACITY, max_running, lag, world=world
    )
    machine.run(limit=1_000 + 60 * work(requests))
    assert_drained(machine)
    if name in NEVER_PREEMPT:
        assert all(request.preempted == request.moved == 0 for request in requests)


@settings(max_examples=400)
@given(
    names,
    mispredicted,
    st.integers(1, 8),
    st.integers(0, 1),
    st.integers(0, 99) | st.none(),
    worlds,
)
def test_wrong_predictions(name, requests, max_running, lag, seed, world):
    policy = make_policy(name, CAPACITY)
    drops = None if seed is None else random.Random(seed)
    machine = Machine(policy, requests, CAPACITY, max_running, lag, drops, world)
    machine.run(limit=3_000 + 300 * work(requests))
    assert_drained(machine)
    assert all(request.produced == request.true_tokens for request in requests)


@settings(max_examples=150)
@given(names, mispredicted, st.integers(0, 60), worlds)
def test_a_restored_policy_plans_what_the_original_does(name, requests, steps, world):
    machine = Machine(make_policy(name, CAPACITY), requests, CAPACITY, 8, world=world)
    run_some(machine, steps)
    # The machine refers to the policy, so it is restored with it; the original just goes on.
    restored = pickle.loads(pickle.dumps(machine))
    for each in (machine, restored):
        run_some(each, 40)
    assert restored.log == machine.log
    assert restored.finish_order == machine.finish_order


@settings(max_examples=100)
@given(names, mispredicted, st.data(), worlds)
def test_aborts_at_any_moment_leave_nothing(name, requests, data, world):
    machine = Machine(make_policy(name, CAPACITY), requests, CAPACITY, world=world)
    doomed = data.draw(st.sets(st.sampled_from([request.rid for request in requests])))
    run_some(machine, data.draw(st.integers(0, 80)))
    for rid in sorted(doomed):
        machine.abort(rid)
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


WORLDS = {"kind": World(), "few rows, parts skipped": World(rows=6, skips=5, timed=True)}


@pytest.mark.parametrize("world", sorted(WORLDS))
@pytest.mark.parametrize("flood", sorted(ADVERSARIES))
@pytest.mark.parametrize("name", ["d", "sd", "sdo", "full", "plus"])
def test_no_task_starves(name, flood, world):
    """A large request without an SLO is served long before the flood is over."""
    constants = {"starvation_s": 1.0}
    policy = make_policy(name, CAPACITY, **constants)
    large = Request("large", 0, 120, 60, exact(60))
    # It meets a machine that is busy already.
    early = stream(12, 0, 30, 40, Slo(ttft_s=5.0), first=0)
    for number, request in enumerate(early):
        request.rid = f"e{number}"
    requests = [*early, large, *copy.deepcopy(ADVERSARIES[flood])]
    machine = Machine(policy, requests, CAPACITY, max_running=8, world=WORLDS[world])
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
from machine import Machine, Request, World
from prefixes import Segment
from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import Slo
from econoserve.policies import POLICIES, make_policy
root = Segment("root", 30)
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
        path = (root, Segment(f"root/{draw.randint(0, 3)}", 10))[: draw.randint(0, 2)]
        path = path if prompt > 40 else ()
        arrival = draw.randint(0, 60)
        requests.append(Request(rid, arrival, prompt, true, prediction, slo, path=path))
    world = World(rows=10, skips=3, timed=True)
    machine = Machine(make_policy(name, 200), requests, 200, max_running=8, world=world)
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
