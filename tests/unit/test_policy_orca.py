"""Orca's rules in small scenes."""

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import CachedPrefix, IterationPlan, Launch, Prefilled, View
from econoserve.policies.orca import Orca, OrcaConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "properties"))
from machine import Machine, Request


def ask(rid, prompt, output, arrival=0, cap=None):
    """A request whose prediction is wrong: the policy must look at its cap only."""
    prediction = LengthPrediction((1,), level=1.0, cap_tokens=output if cap is None else cap)
    return Request(rid, arrival, prompt, output, prediction)


def machine(requests, lag=0, **config):
    return Machine(Orca(OrcaConfig(**config)), requests, config["capacity_tokens"], lag=lag)


def steps(machine, count):
    for _ in range(count):
        machine.step()
    return machine.log[-1]


def test_a_prompt_and_its_longest_response_are_reserved_in_order_of_arrival():
    # a may take 60, b 50, c 10: b does not fit beside a, and c does not pass it.
    requests = [ask("a", 20, 2, cap=40), ask("b", 10, 2, cap=40), ask("c", 5, 2, cap=5)]
    runner = machine(requests, capacity_tokens=100)
    assert steps(runner, 1).prefill == (("a", 20),)
    assert steps(runner, 1).prefill == ()
    assert runner.finish_order == ["a"]
    assert steps(runner, 1).prefill == (("b", 10), ("c", 5))


def test_what_a_response_does_not_use_stays_reserved_until_it_ends():
    requests = [ask("a", 20, 9, cap=60), ask("b", 10, 2, cap=20)]
    runner = machine(requests, capacity_tokens=100)
    while not runner.finish_order:
        assert ("b", 10) not in steps(runner, 1).prefill
    assert steps(runner, 1).prefill == (("b", 10),)


@pytest.mark.parametrize(("reserve", "admitted"), [(0, 3), (50, 2), (51, 1)])
def test_reserve_tokens_sets_the_longest_context_for_all(reserve, admitted):
    requests = [ask(rid, 5, 5) for rid in "abc"]
    plan = steps(machine(requests, capacity_tokens=100, reserve_tokens=reserve), 1)
    assert len(plan.prefill) == admitted


def test_whole_prompts_join_the_decodes_of_an_iteration():
    requests = [ask("a", 4, 9), ask("b", 300, 9, arrival=1)]
    runner = machine(requests, capacity_tokens=1000)
    steps(runner, 1)
    plan = steps(runner, 1)
    assert (plan.resume, plan.prefill, plan.preempt) == (("a",), (("b", 300),), ())
    assert steps(runner, 1).resume == ("b",)
    assert list(runner.policy.books.running) == ["a", "b"]


def test_a_batch_has_no_more_than_max_seqs():
    requests = [ask(rid, 4, 5) for rid in "abc"]
    plan = steps(machine(requests, capacity_tokens=400, max_seqs=2), 1)
    assert plan.prefill == (("a", 4), ("b", 4))


def test_a_request_that_could_outgrow_the_kvc_runs_alone():
    requests = [ask("a", 10, 5, cap=10**6), ask("b", 1, 1, cap=1)]
    runner = machine(requests, capacity_tokens=100)
    assert steps(runner, 1).prefill == (("a", 10),)
    runner.run(limit=50)
    assert runner.finish_order == ["a", "b"]


def test_a_prompt_that_the_machine_cut_short_goes_on_first():
    policy = Orca(OrcaConfig(capacity_tokens=400))
    policy.add(ask("a", 30, 5).task())
    policy.add(ask("b", 4, 5).task())
    policy.on_launch(IterationPlan(), Launch(prefilled=(Prefilled("a", 10, 0, False),)))
    assert policy.plan(View(0.0, 400, 10, 9, 9)).prefill == (("a", 20), ("b", 4))


def test_cached_tokens_are_not_computed():
    policy = Orca(OrcaConfig(capacity_tokens=400))
    policy.add(ask("a", 30, 5).task())
    view = View(0.0, 400, 0, 9, 9, lambda rid: CachedPrefix(12, 12))
    assert policy.plan(view).prefill == (("a", 18),)


def test_predictions_change_nothing():
    logs = []
    for quantiles in ((1,), (5, 50, 500), ()):
        requests = [ask(f"r{n}", 5 + 7 * n % 23, 3 + 5 * n % 17, n) for n in range(12)]
        for request in requests:
            request.prediction = LengthPrediction(quantiles, 0.5, request.prediction.cap_tokens)
        runner = machine(requests, lag=1, capacity_tokens=64)
        runner.run(limit=10_000)
        logs.append(runner.log)
    assert logs[0] == logs[1] == logs[2]


@pytest.mark.parametrize("field", ("capacity_tokens", "reserve_tokens", "max_seqs"))
def test_impossible_constants_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=-1: give "):
        OrcaConfig(**{"capacity_tokens": 100, field: -1})


@st.composite
def workloads(draw, capacity):
    requests = []
    for number in range(draw(st.integers(1, 20))):
        prompt = draw(st.integers(1, capacity // 2) | st.integers(1, capacity - 3))
        output = draw(st.integers(1, min(60, capacity - prompt - 1)))
        cap = draw(st.sampled_from((output, capacity - prompt - 1, 10**6)))
        requests.append(ask(f"r{number}", prompt, output, draw(st.integers(0, 30)), cap))
    return requests


configs = st.builds(
    OrcaConfig,
    capacity_tokens=st.just(203),
    reserve_tokens=st.sampled_from((0, 50, 203)),
    max_seqs=st.sampled_from((1, 4, 100)),
)


@settings(max_examples=60)
@given(workloads(203), configs, st.integers(1, 8), st.integers(0, 1), st.none() | st.integers(0, 9))
def test_every_request_ends_and_nobody_is_preempted(requests, config, max_running, lag, seed):
    drops = None if seed is None else random.Random(seed)
    policy = Orca(config)
    runner = Machine(policy, requests, config.capacity_tokens, max_running, lag, drops)
    runner.run(limit=5_000 + 300 * sum(one.prompt_tokens + one.true_tokens for one in requests))
    assert runner.failures == 0
    assert all(one.preempted == one.moved == 0 for one in requests)
    assert len(runner.finish_order) == len(requests)
    assert len(policy.books) == len(policy.ledger) == policy.ledger.held_tokens == 0
