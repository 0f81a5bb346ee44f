"""The rules of FastServe's skip-join multi-level feedback queue, in small scenes."""

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from econoserve.core.cost import CostModel, IterationWork
from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import (
    CachedPrefix,
    IterationPlan,
    Launch,
    Outcome,
    Preemption,
    Prefilled,
    View,
)
from econoserve.policies.fastserve import FastServe, FastServeConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "properties"))
from machine import Machine, Request


def ask(rid, prompt, output, arrival=0, limit=None):
    """A request whose prediction is wrong: the policy must not look at it."""
    prediction = LengthPrediction((1,), level=1.0, cap_tokens=output if limit is None else limit)
    return Request(rid, arrival, prompt, output, prediction)


def make(fixed_s=0.004, per_token_s=0.001, **config):
    """A policy for which an iteration takes 4 ms and 1 ms for each prompt token."""
    return FastServe(FastServeConfig(**config), CostModel((fixed_s, per_token_s, 0.0, 0.0, 0.0)))


def machine(requests, lag=0, max_running=64, **config):
    return Machine(make(**config), requests, config["capacity_tokens"], max_running, lag)


def steps(machine, count):
    for _ in range(count):
        machine.step()
    return machine.log[-1]


def holding(policy, *requests):
    """Let prompts be computed, one per iteration; their GTs are ready."""
    for request in requests:
        policy.add(request.task())
        part = Prefilled(request.rid, request.prompt_tokens, 0, True)
        policy.on_launch(IterationPlan(), Launch(prefilled=(part,)))


def levels(policy):
    return {rid: standing.level for rid, standing in policy.standings.items()}


@pytest.mark.parametrize(("prompt", "level"), [(6, 0), (7, 1), (16, 1), (17, 2), (35, 2), (37, 3)])
def test_a_request_joins_the_first_level_whose_quantum_covers_its_prompt(prompt, level):
    policy = make(capacity_tokens=400)
    policy.add(ask("a", prompt, 5).task())
    assert levels(policy) == {"a": level}


def test_the_times_of_prompts_are_learned():
    policy = make(capacity_tokens=400)
    for tokens in range(1, 200):
        policy.on_iteration(IterationWork(prefill_tokens=tokens), 0.0001 * tokens)
    policy.add(ask("a", 37, 5).task())
    assert levels(policy) == {"a": 0}


def test_who_used_up_its_quantum_sinks_by_one_level_and_gets_a_new_one():
    # The prompt takes 8 ms, a decode 4: in all 12 of 10, then 24 of 20.
    runner = machine([ask("a", 4, 30)], capacity_tokens=400)
    seen = [steps(runner, 1) and levels(runner.policy)["a"] for _ in range(9)]
    assert seen == [0, 1, 1, 1, 1, 1, 1, 2, 2]


def test_higher_levels_go_first_and_those_left_out_keep_their_kvc():
    requests = [ask("a", 4, 30), ask("b", 4, 3, arrival=5)]
    runner = machine(requests, capacity_tokens=400, max_running=1)
    steps(runner, 5)
    held = runner.requests["a"].held
    plan = steps(runner, 1)
    assert (plan.prefill, plan.preempt) == ((("b", 4),), (("a", Preemption.PARK),))
    runner.run(limit=99)
    assert runner.finish_order == ["b", "a"]
    assert (runner.requests["a"].preempted, held) == (0, 8)


def test_of_one_level_those_who_ran_go_before_those_who_did_not():
    policy = make(capacity_tokens=400)
    policy.add(ask("waits", 1, 5).task())
    holding(policy, ask("ran", 1, 5))
    assert levels(policy) == {"waits": 0, "ran": 0}
    plan = policy.plan(View(0.0, 400, 1, 9, 1))
    assert (plan.resume, plan.prefill) == (("ran",), ())


def test_who_sinks_goes_before_those_of_the_lower_level():
    policy = make(capacity_tokens=400)
    holding(policy, ask("low", 16, 5))
    policy.add(ask("waits", 16, 5).task())
    for _ in range(2):
        holding(policy, ask("x", 1, 5))
        policy.remove("x", Outcome.FINISHED)
    holding(policy, ask("sinks", 6, 9))
    policy.on_launch(IterationPlan(), Launch(resumed=("sinks",), decoded=("sinks",)))
    assert levels(policy) == {"low": 1, "waits": 1, "sinks": 1}
    # It runs on, so it need not be resumed; behind it goes the one that ran before.
    assert policy.plan(View(0.0, 400, 23, 9, 1)).resume == ()
    assert policy.plan(View(0.0, 400, 23, 9, 2)).resume == ("low",)


def test_prompts_are_computed_whole_beside_decodes_up_to_a_budget_and_nobody_passes():
    requests = [ask("a", 2, 9), ask("b", 6, 9, arrival=1), ask("c", 6, 9, arrival=1)]
    requests += [ask("d", 1, 9, arrival=1)]
    runner = machine(requests, capacity_tokens=400, max_batch_tokens=10)
    plan = steps(runner, 2)
    assert (plan.resume, plan.prefill) == (("a",), (("b", 6),))


def test_a_prompt_beyond_the_budget_is_the_only_one():
    requests = [ask("a", 30, 9), ask("b", 1, 9)]
    runner = machine(requests, capacity_tokens=400, max_batch_tokens=10)
    assert [steps(runner, 1).prefill for _ in range(2)] == [(("b", 1),), (("a", 30),)]


def test_the_lowest_level_is_swapped_out_and_comes_back_without_being_computed_again():
    requests = [ask("long", 50, 30), ask("b", 20, 20, arrival=2), ask("new", 30, 2, arrival=4)]
    runner = machine(requests, capacity_tokens=100)
    plan = steps(runner, 5)
    assert plan.prefill == (("new", 30),)
    assert plan.preempt == (("long", Preemption.OFFLOAD),)
    runner.run(limit=200)
    assert all(request.preempted == 0 for request in requests)
    assert [rid for plan in runner.log for rid, _ in plan.prefill] == ["long", "b", "new"]


def test_no_more_is_swapped_out_than_needed():
    policy = make(capacity_tokens=100)
    holding(policy, ask("low", 30, 9), ask("lower", 37, 9), ask("high", 10, 9))
    policy.add(ask("new", 6, 9).task())
    # The new prompt takes 6 of 23, two decodes one each, and four may want a token then.
    assert policy.plan(View(0.0, 100, 77, 9, 9)).preempt == ()
    policy.add(ask("newer", 16, 9).task())
    assert policy.plan(View(0.0, 100, 77, 9, 9)).preempt == (("lower", Preemption.OFFLOAD),)


@pytest.mark.parametrize(("used", "preempt"), [(96, ()), (97, (("b", Preemption.OFFLOAD),))])
def test_swapping_out_is_proactive(used, preempt):
    # Two take a token each, and whoever is next two more.
    policy = make(capacity_tokens=100)
    holding(policy, ask("b", 37, 9), ask("a", 10, 9), ask("c", 6, 9))
    plan = policy.plan(View(0.0, 100, used, 9, 2))
    assert (plan.resume, plan.preempt) == (("c", "a"), preempt)


def test_no_prompt_starts_while_host_memory_is_nearly_full():
    plans = []
    for host in (400, 38):
        policy = make(capacity_tokens=100, host_tokens=host)
        holding(policy, ask("a", 37, 9))
        policy.on_launch(IterationPlan(), Launch(offloaded=("a",)))
        policy.add(ask("new", 2, 9).task())
        plans.append(policy.plan(View(0.0, 100, 0, 9, 9)))
    assert [plan.prefill for plan in plans] == [(("new", 2),), ()]
    assert plans[1].resume == ("a",)


def test_where_host_and_device_are_full_the_lowest_is_computed_again():
    policy = make(capacity_tokens=100, host_tokens=10)
    holding(policy, ask("low", 40, 9), ask("high", 20, 9), ask("mid", 30, 9))
    plan = policy.plan(View(0.0, 100, 100, 9, 9))
    assert plan.preempt == (("low", Preemption.RECOMPUTE),)
    assert plan.resume == ("mid", "high")
    # For a new prompt nobody is.
    policy.add(ask("new", 5, 9).task())
    plan = policy.plan(View(0.0, 100, 97, 9, 9))
    assert (plan.prefill, plan.preempt) == ((), ())
    assert plan.resume == ("mid", "high", "low")


def test_who_is_computed_again_stands_where_it_stood():
    policy = make(capacity_tokens=100)
    holding(policy, ask("a", 4, 30))
    for _ in range(9):
        policy.on_launch(IterationPlan(), Launch(resumed=("a",), decoded=("a",)))
    before = levels(policy)
    policy.requeue(ask("a", 13, 21).task())
    assert levels(policy) == before == {"a": 2}
    policy.requeue(ask("unknown", 4, 21).task())
    assert levels(policy)["unknown"] == 0


def test_who_did_not_run_for_long_goes_to_the_front_of_the_highest_level():
    config = {"capacity_tokens": 400, "starvation_s": 0.1, "starvation_iterations": 50}
    runner = machine([ask("a", 90, 5), *(ask(f"r{n}", 1, 3, 3 * n) for n in range(60))], **config)
    runner.max_running = 1
    started = next(n for n in range(200) if ("a", 90) in steps(runner, 1).prefill)
    assert started == 50
    assert levels(runner.policy)["a"] == 1


@pytest.mark.parametrize(("max_running", "rows"), [(2, 9), (9, 2)])
def test_the_machine_limits_the_batch(max_running, rows):
    policy = make(capacity_tokens=400)
    for rid in "abc":
        policy.add(ask(rid, 4, 5).task())
    plan = policy.plan(View(0.0, 400, 0, rows, max_running))
    assert plan.prefill == (("a", 4), ("b", 4))


def test_cached_tokens_are_not_computed_and_taken_only_if_nobody_holds_them():
    for prefix, preempt in ((CachedPrefix(16, 0), 0), (CachedPrefix(16, 16), 1)):
        policy = make(capacity_tokens=100)
        holding(policy, ask("low", 80, 5))
        policy.add(ask("new", 20, 5).task())
        view = View(0.0, 100, 89, 9, 9, lambda rid, prefix=prefix: prefix)
        plan = policy.plan(view)
        assert (plan.prefill, len(plan.preempt)) == ((("new", 4),), preempt)


def test_predictions_and_limits_change_nothing():
    logs = []
    for quantiles, limit in (((1,), 99), ((5, 50, 500), 999), ((), 10**6)):
        requests = [ask(f"r{n}", 5 + 7 * n % 23, 3 + 5 * n % 17, n) for n in range(12)]
        for request in requests:
            request.prediction = LengthPrediction(quantiles, 0.5, limit)
        runner = machine(requests, lag=1, capacity_tokens=64, max_running=3)
        runner.run(limit=10_000)
        logs.append(runner.log)
    assert logs[0] == logs[1] == logs[2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("capacity_tokens", 0),
        ("base_quantum_s", 0.0),
        ("quantum_ratio", 1.0),
        ("max_batch_tokens", 0),
        ("host_tokens", -1),
        ("least_host_fraction", 1.1),
        ("starvation_s", -0.1),
        ("starvation_iterations", 0),
    ],
)
def test_impossible_constants_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}: give "):
        FastServeConfig(**{"capacity_tokens": 100, field: value})


def test_the_defaults_are_those_of_the_original():
    config = FastServeConfig(capacity_tokens=1)
    assert (config.base_quantum_s, config.quantum_ratio) == (0.01, 2.0)
    assert (config.starvation_s, config.starvation_iterations) == (3.0, 1000)
    assert (config.max_batch_tokens, config.least_host_fraction) == (2048, 0.1)


@st.composite
def workloads(draw, capacity):
    requests = []
    for number in range(draw(st.integers(1, 20))):
        prompt = draw(st.integers(1, capacity // 2) | st.integers(1, capacity - 3))
        output = draw(st.integers(1, min(60, capacity - prompt - 1)))
        requests.append(ask(f"r{number}", prompt, output, draw(st.integers(0, 30))))
    return requests


configs = st.builds(
    FastServeConfig,
    capacity_tokens=st.just(203),
    base_quantum_s=st.sampled_from((0.001, 0.01, 1.0)),
    max_batch_tokens=st.sampled_from((1, 64, 500)),
    host_tokens=st.sampled_from((None, 0, 50, 500)),
    starvation_s=st.sampled_from((0.05, 3.0)),
    starvation_iterations=st.sampled_from((3, 1000)),
)


@settings(max_examples=40)
@given(workloads(203), configs, st.integers(1, 8), st.integers(0, 1), st.none() | st.integers(0, 9))
def test_every_request_ends_and_no_allocation_fails(requests, config, max_running, lag, seed):
    drops = None if seed is None else random.Random(seed)
    policy = FastServe(config)
    runner = Machine(policy, requests, config.capacity_tokens, max_running, lag, drops)
    runner.run(limit=5_000 + 300 * sum(one.prompt_tokens + one.true_tokens for one in requests))
    assert runner.failures == 0
    assert len(runner.finish_order) == len(requests)
    assert len(policy.books) == len(policy.ledger) == policy.ledger.held_tokens == 0
    assert not policy.standings
