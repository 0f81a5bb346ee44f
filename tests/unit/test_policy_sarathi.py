"""Sarathi-Serve's rules in small scenes."""

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import CachedPrefix, IterationPlan, Launch, Preemption, Prefilled, View
from econoserve.policies.sarathi import Sarathi, SarathiConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "properties"))
from machine import Machine, Request


def ask(rid, prompt, output, arrival=0, cap=None):
    """A request whose prediction is wrong: the policy must not look at it."""
    prediction = LengthPrediction((1,), level=1.0, cap_tokens=output if cap is None else cap)
    return Request(rid, arrival, prompt, output, prediction)


def machine(requests, lag=0, **config):
    return Machine(Sarathi(SarathiConfig(**config)), requests, config["capacity_tokens"], lag=lag)


def steps(machine, count):
    for _ in range(count):
        machine.step()
    return machine.log[-1]


def waiting(machine):
    return [state.task.rid for state in machine.policy.books.waiting]


def test_decodes_come_first_then_the_prompt_under_way_then_new_ones():
    requests = [ask("a", 4, 30), ask("b", 24, 30, 1), ask("c", 9, 30, 1), ask("d", 9, 30, 1)]
    runner = machine(requests, capacity_tokens=400, chunk_tokens=10)
    plans = [steps(runner, 1) for _ in range(6)]
    assert [plan.prefill for plan in plans] == [
        (("a", 4),),
        (("b", 9),),
        (("b", 9),),
        (("b", 6), ("c", 3)),
        (("c", 6), ("d", 2)),
        (("d", 7),),
    ]
    assert [plan.resume for plan in plans] == [(), ("a",), (), (), ("b",), ("c",)]


def test_a_prompt_is_admitted_only_if_all_of_it_fits():
    # a takes 5 of 10 blocks; the first chunk of b needs 1, all of it 6; c does not pass it.
    requests = [ask("a", 20, 9), ask("b", 24, 9), ask("c", 4, 9)]
    runner = machine(requests, capacity_tokens=40, block_tokens=4, chunk_tokens=24)
    assert steps(runner, 1).prefill == (("a", 20),)


def test_no_more_requests_hold_kvc_than_max_seqs():
    requests = [ask(rid, 4, 5) for rid in "abc"]
    plan = steps(machine(requests, capacity_tokens=400, max_seqs=2), 1)
    assert plan.prefill == (("a", 4), ("b", 4))


def test_the_last_to_come_gives_way_nobody_is_admitted_then_and_it_waits_at_the_front():
    # 10 blocks: a and b take 9; both want another and a gets it. c could have those of b.
    requests = [ask("a", 16, 8), ask("b", 20, 8), ask("c", 8, 2)]
    runner = machine(requests, capacity_tokens=40, block_tokens=4)
    assert steps(runner, 1).prefill == (("a", 16), ("b", 20))
    plan = steps(runner, 1)
    assert (plan.resume, plan.prefill) == (("a",), ())
    assert plan.preempt == (("b", Preemption.RECOMPUTE),)
    # c would fit still, but b does not and is first.
    assert steps(runner, 1).prefill == ()
    assert waiting(runner) == ["b", "c"]
    while not (plan := steps(runner, 1)).prefill:
        assert plan.preempt == ()
    assert plan.prefill == (("b", 21), ("c", 8))


def test_the_prompt_under_way_is_not_preempted_the_last_that_decodes_waits_for_it():
    # 8 blocks: a and the whole of b take 7, a takes the 8th and wants another one.
    requests = [ask("a", 16, 12), ask("b", 12, 9, arrival=9)]
    runner = machine(requests, capacity_tokens=32, block_tokens=4, chunk_tokens=2)
    preempted = {}
    while not runner.finish_order:
        plan = steps(runner, 1)
        for rid, how in plan.preempt:
            preempted.setdefault((rid, how), plan)
    assert list(preempted) == [("a", Preemption.PARK), ("b", Preemption.RECOMPUTE)]
    assert preempted["a", Preemption.PARK].prefill == (("b", 2),)
    assert preempted["b", Preemption.RECOMPUTE].resume == ("a",)
    assert runner.finish_order == ["a"]


def test_decodes_are_never_held_back_even_beyond_the_budget():
    requests = [ask(rid, 1, 30) for rid in "abc"] + [ask("late", 5, 3, arrival=4)]
    runner = machine(requests, capacity_tokens=400, chunk_tokens=2)
    assert steps(runner, 8).prefill == ()
    assert len(runner.policy.books.running) == 2
    policy = Sarathi(SarathiConfig(capacity_tokens=400, chunk_tokens=2))
    parts = tuple(Prefilled(rid, 1, 0, True) for rid in "abc")
    for request in requests:
        policy.add(request.task())
    policy.on_launch(IterationPlan(), Launch(prefilled=parts))
    plan = policy.plan(View(0.0, 400, 3, 9, 9))
    assert (plan.resume, plan.prefill) == (("a", "b", "c"), ())


def test_an_admitted_prompt_takes_all_its_blocks_at_once():
    # Of 10 blocks a takes 2 and b 7, of which the first chunk fills 1; c needs 2.
    requests = [ask("a", 8, 9), ask("b", 28, 9), ask("c", 8, 9)]
    runner = machine(requests, capacity_tokens=40, block_tokens=4, chunk_tokens=12)
    assert steps(runner, 1).prefill == (("a", 8), ("b", 4))
    plan = steps(runner, 1)
    assert (plan.resume, plan.prefill, plan.preempt) == (("a",), (("b", 11),), ())


@pytest.mark.parametrize(("prompt", "admitted"), [(392, True), (393, False)])
def test_an_admission_leaves_the_watermark_free(prompt, admitted):
    # 100 blocks, of which the watermark keeps 1 and "a" takes 1.
    requests = [ask("a", 4, 5), ask("b", prompt, 2)]
    plan = steps(machine(requests, capacity_tokens=400, block_tokens=4), 1)
    assert (("b", prompt) in plan.prefill) is admitted


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
        runner = machine(
            [ask("a", prompt, output)], capacity_tokens=10, block_tokens=4, chunk_tokens=4
        )
        runner.run(limit=20)
        assert (runner.failures, runner.requests["a"].preempted) == (0, 0)


@pytest.mark.parametrize(
    ("prefix", "prefill"),
    [(CachedPrefix(16, 0), (("sharer", 14),)), (CachedPrefix(16, 16), ())],
    ids=["held by another", "held by nobody"],
)
def test_cached_tokens_are_not_computed_and_taken_only_if_nobody_holds_them(prefix, prefill):
    policy = Sarathi(SarathiConfig(capacity_tokens=44, block_tokens=4))
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
        runner = machine(requests, lag=1, capacity_tokens=64, block_tokens=4, chunk_tokens=9)
        runner.run(limit=10_000)
        logs.append(runner.log)
    assert logs[0] == logs[1] == logs[2]


@pytest.mark.parametrize(
    "field", ("capacity_tokens", "block_tokens", "chunk_tokens", "max_seqs", "watermark_fraction")
)
def test_impossible_constants_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=-1: give "):
        SarathiConfig(**{"capacity_tokens": 100, field: -1})


def test_the_defaults_are_those_of_the_original():
    config = SarathiConfig(capacity_tokens=1)
    assert (config.chunk_tokens, config.max_seqs) == (512, 128)
    assert (config.block_tokens, config.watermark_fraction) == (16, 0.01)


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
    SarathiConfig,
    capacity_tokens=st.just(203),
    chunk_tokens=st.sampled_from((1, 5, 64, 500)),
    block_tokens=st.sampled_from((1, 7, 16)),
    watermark_fraction=st.sampled_from((0.0, 0.01, 0.2)),
    max_seqs=st.sampled_from((1, 4, 100)),
)


@settings(max_examples=60)
@given(workloads(203), configs, st.integers(1, 8), st.integers(0, 1), st.none() | st.integers(0, 9))
def test_every_request_ends_and_no_allocation_fails(requests, config, max_running, lag, seed):
    drops = None if seed is None else random.Random(seed)
    policy = Sarathi(config)
    runner = Machine(policy, requests, config.capacity_tokens, max_running, lag, drops)
    runner.run(limit=5_000 + 300 * sum(one.prompt_tokens + one.true_tokens for one in requests))
    assert runner.failures == 0
    assert len(runner.finish_order) == len(requests)
    assert len(policy.books) == len(policy.ledger) == policy.ledger.held_tokens == 0
