"""The rules of LightLLM's Past-Future scheduler, in small scenes."""

import random
import sys
from collections import deque
from pathlib import Path

import numpy as np
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
from econoserve.policies.past_future import PastFuture, PastFutureConfig, peak_tokens

sys.path.insert(0, str(Path(__file__).parents[1] / "properties"))
from machine import Machine, Request


def ask(rid, prompt, output, arrival=0, limit=None):
    """A request whose prediction is wrong: the policy must not look at it."""
    prediction = LengthPrediction((1,), level=1.0, cap_tokens=output if limit is None else limit)
    return Request(rid, arrival, prompt, output, prediction)


def machine(requests, past=(), lag=0, max_running=64, **config):
    """A machine whose policy remembers these lengths."""
    policy = PastFuture(PastFutureConfig(**config))
    policy.past = deque(past or policy.past, maxlen=policy.past.maxlen)
    return Machine(policy, requests, config["capacity_tokens"], max_running, lag)


def steps(machine, count):
    for _ in range(count):
        machine.step()
    return machine.log[-1]


def holding(policy, *requests):
    for request in requests:
        policy.add(request.task())
        part = Prefilled(request.rid, request.prompt_tokens, 0, True)
        policy.on_launch(IterationPlan(), Launch(prefilled=(part,)))


def test_the_peak_is_where_a_request_ends():
    # 10 held and 3 to come, 20 and 1: at the end of the second 11 and 21, at that of the first 13.
    held, left = np.array([10.0, 20.0]), np.array([[3.0, 1.0], [0.0, 9.0]])
    assert peak_tokens(held, left).tolist() == [32.0, 30.0]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=8))
def test_the_peak_is_the_most_that_is_held_at_any_step(batch):
    held, left = (np.array(values, dtype=float) for values in zip(*batch, strict=True))
    occupied = [sum(h + step for h, rest in batch if rest >= step) for step in range(31)]
    assert peak_tokens(held, left[None]).tolist() == [max(occupied)]


@pytest.mark.parametrize(("prompt", "starts"), [(44, True), (45, False)])
def test_a_prompt_starts_while_the_peak_stays_below_the_capacity_less_the_reserve(prompt, starts):
    # Two responses of 20 beside prompts of 10 and this one: 50 and it, which must be below 95.
    requests = [ask("a", 10, 20), ask("b", prompt, 20), ask("c", 1, 1)]
    plan = steps(machine(requests, past=[20], capacity_tokens=100), 1)
    assert (("b", prompt) in plan.prefill) is starts
    assert (("c", 1) in plan.prefill) is False or starts


def test_nobody_passes_one_that_does_not_fit():
    requests = [ask("a", 10, 20), ask("b", 80, 20), ask("c", 1, 1)]
    plan = steps(machine(requests, past=[20], capacity_tokens=100), 1)
    assert plan.prefill == (("a", 10),)


def test_a_request_ends_at_its_limit_whatever_others_did():
    requests = [ask("a", 10, 5), ask("b", 60, 5)]
    plan = steps(machine(requests, past=[1000], capacity_tokens=100), 1)
    assert plan.prefill == (("a", 10), ("b", 60))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("prompt", "starts"), [(14, True), (35, False)])
def test_who_outlived_the_past_may_go_on_to_its_limit(prompt, starts, seed):
    # "a" holds 10 and 50 and has 0 to 10 to come, whatever the past: 60 to 80 beside the prompt.
    requests = [ask("a", 10, 60), ask("b", prompt, 10, arrival=50)]
    runner = machine(requests, past=[10], capacity_tokens=100, seed=seed)
    plan = steps(runner, 51)
    assert runner.requests["a"].produced == 51
    assert plan.prefill == ((("b", prompt),) if starts else ())


def refused(prompt, generated, limit, most_futures):
    """In how many of 60 cases a prompt of 40 is kept out by one that runs, and its own draw."""
    count = 0
    for seed in range(60):
        config = PastFutureConfig(capacity_tokens=100, seed=seed, most_futures=most_futures)
        policy = PastFuture(config)
        policy.past = deque([1, 50] * 20, maxlen=40)
        holding(policy, ask("a", prompt, 50))
        policy.on_tokens("a", generated)
        policy.add(ask("b", 40, limit).task())
        count += policy.plan(View(0.0, 100, prompt, 9, 9)).prefill == ()
    return count


def test_running_responses_are_drawn_from_those_longer_than_they_are():
    # "a" will hold 48 and 50 if it is long, as half of all responses are, and all beyond 5 tokens.
    assert 20 <= refused(48, generated=0, limit=1, most_futures=1) <= 40
    assert refused(48, generated=5, limit=1, most_futures=1) >= 54


def test_the_worst_of_several_futures_counts():
    # 10 and 40 and as many of 50 each as are drawn long.
    assert 6 <= refused(10, generated=0, limit=50, most_futures=1) <= 25
    assert refused(10, generated=0, limit=50, most_futures=5) >= 35


def test_one_state_gives_one_plan_and_the_next_iteration_draws_anew():
    policy = PastFuture(PastFutureConfig(capacity_tokens=100, most_futures=1))
    policy.past = deque([1, 60] * 20, maxlen=40)
    holding(policy, ask("a", 10, 5))
    policy.add(ask("b", 40, 60).task())
    view, answers = View(0.0, 100, 10, 9, 9), []
    for _ in range(40):
        plan = policy.plan(view)
        assert plan == policy.plan(view)
        answers.append(bool(plan.prefill))
        policy.on_launch(plan, Launch())
    assert set(answers) == {True, False}


def test_it_learns_the_lengths_of_finished_responses_and_forgets_old_ones():
    policy = PastFuture(PastFutureConfig(1000, window_requests=4, initial_response_tokens=7))
    assert list(policy.past) == [7, 7]
    for number in range(1, 5):
        holding(policy, ask(f"r{number}", 1, 9))
        policy.on_tokens(f"r{number}", number)
        policy.remove(f"r{number}", Outcome.FINISHED)
    assert list(policy.past) == [1, 2, 3, 4]


def test_it_learns_nothing_from_aborts_and_pauses():
    policy = PastFuture(PastFutureConfig(1000, window_requests=4, initial_response_tokens=7))
    holding(policy, ask("a", 1, 9), ask("b", 1, 9))
    policy.on_tokens("a", 3)
    policy.on_tokens("b", 3)
    policy.remove("a", Outcome.ABORTED)
    policy.requeue(ask("b", 4, 9).task())
    assert list(policy.past) == [7, 7]


def test_the_last_to_come_is_paused_and_nobody_starts_then():
    policy = PastFuture(PastFutureConfig(capacity_tokens=100))
    holding(policy, ask("a", 30, 40, arrival=0), ask("b", 40, 40, arrival=1))
    policy.add(ask("c", 1, 1, arrival=2).task())
    plan = policy.plan(View(0.0, 100, 99, 9, 9))
    assert (plan.preempt, plan.resume) == ((("b", Preemption.RECOMPUTE),), ("a",))
    assert plan.prefill == ()
    assert policy.plan(View(0.0, 100, 98, 9, 9)).preempt == ()


def test_the_paused_go_before_those_that_never_ran_and_are_computed_with_their_output():
    requests = [ask("a", 40, 30), ask("b", 40, 30, arrival=1), ask("c", 40, 5, arrival=2)]
    runner = machine(requests, past=[5], capacity_tokens=100)
    while not (plan := steps(runner, 1)).preempt:
        pass
    assert plan.preempt == (("b", Preemption.RECOMPUTE),)
    assert [state.task.rid for state in runner.policy.books.waiting] == ["b", "c"]
    produced = runner.requests["b"].produced
    runner.run(limit=500)
    parts = [part for plan in runner.log for part in plan.prefill]
    assert parts == [("a", 40), ("b", 40), ("b", 40 + produced), ("c", 40)]


def test_prompts_share_an_iteration_with_decodes_up_to_its_tokens():
    requests = [ask("a", 6, 9), ask("b", 6, 9, arrival=1), ask("c", 4, 9, arrival=1)]
    requests += [ask("d", 1, 9, arrival=1)]
    runner = machine(requests, past=[9], capacity_tokens=400, max_batch_tokens=11)
    assert steps(runner, 1).prefill == (("a", 6),)
    plan = steps(runner, 1)
    assert (plan.resume, plan.prefill) == (("a",), (("b", 6), ("c", 4)))
    assert runner.requests["a"].produced == 2


def test_a_long_prompt_is_cut_and_only_one_at_a_time():
    requests = [ask("a", 20, 9), ask("b", 20, 9), ask("c", 5, 9)]
    runner = machine(requests, past=[9], capacity_tokens=400, chunked_prefill_tokens=16)
    passes = [steps(runner, 1).prefill for _ in range(3)]
    assert passes == [(("a", 16),), (("a", 4), ("b", 16)), (("b", 4), ("c", 5))]


def test_with_nothing_running_the_first_prompt_starts_in_any_case():
    runner = machine([ask("a", 97, 2)], past=[50], capacity_tokens=100)
    runner.run(limit=20)
    assert (runner.failures, runner.requests["a"].preempted) == (0, 0)


@pytest.mark.parametrize(("max_running", "rows"), [(2, 9), (9, 2)])
def test_the_machine_limits_the_batch(max_running, rows):
    policy = PastFuture(PastFutureConfig(capacity_tokens=4000))
    for rid in "abc":
        policy.add(ask(rid, 4, 5).task())
    plan = policy.plan(View(0.0, 4000, 0, rows, max_running))
    assert plan.prefill == (("a", 4), ("b", 4))


def test_cached_tokens_are_not_computed_and_taken_only_if_nobody_holds_them():
    for prefix, prefill in ((CachedPrefix(16, 0), (("b", 4),)), (CachedPrefix(16, 16), ())):
        policy = PastFuture(PastFutureConfig(capacity_tokens=100, reserved_fraction=0.0))
        policy.past = deque([1], maxlen=40)
        holding(policy, ask("a", 60, 1))
        policy.add(ask("b", 20, 1).task())
        view = View(0.0, 100, 90, 9, 9, lambda rid, prefix=prefix: prefix)
        assert policy.plan(view).prefill == prefill


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


@pytest.mark.parametrize(
    "field",
    (
        "capacity_tokens",
        "window_requests",
        "initial_response_tokens",
        "most_futures",
        "least_samples",
        "reserved_fraction",
        "chunked_prefill_tokens",
        "max_batch_tokens",
        "seed",
    ),
)
def test_impossible_constants_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=-1: give "):
        PastFutureConfig(**{"capacity_tokens": 100, field: -1})


def test_the_defaults_are_those_of_the_original():
    config = PastFutureConfig(capacity_tokens=1)
    assert (config.window_requests, config.initial_response_tokens) == (40, 1024)
    assert (config.most_futures, config.least_samples, config.reserved_fraction) == (5, 200, 0.05)


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
    PastFutureConfig,
    capacity_tokens=st.just(203),
    window_requests=st.sampled_from((2, 3, 40)),
    initial_response_tokens=st.sampled_from((1, 30, 1024)),
    reserved_fraction=st.sampled_from((0.0, 0.05, 0.5)),
    chunked_prefill_tokens=st.sampled_from((1, 64, 500)),
    max_batch_tokens=st.sampled_from((1, 64, 500)),
)


@settings(max_examples=40)
@given(workloads(203), configs, st.integers(1, 8), st.integers(0, 1), st.none() | st.integers(0, 9))
def test_every_request_ends_and_no_allocation_fails(requests, config, max_running, lag, seed):
    drops = None if seed is None else random.Random(seed)
    policy = PastFuture(config)
    runner = Machine(policy, requests, config.capacity_tokens, max_running, lag, drops)
    runner.run(limit=5_000 + 300 * sum(one.prompt_tokens + one.true_tokens for one in requests))
    assert runner.failures == 0
    assert len(runner.finish_order) == len(requests)
    assert len(policy.books) == len(policy.ledger) == policy.ledger.held_tokens == 0
