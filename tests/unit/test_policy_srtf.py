"""The rules of shortest remaining time first, in small scenes."""

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import CachedPrefix, IterationPlan, Launch, Preemption, Prefilled, View
from econoserve.policies.srtf import Srtf, SrtfConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "properties"))
from machine import Machine, Request


def ask(rid, prompt, output, arrival=0, predicted=None):
    predicted = (output if predicted is None else predicted,)
    return Request(rid, arrival, prompt, output, LengthPrediction(predicted, 1.0, 10**6))


def machine(requests, lag=0, max_running=64, **config):
    policy = Srtf(SrtfConfig(**config))
    return Machine(policy, requests, config["capacity_tokens"], max_running, lag)


def steps(machine, count):
    for _ in range(count):
        machine.step()
    return machine.log[-1]


def holding(policy, *requests):
    """Let prompts be computed; their GTs are ready."""
    for request in requests:
        policy.add(request.task())
        part = Prefilled(request.rid, request.prompt_tokens, 0, True)
        policy.on_launch(IterationPlan(), Launch(prefilled=(part,)))


def test_the_shortest_prediction_goes_first_whoever_came_first():
    requests = [ask("a", 4, 30), ask("b", 4, 10), ask("c", 4, 20)]
    assert steps(machine(requests, capacity_tokens=400), 1).prefill == (
        ("b", 4),
        ("c", 4),
        ("a", 4),
    )


def test_a_shorter_newcomer_takes_the_place_of_a_longer_one_that_keeps_its_kvc():
    requests = [ask("a", 4, 40), ask("b", 4, 5, arrival=3)]
    runner = machine(requests, capacity_tokens=400, max_running=1)
    steps(runner, 3)
    held = runner.requests["a"].held
    plan = steps(runner, 1)
    assert (plan.prefill, plan.preempt) == ((("b", 4),), (("a", Preemption.PARK),))
    assert runner.requests["a"].held == held
    runner.run(limit=99)
    assert runner.finish_order == ["b", "a"]
    assert runner.requests["a"].preempted == 0


def test_what_is_left_counts_not_what_is_out():
    # At its arrival b needs 20 and a 15 of 40.
    requests = [ask("a", 4, 40), ask("b", 4, 20, arrival=25)]
    runner = machine(requests, capacity_tokens=400, max_running=1, preemptible_fraction=1.0)
    runner.run(limit=99)
    assert runner.finish_order == ["a", "b"]


@pytest.mark.parametrize(("fraction", "order"), [(0.8, "ab"), (1.0, "ba")])
def test_a_response_that_is_nearly_done_is_not_preempted(fraction, order):
    # At the arrival of b, 8 of 10 tokens of a are out, and it needs 2 more; b needs one.
    requests = [ask("a", 4, 10), ask("b", 4, 1, arrival=8)]
    config = {"capacity_tokens": 400, "max_running": 1, "preemptible_fraction": fraction}
    runner = machine(requests, **config)
    runner.run(limit=99)
    assert "".join(runner.finish_order) == order


def test_a_response_that_outlives_its_prediction_is_predicted_anew():
    # a was predicted to take 5; with 5 out it is taken to need 16 more, and b 10.
    requests = [ask("a", 4, 40, predicted=5), ask("b", 4, 10)]
    runner = machine(requests, capacity_tokens=400, max_running=1, preemptible_fraction=1.0)
    runner.run(limit=99)
    assert runner.finish_order == ["b", "a"]
    assert runner.requests["a"].moved == 1


def test_the_budget_counts_decodes_and_cuts_the_last_prompt_which_goes_on():
    requests = [ask("a", 2, 9), ask("b", 20, 20, arrival=1), ask("c", 20, 30, arrival=1)]
    runner = machine(requests, capacity_tokens=400, max_batch_tokens=16)
    plans = [steps(runner, 1) for _ in range(5)]
    assert [plan.prefill for plan in plans] == [
        (("a", 2),),
        (("b", 15),),
        (("b", 5), ("c", 10)),
        (("c", 10),),
        (),
    ]
    assert [plan.resume for plan in plans[1:4]] == [("a",), (), ("b",)]


def test_one_prompt_at_a_time_is_unfinished_but_whole_ones_pass_it():
    requests = [ask("a", 40, 30), ask("b", 20, 5, arrival=1), ask("c", 3, 8, arrival=1)]
    runner = machine(requests, capacity_tokens=400, max_batch_tokens=16)
    assert steps(runner, 1).prefill == (("a", 16),)
    assert steps(runner, 1).prefill == (("a", 13), ("c", 3))


def test_the_longest_gives_its_kvc_up_and_no_more_than_needed():
    for how in (Preemption.OFFLOAD, Preemption.RECOMPUTE):
        policy = Srtf(SrtfConfig(capacity_tokens=100, preemption=how))
        lengths = {"a": 30, "b": 50, "c": 40}
        holding(policy, *(ask(rid, 30, length) for rid, length in lengths.items()))
        policy.add(ask("short", 12, 5).task())
        plan = policy.plan(View(0.0, 100, 90, 9, 9))
        assert (plan.prefill, plan.preempt) == ((("short", 12),), (("b", how),))
        assert plan.resume == ("a", "c")


def test_who_does_not_fit_lets_nobody_pass():
    policy = Srtf(SrtfConfig(capacity_tokens=100))
    holding(policy, ask("a", 60, 10))
    for request in (ask("b", 50, 20), ask("c", 1, 30)):
        policy.add(request.task())
    plan = policy.plan(View(0.0, 100, 60, 9, 9))
    assert (plan.resume, plan.prefill, plan.preempt) == (("a",), (), ())


def test_offloaded_kvc_comes_back_by_rank():
    requests = [ask("a", 60, 30), ask("b", 60, 5, arrival=2)]
    runner = machine(requests, capacity_tokens=100)
    plan = steps(runner, 3)
    assert (plan.prefill, plan.preempt) == ((("b", 60),), (("a", Preemption.OFFLOAD),))
    runner.run(limit=99)
    assert runner.finish_order == ["b", "a"]
    assert sum(plan.resume == ("a",) for plan in runner.log) == 2
    assert [part for plan in runner.log for part in plan.prefill] == [("a", 60), ("b", 60)]


def test_the_rest_of_a_prompt_under_way_is_kept_free():
    policy = Srtf(SrtfConfig(capacity_tokens=100, max_batch_tokens=10))
    policy.add(ask("a", 60, 50).task())
    policy.on_launch(IterationPlan(), Launch(prefilled=(Prefilled("a", 10, 0, False),)))
    policy.add(ask("b", 41, 5).task())
    policy.add(ask("c", 5, 9).task())
    assert policy.plan(View(0.0, 100, 10, 9, 9)).prefill == (("a", 5), ("c", 5))
    policy = Srtf(SrtfConfig(capacity_tokens=100, max_batch_tokens=99))
    policy.add(ask("a", 60, 50).task())
    policy.on_launch(IterationPlan(), Launch(prefilled=(Prefilled("a", 10, 0, False),)))
    policy.add(ask("b", 41, 5).task())
    assert policy.plan(View(0.0, 100, 10, 9, 9)).prefill == (("a", 50),)


@pytest.mark.parametrize(("max_running", "rows"), [(2, 9), (9, 2)])
def test_the_machine_limits_the_batch(max_running, rows):
    policy = Srtf(SrtfConfig(capacity_tokens=400))
    for rid in "abc":
        policy.add(ask(rid, 4, 5).task())
    plan = policy.plan(View(0.0, 400, 0, rows, max_running))
    assert plan.prefill == (("a", 4), ("b", 4))


def test_cached_tokens_are_not_computed_and_taken_only_if_nobody_holds_them():
    for prefix, prefill in ((CachedPrefix(16, 0), (("b", 4),)), (CachedPrefix(16, 16), ())):
        policy = Srtf(SrtfConfig(capacity_tokens=100))
        holding(policy, ask("a", 60, 1))
        policy.add(ask("b", 20, 5).task())
        view = View(0.0, 100, 90, 9, 9, lambda rid, prefix=prefix: prefix)
        assert policy.plan(view).prefill == prefill


def test_where_only_a_pinned_prefix_is_in_the_way_everybody_gives_way():
    policy = Srtf(SrtfConfig(capacity_tokens=100))
    policy.add(ask("a", 80, 20).task())
    part = Prefilled("a", 20, 60, True)
    policy.on_launch(IterationPlan(), Launch(prefilled=(part,)))
    policy.add(ask("b", 50, 5).task())
    plan = policy.plan(View(0.0, 100, 80, 9, 9))
    assert (plan.prefill, plan.preempt) == ((), (("a", Preemption.OFFLOAD),))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("capacity_tokens", 0),
        ("max_batch_tokens", 0),
        ("preemptible_fraction", -2),
        ("preemptible_fraction", float("nan")),
        ("preemption", Preemption.PARK),
    ],
)
def test_impossible_constants_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}=.*: give "):
        SrtfConfig(**{"capacity_tokens": 100, field: value})


def test_the_defaults_are_those_of_the_originals():
    config = SrtfConfig(capacity_tokens=1)
    assert (config.max_batch_tokens, config.preemptible_fraction) == (512, 0.8)
    assert config.preemption is Preemption.OFFLOAD


@st.composite
def workloads(draw, capacity):
    requests = []
    for number in range(draw(st.integers(1, 20))):
        prompt = draw(st.integers(1, capacity // 2) | st.integers(1, capacity - 3))
        output = draw(st.integers(1, min(60, capacity - prompt - 1)))
        known = draw(st.lists(st.integers(1, 90), max_size=5).map(sorted))
        limit = draw(st.sampled_from((output, capacity - prompt - 1, 10**6)))
        prediction = LengthPrediction(tuple(known), draw(st.sampled_from((0.3, 1.0))), limit)
        arrival = draw(st.integers(0, 30))
        requests.append(Request(f"r{number}", arrival, prompt, output, prediction))
    return requests


configs = st.builds(
    SrtfConfig,
    capacity_tokens=st.just(203),
    max_batch_tokens=st.sampled_from((1, 20, 512)),
    preemptible_fraction=st.sampled_from((0.0, 0.8, 1.0)),
    preemption=st.sampled_from((Preemption.OFFLOAD, Preemption.RECOMPUTE)),
)


@settings(max_examples=40)
@given(workloads(203), configs, st.integers(1, 8), st.integers(0, 1), st.none() | st.integers(0, 9))
def test_every_request_ends_and_no_allocation_fails(requests, config, max_running, lag, seed):
    drops = None if seed is None else random.Random(seed)
    policy = Srtf(config)
    runner = Machine(policy, requests, config.capacity_tokens, max_running, lag, drops)
    runner.run(limit=5_000 + 300 * sum(one.prompt_tokens + one.true_tokens for one in requests))
    assert runner.failures == 0
    assert len(runner.finish_order) == len(requests)
    assert len(policy.books) == len(policy.ledger) == policy.ledger.held_tokens == 0
