"""The rules of stock SGLang's scheduler, in small scenes."""

import copy
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from econoserve.policies.sglang import SGLang, SGLangConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "properties"))
from machine import Machine, Request


def ask(rid, prompt, output, arrival=0, limit=None):
    """A request whose prediction is wrong: the policy must not look at it."""
    prediction = LengthPrediction((1,), level=1.0, cap_tokens=output if limit is None else limit)
    return Request(rid, arrival, prompt, output, prediction)


def machine(requests, lag=0, max_running=64, **config):
    policy = SGLang(SGLangConfig(**config))
    return Machine(policy, requests, config["capacity_tokens"], max_running, lag)


def steps(machine, count):
    for _ in range(count):
        machine.step()
    return machine.log[-1]


def decoding(policy, requests):
    """Let requests be in the batch that has generated as many tokens as given."""
    for request, generated in requests:
        policy.add(request.task())
        part = Prefilled(request.rid, request.prompt_tokens, 0, True)
        policy.on_launch(IterationPlan(), Launch(prefilled=(part,)))
        policy.on_tokens(request.rid, generated)


def test_prompts_go_first_and_nobody_decodes_meanwhile():
    runner = machine([ask("a", 4, 9), ask("b", 8, 9, arrival=2)], capacity_tokens=400)
    assert steps(runner, 2).resume == ("a",)
    held = runner.requests["a"].held
    plan = steps(runner, 1)
    assert (plan.prefill, plan.preempt) == ((("b", 8),), (("a", Preemption.PARK),))
    assert runner.requests["a"].held == held
    assert steps(runner, 1).resume == ("a", "b")


def test_a_pass_is_filled_to_the_chunk_and_the_cut_prompt_goes_on_first():
    requests = [ask("a", 20, 2), ask("b", 5, 2), ask("c", 20, 2), ask("d", 1, 2)]
    runner = machine(requests, capacity_tokens=400, chunked_prefill_tokens=16)
    passes = [steps(runner, 1).prefill for _ in range(3)]
    assert passes == [(("a", 16),), (("a", 4), ("b", 5), ("c", 7)), (("c", 13), ("d", 1))]


@pytest.mark.parametrize(("limit", "starts"), [(38, True), (39, False)])
def test_a_prompt_starts_if_its_whole_response_fits_beside_those_just_started(limit, starts):
    # Of 100 tokens "a" takes 10 and 1 and its limit of 9; b needs less than the 80 left.
    requests = [ask("a", 10, 9), ask("b", 40, 2, limit=limit), ask("c", 1, 2)]
    plan = steps(machine(requests, capacity_tokens=100), 1)
    assert (("b", 40) in plan.prefill) is starts
    assert plan.prefill[0] == ("a", 10) and (("c", 1) in plan.prefill) is False


@pytest.mark.parametrize(("limit", "starts"), [(34, True), (35, False)])
def test_those_in_the_batch_count_with_the_new_token_ratio(limit, starts):
    # "a" holds 10 and may decode 49 more: 90 - 0.7 * 49 = 55.7 must exceed 20 + limit + 1.
    requests = [ask("a", 10, 50), ask("b", 20, 2, arrival=1, limit=limit)]
    plan = steps(machine(requests, capacity_tokens=100), 2)
    assert plan.prefill == ((("b", 20),) if starts else ())


@pytest.mark.parametrize(("clip", "prompts"), [(4096, 1), (30, 2)])
def test_limits_count_clipped(clip, prompts):
    # With 30 tokens for a response, 59 are left for the 51 of "b".
    requests = [ask("a", 10, 9, limit=10**6), ask("b", 20, 2, limit=10**6)]
    plan = steps(machine(requests, capacity_tokens=100, clip_tokens=clip), 1)
    assert len(plan.prefill) == prompts


def test_who_found_no_room_is_not_tried_again_before_somebody_leaves():
    # The ratio falls at once: from the second decode on b would fit.
    requests = [ask("a", 10, 20, limit=60), ask("b", 20, 2, limit=30)]
    runner = machine(requests, capacity_tokens=100, decay_steps=1)
    while "a" not in runner.finish_order:
        assert ("b", 20) not in steps(runner, 1).prefill
    assert steps(runner, 1).prefill == (("b", 20),)


def test_a_pass_without_tokens_left_shuts_nobody_out():
    requests = [ask(rid, 16, 5) for rid in "abc"]
    runner = machine(requests, capacity_tokens=400, chunked_prefill_tokens=16)
    assert [steps(runner, 1).prefill for _ in range(3)] == [((rid, 16),) for rid in "abc"]


def test_the_ratio_decays_with_decodes_to_its_least_and_starts_anew_after_idleness():
    runner = machine([ask("a", 4, 30), ask("b", 4, 4, arrival=3)], capacity_tokens=400)
    ratio, policy = 0.7, runner.policy
    for number in range(8):
        assert policy.new_token_ratio == pytest.approx(ratio)
        decodes = steps(runner, 1).prefill == ()
        assert decodes is (number not in (0, 3))
        ratio -= (0.7 - 0.098) / 600 if decodes else 0
    policy.new_token_ratio = 0.0981
    steps(runner, 2)
    assert policy.new_token_ratio == pytest.approx(0.098)
    runner.run(limit=99)
    assert policy.new_token_ratio == 0.7


def test_the_shortest_responses_are_retracted_of_these_the_longest_prompts():
    policy = SGLang(SGLangConfig(capacity_tokens=100))
    batch = [(ask("a", 10, 90), 5), (ask("b", 20, 79), 3), (ask("c", 12, 87), 3)]
    decoding(policy, batch)
    plan = policy.plan(View(0.0, 100, 98, 9, 9))
    assert plan.preempt == (("b", Preemption.RECOMPUTE),)
    assert (plan.resume, plan.prefill) == (("a", "c"), ())
    assert policy.plan(View(0.0, 100, 97, 9, 9)).preempt == ()


def test_retraction_goes_on_until_the_others_find_their_tokens():
    policy = SGLang(SGLangConfig(capacity_tokens=100))
    decoding(policy, [(ask(rid, 1, 30), 9 - number) for number, rid in enumerate("abcde")])
    plan = policy.plan(View(0.0, 100, 100, 9, 9))
    assert [rid for rid, _ in plan.preempt] == ["e", "d", "c"]
    assert plan.resume == ("a", "b")


def test_after_a_retraction_the_ratio_is_what_was_used_and_a_little_more():
    policy = SGLang(SGLangConfig(capacity_tokens=100))
    batch = [(ask("a", 10, 90), 5), (ask("b", 20, 79), 3), (ask("c", 12, 70), 3)]
    decoding(policy, batch)
    plan = policy.plan(View(0.0, 100, 98, 9, 9))
    retracted = ask("b", 20, 79)
    retracted.produced = 3
    policy.requeue(retracted.task())
    policy.on_launch(plan, Launch(resumed=plan.resume, decoded=plan.resume))
    # Limits are cut to what the KVC can hold: 88 and 70.
    assert policy.new_token_ratio == pytest.approx((5 + 3 + 2 * 20) / (88 + 70 + 1))


def test_the_retracted_go_to_the_end_of_the_queue_and_are_computed_with_their_output():
    requests = [ask("a", 30, 50, limit=60), ask("b", 30, 50, limit=60)]
    requests += [ask("c", 50, 2, arrival=3)]
    runner = machine(requests, capacity_tokens=100, clip_tokens=10)
    assert steps(runner, 1).prefill == (("a", 30), ("b", 30))
    while not (plan := steps(runner, 1)).preempt:
        assert plan.prefill == ()
    assert plan.preempt == (("b", Preemption.RECOMPUTE),)
    assert [state.task.rid for state in runner.policy.books.waiting] == ["c", "b"]
    produced = runner.requests["b"].produced
    runner.run(limit=500)
    parts = [part for plan in runner.log for part in plan.prefill]
    assert parts == [("a", 30), ("b", 30), ("c", 50), ("b", 30 + produced)]


def test_where_a_prompt_under_way_finds_no_kvc_decodes_are_retracted():
    policy = SGLang(SGLangConfig(capacity_tokens=100))
    decoding(policy, [(ask("a", 40, 30), 5)])
    policy.add(ask("b", 60, 5).task())
    policy.on_launch(IterationPlan(), Launch(prefilled=(Prefilled("b", 55, 0, False),)))
    assert policy.plan(View(0.0, 100, 100, 9, 9)).preempt == (("a", Preemption.RECOMPUTE),)
    assert policy.plan(View(0.0, 100, 98, 9, 9)).prefill == (("b", 2),)


@pytest.mark.parametrize(("max_running", "rows"), [(2, 9), (9, 2)])
def test_the_machine_limits_the_batch(max_running, rows):
    policy = SGLang(SGLangConfig(capacity_tokens=400))
    for rid in "abc":
        policy.add(ask(rid, 4, 5).task())
    plan = policy.plan(View(0.0, 400, 0, rows, max_running))
    assert plan.prefill == (("a", 4), ("b", 4))


@pytest.mark.parametrize(
    ("prefix", "limit"), [(CachedPrefix(16, 0), 25), (CachedPrefix(16, 16), 9)]
)
def test_cached_tokens_are_not_computed_and_taken_only_if_nobody_holds_them(prefix, limit):
    # 100 - 24 - 0.7 * 50 = 41 is left for the other 15 of the prompt, 1, and the response.
    for longer in (0, 1):
        policy = SGLang(SGLangConfig(capacity_tokens=100))
        decoding(policy, [(ask("holder", 24, 50), 0)])
        policy.add(ask("sharer", 31, 2, limit=limit - 1 + longer).task())
        plan = policy.plan(View(0.0, 100, 24, 9, 9, lambda rid: prefix))
        assert plan.prefill == (() if longer else (("sharer", 15),))


def test_a_request_that_is_alone_uses_the_pool_to_its_last_token():
    for prompt, output in ((6, 4), (9, 1)):
        runner = machine([ask("a", prompt, output)], capacity_tokens=10)
        runner.run(limit=20)
        assert (runner.failures, runner.requests["a"].preempted) == (0, 0)


def test_an_abort_in_the_batch_makes_room():
    policy = SGLang(SGLangConfig(capacity_tokens=100))
    decoding(policy, [(ask("a", 40, 50), 0), (ask("c", 4, 5), 0)])
    policy.add(ask("b", 50, 5).task())
    view = View(0.0, 100, 44, 9, 9)
    policy.on_launch(policy.plan(view), Launch(resumed=("a", "c"), decoded=("a", "c")))
    policy.remove("a", Outcome.ABORTED)
    assert policy.plan(View(0.0, 100, 5, 9, 9)).prefill == (("b", 50),)


def test_predictions_change_nothing():
    logs = []
    for quantiles in ((1,), (5, 50, 500), ()):
        requests = [ask(f"r{n}", 5 + 7 * n % 23, 3 + 5 * n % 17, n) for n in range(12)]
        for request in requests:
            request.prediction = LengthPrediction(quantiles, 0.5, request.prediction.cap_tokens)
        runner = machine(requests, lag=1, capacity_tokens=64, chunked_prefill_tokens=20)
        runner.run(limit=10_000)
        logs.append(runner.log)
    assert logs[0] == logs[1] == logs[2]


def test_who_returns_is_never_lost_however_long_it_became():
    policy = SGLang(SGLangConfig(capacity_tokens=100))
    grown, other = ask("a", 90, 20), ask("b", 5, 5)
    decoding(policy, [(grown, 10)])
    policy.add(other.task())
    grown.produced = 10
    policy.requeue(grown.task())
    waiting = [(state.task.rid, state.task.prompt_tokens) for state in policy.books.waiting]
    assert waiting == [("b", 5), ("a", 100)]
    policy.remove("b", Outcome.ABORTED)
    assert policy.plan(View(0.0, 100, 0, 9, 9)).prefill == (("a", 100),)


def crowded():
    """A policy whose batch has room for "small" and not for "big"; and a view of it."""
    policy = SGLang(SGLangConfig(capacity_tokens=100))
    decoding(policy, [(ask("a", 40, 50), 0)])
    return policy, View(0.0, 100, 40, 9, 9)


BIG, SMALL = ask("big", 50, 5), ask("small", 5, 5)
DECODED = Launch(resumed=("a",), decoded=("a",))


@pytest.mark.parametrize("plans", [1, 3])
def test_the_batch_is_full_once_a_plan_in_which_a_prompt_found_no_room_was_launched(plans):
    policy, view = crowded()
    policy.add(BIG.task())
    for _ in range(plans):
        plan = policy.plan(view)
    # Until it is launched, a plan changes nothing: without the big one there would be room.
    other = copy.deepcopy(policy)
    policy.on_launch(plan, DECODED)
    for one in (policy, other):
        one.remove("big", Outcome.ABORTED)
        one.add(SMALL.task())
    assert policy.plan(view).prefill == ()
    assert other.plan(view).prefill == (("small", 5),)


def test_who_comes_between_plan_and_launch_does_not_find_the_batch_full():
    policy, view = crowded()
    plan = policy.plan(view)
    policy.add(SMALL.task())
    policy.on_launch(plan, DECODED)
    assert policy.plan(view).prefill == (("small", 5),)


def test_who_leaves_between_plan_and_launch_makes_room():
    policy, view = crowded()
    decoding(policy, [(ask("c", 4, 5), 0)])
    policy.add(BIG.task())
    plan = policy.plan(view)
    policy.remove("a", Outcome.FINISHED)
    policy.on_launch(plan, Launch(resumed=("c",), decoded=("c",)))
    assert policy.plan(View(0.0, 100, 5, 9, 9)).prefill == (("big", 50),)


def test_a_prompt_that_the_machine_left_out_does_not_leave_the_batch_full():
    policy, view = crowded()
    policy.add(SMALL.task())
    policy.add(BIG.task())
    plan = policy.plan(view)
    assert plan.prefill == (("small", 5),)
    policy.on_launch(plan, Launch(parked=("a",)))
    assert policy.plan(view).prefill == (("small", 5),)


def test_nobody_starts_beside_the_prompt_under_way_while_the_batch_is_full():
    policy = SGLang(SGLangConfig(capacity_tokens=100))
    decoding(policy, [(ask("a", 40, 10), 0)])
    policy.add(ask("b", 30, 5).task())
    policy.on_launch(IterationPlan(), Launch(prefilled=(Prefilled("b", 20, 0, False),)))
    policy.add(SMALL.task())
    # After 6 of its last 10 tokens no KVC is left; then there is, but nobody left the batch.
    for used, tokens in ((94, 6), (68, 4)):
        plan = policy.plan(View(0.0, 100, used, 9, 9))
        assert plan.prefill == (("b", tokens),)
        part = Prefilled("b", tokens, 0, tokens == 4)
        policy.on_launch(plan, Launch(prefilled=(part,), parked=("a",)))
    policy.remove("a", Outcome.FINISHED)
    assert policy.plan(View(0.0, 100, 30, 9, 9)).prefill == (("small", 5),)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("capacity_tokens", 0),
        ("chunked_prefill_tokens", 0),
        ("conservativeness", -0.1),
        ("initial_ratio", -1),
        ("least_ratio_factor", 1.1),
        ("decay_steps", 0),
        ("retract_steps", -1),
        ("clip_tokens", 0),
    ],
)
def test_impossible_constants_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}: give "):
        SGLangConfig(**{"capacity_tokens": 100, field: value})


def test_the_defaults_are_those_of_the_original():
    config = SGLangConfig(capacity_tokens=1)
    assert (config.first_ratio, config.least_ratio) == (0.7, pytest.approx(0.098))
    assert (config.decay_steps, config.retract_steps, config.clip_tokens) == (600, 20, 4096)


@st.composite
def workloads(draw, capacity):
    requests = []
    for number in range(draw(st.integers(1, 20))):
        prompt = draw(st.integers(1, capacity // 2) | st.integers(1, capacity - 3))
        output = draw(st.integers(1, min(60, capacity - prompt - 1)))
        limit = draw(st.sampled_from((output, capacity - prompt - 1, 10**6)))
        requests.append(ask(f"r{number}", prompt, output, draw(st.integers(0, 30)), limit))
    return requests


configs = st.builds(
    SGLangConfig,
    capacity_tokens=st.just(203),
    chunked_prefill_tokens=st.sampled_from((1, 64, 500)),
    conservativeness=st.sampled_from((0.1, 1.0, 3.0)),
    decay_steps=st.sampled_from((1, 600)),
    clip_tokens=st.sampled_from((1, 20, 4096)),
)


@settings(max_examples=40)
@given(workloads(203), configs, st.integers(1, 8), st.integers(0, 1), st.none() | st.integers(0, 9))
def test_every_request_ends_and_no_allocation_fails(requests, config, max_running, lag, seed):
    drops = None if seed is None else random.Random(seed)
    policy = SGLang(config)
    runner = Machine(policy, requests, config.capacity_tokens, max_running, lag, drops)
    runner.run(limit=5_000 + 300 * sum(one.prompt_tokens + one.true_tokens for one in requests))
    assert runner.failures == 0
    assert len(runner.finish_order) == len(requests)
    assert len(policy.books) == len(policy.ledger) == policy.ledger.held_tokens == 0
