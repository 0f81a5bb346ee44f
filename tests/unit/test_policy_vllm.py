"""The rules of vLLM as it was in 2023, in small scenes."""

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import CachedPrefix, IterationPlan, Launch, Preemption, Prefilled, View
from econoserve.policies.vllm import Vllm, VllmConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "properties"))
from machine import Machine, Request


def ask(rid, prompt, output, arrival=0, cap=None):
    """A request whose prediction is wrong: the policy must not look at it."""
    prediction = LengthPrediction((1,), level=1.0, cap_tokens=output if cap is None else cap)
    return Request(rid, arrival, prompt, output, prediction)


def machine(requests, lag=0, **config):
    return Machine(Vllm(VllmConfig(**config)), requests, config["capacity_tokens"], lag=lag)


def steps(machine, count):
    for _ in range(count):
        machine.step()
    return machine.log[-1]


def waiting(machine):
    return [state.task.rid for state in machine.policy.books.waiting]


def test_whole_prompts_go_in_order_of_arrival_and_nobody_passes():
    requests = [ask("a", 12, 5), ask("b", 36, 2), ask("c", 4, 5)]
    plan = steps(machine(requests, capacity_tokens=40, block_tokens=4), 1)
    assert plan.prefill == (("a", 12),)


def test_prompts_share_a_token_budget_and_are_never_cut():
    requests = [ask("a", 12, 5), ask("b", 8, 5), ask("c", 1, 5)]
    runner = machine(requests, capacity_tokens=400, max_batch_tokens=20)
    assert steps(runner, 1).prefill == (("a", 12), ("b", 8))
    assert steps(runner, 1).prefill == (("c", 1),)


def test_a_prompt_longer_than_the_budget_runs_alone():
    requests = [ask("a", 12, 5), ask("long", 30, 5), ask("c", 1, 5)]
    runner = machine(requests, capacity_tokens=400, max_batch_tokens=20)
    plans = [steps(runner, 1).prefill for _ in range(3)]
    assert plans == [(("a", 12),), (("long", 30),), (("c", 1),)]


def test_no_more_requests_hold_kvc_than_max_seqs():
    requests = [ask(rid, 4, 5) for rid in "abc"]
    plan = steps(machine(requests, capacity_tokens=400, max_seqs=2), 1)
    assert plan.prefill == (("a", 4), ("b", 4))


@pytest.mark.parametrize(("prompt", "admitted"), [(392, True), (393, False)])
def test_an_admission_leaves_the_watermark_free(prompt, admitted):
    # 100 blocks, of which the watermark keeps 1 and "a" takes 1.
    requests = [ask("a", 4, 5), ask("b", prompt, 2)]
    plan = steps(machine(requests, capacity_tokens=400, block_tokens=4), 1)
    assert (("b", prompt) in plan.prefill) is admitted


def test_while_prompts_are_computed_nobody_decodes():
    runner = machine([ask("a", 4, 9), ask("b", 8, 9, arrival=3)], capacity_tokens=400)
    assert steps(runner, 2).resume == ("a",)
    steps(runner, 1)
    held = runner.requests["a"].held
    plan = steps(runner, 1)
    assert (plan.prefill, plan.preempt) == ((("b", 8),), (("a", Preemption.PARK),))
    assert runner.requests["a"].held == held
    assert steps(runner, 1).resume == ("a", "b")


def test_the_last_to_come_gives_way_and_nobody_is_admitted_then():
    # 10 blocks: a and b take 9; both want another and a gets it. c could have those of b.
    requests = [ask("a", 16, 8), ask("b", 20, 8), ask("c", 8, 2)]
    runner = machine(requests, capacity_tokens=40, block_tokens=4)
    assert steps(runner, 1).prefill == (("a", 16), ("b", 20))
    plan = steps(runner, 1)
    assert (plan.resume, plan.prefill) == (("a",), ())
    assert plan.preempt == (("b", Preemption.RECOMPUTE),)


def test_who_gave_way_waits_at_the_front_and_is_computed_with_its_output():
    requests = [ask("a", 16, 8), ask("b", 20, 8), ask("c", 8, 2)]
    runner = machine(requests, capacity_tokens=40, block_tokens=4)
    # c would fit now, but b does not and is first.
    plan = steps(runner, 3)
    assert (waiting(runner), plan.prefill) == (["b", "c"], ())
    while not (plan := steps(runner, 1)).prefill:
        assert plan.preempt == ()
    assert plan.prefill == (("b", 21), ("c", 8))
    assert runner.finish_order == ["a"]


def test_a_free_block_is_asked_for_even_where_the_last_one_has_room():
    # 6 blocks, all taken by prompts whose last blocks have room.
    requests = [ask("a", 11, 5), ask("b", 11, 5)]
    runner = machine(requests, capacity_tokens=24, block_tokens=4)
    assert steps(runner, 1).prefill == (("a", 11), ("b", 11))
    assert steps(runner, 1).preempt == (("b", Preemption.RECOMPUTE),)


def test_several_that_give_way_keep_their_order_before_those_that_never_ran():
    requests = [ask(rid, 4, 30) for rid in "abcd"] + [ask(rid, 36, 2) for rid in "ef"]
    runner = machine(requests, lag=1, capacity_tokens=40, block_tokens=4)
    steps(runner, 2)
    while "c" not in waiting(runner):
        runner.step()
    assert waiting(runner) == ["c", "d", "e", "f"]
    runner.run(limit=10_000)
    assert runner.finish_order == list("abcdef")


def test_a_request_that_is_alone_uses_the_pool_to_its_last_token():
    for prompt, output in ((6, 4), (9, 1)):
        runner = machine([ask("a", prompt, output)], capacity_tokens=10, block_tokens=4)
        runner.run(limit=20)
        assert (runner.failures, runner.requests["a"].preempted) == (0, 0)


def test_a_prompt_that_the_machine_cut_short_goes_on_first():
    policy = Vllm(VllmConfig(capacity_tokens=400))
    policy.add(ask("a", 30, 5).task())
    policy.add(ask("b", 4, 5).task())
    policy.on_launch(IterationPlan(), Launch(prefilled=(Prefilled("a", 10, 0, False),)))
    assert policy.plan(View(0.0, 400, 10, 9, 9)).prefill == (("a", 20), ("b", 4))


@pytest.mark.parametrize(
    ("prefix", "prefill"),
    [(CachedPrefix(16, 0), (("sharer", 14),)), (CachedPrefix(16, 16), ())],
    ids=["held by another", "held by nobody"],
)
def test_cached_tokens_are_not_computed_and_taken_only_if_nobody_holds_them(prefix, prefill):
    policy = Vllm(VllmConfig(capacity_tokens=44, block_tokens=4))
    policy.add(ask("holder", 24, 9).task())
    policy.on_launch(IterationPlan(), Launch(prefilled=(Prefilled("holder", 24, 0, True),)))
    policy.add(ask("sharer", 30, 9).task())
    assert policy.plan(View(0.0, 44, 24, 9, 9, lambda rid: prefix)).prefill == prefill


def test_predictions_change_nothing():
    logs = []
    for quantiles in ((1,), (5, 50, 500), ()):
        requests = [ask(f"r{n}", 5 + 7 * n % 23, 3 + 5 * n % 17, n) for n in range(12)]
        for request in requests:
            request.prediction = LengthPrediction(quantiles, 0.5, request.prediction.cap_tokens)
        runner = machine(requests, lag=1, capacity_tokens=64, block_tokens=4, max_batch_tokens=30)
        runner.run(limit=10_000)
        logs.append(runner.log)
    assert logs[0] == logs[1] == logs[2]


@pytest.mark.parametrize(
    "field",
    ("capacity_tokens", "block_tokens", "max_batch_tokens", "max_seqs", "watermark_fraction"),
)
def test_impossible_constants_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=-1: give "):
        VllmConfig(**{"capacity_tokens": 100, field: -1})


def test_the_defaults_are_those_of_the_original():
    config = VllmConfig(capacity_tokens=1)
    assert (config.block_tokens, config.watermark_fraction) == (16, 0.01)
    assert (config.max_batch_tokens, config.max_seqs) == (2048, 256)


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
    VllmConfig,
    capacity_tokens=st.just(203),
    block_tokens=st.sampled_from((1, 7, 16)),
    watermark_fraction=st.sampled_from((0.0, 0.01, 0.2)),
    max_batch_tokens=st.sampled_from((1, 64, 500)),
    max_seqs=st.sampled_from((1, 4, 100)),
)


@settings(max_examples=60)
@given(workloads(203), configs, st.integers(1, 8), st.integers(0, 1), st.none() | st.integers(0, 9))
def test_every_request_ends_and_no_allocation_fails(requests, config, max_running, lag, seed):
    drops = None if seed is None else random.Random(seed)
    policy = Vllm(config)
    runner = Machine(policy, requests, config.capacity_tokens, max_running, lag, drops)
    runner.run(limit=5_000 + 300 * sum(one.prompt_tokens + one.true_tokens for one in requests))
    assert runner.failures == 0
    assert len(runner.finish_order) == len(requests)
    assert len(policy.books) == len(policy.ledger) == policy.ledger.held_tokens == 0
