"""The policy on the obvious machine: promises, conservation, liveness, determinism."""

import copy
import pickle
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from machine import Machine, Request

from econoserve.core.types import (
    IterationPlan,
    Launch,
    LengthPrediction,
    Prefilled,
    Slo,
    View,
)
from econoserve.policies.econoserve import EconoServe, EconoServeConfig, LengthOrder

CAPACITY = 200


def exact(tokens):
    return LengthPrediction((tokens,), level=1.0, cap_tokens=tokens)


@st.composite
def workloads(draw, predictions="exact"):
    count = draw(st.integers(1, 25))
    requests = []
    for number in range(count):
        prompt = draw(st.integers(1, 120))
        true = draw(st.integers(1, min(100, CAPACITY - prompt - 1)))
        if predictions == "exact":
            prediction = exact(true)
        else:
            quantiles = draw(st.lists(st.integers(1, 120), max_size=6).map(sorted))
            prediction = LengthPrediction(
                tuple(quantiles),
                level=draw(st.sampled_from((0.3, 0.8, 1.0))),
                cap_tokens=CAPACITY - prompt - 1,
            )
        slo = draw(st.sampled_from((Slo(), Slo(ttft_s=0.2), Slo(e2e_s=1.0), Slo(tpot_s=0.02))))
        requests.append(
            Request(
                f"r{number}",
                draw(st.integers(0, 60)),
                prompt,
                true,
                prediction,
                slo,
                parkable=draw(st.booleans()),
            )
        )
    return requests


configs = st.builds(
    EconoServeConfig,
    capacity_tokens=st.just(CAPACITY),
    tfs_tokens=st.integers(1, 128),
    reserve_fraction=st.sampled_from((0.0, 0.02, 0.2)),
    parked_fraction=st.sampled_from((0.0, 0.2, 0.8)),
    starvation_s=st.sampled_from((0.05, 30.0)),
    length_order=st.sampled_from(LengthOrder),
)


def assert_drained(policy):
    assert len(policy.ledger) == 0
    assert policy.ledger.held_tokens == policy.ledger.promised_tokens == 0
    assert len(policy.books) == 0


@settings(max_examples=300)
@given(workloads(), configs, st.integers(1, 8), st.integers(0, 1))
def test_exact_predictions_never_fail_an_allocation(requests, config, max_running, lag):
    policy = EconoServe(config)
    machine = Machine(policy, requests, CAPACITY, max_running, lag)
    machine.run(limit=60 + 40 * sum(r.prompt_tokens + r.true_tokens for r in requests))
    assert machine.failures == 0
    assert_drained(policy)
    if config.parked_fraction == 0.0:
        assert all(request.preempted == 0 for request in requests)


@settings(max_examples=300)
@given(workloads("wrong"), configs, st.integers(1, 8), st.integers(0, 1), st.integers(0, 99))
def test_wrong_predictions_cost_preemptions_but_never_memory_or_progress(
    requests, config, max_running, lag, seed
):
    policy = EconoServe(config)
    machine = Machine(policy, requests, CAPACITY, max_running, lag, random.Random(seed))
    machine.run(limit=2_000 + 200 * sum(r.prompt_tokens + r.true_tokens for r in requests))
    assert machine.failures == 0
    assert sorted(machine.finish_order) == sorted(request.rid for request in requests)
    assert all(request.produced == request.true_tokens for request in requests)
    assert_drained(policy)


@settings(max_examples=60)
@given(workloads("wrong"), configs, st.integers(0, 40))
def test_a_restored_policy_plans_the_same(requests, config, steps):
    machine = Machine(EconoServe(config), requests, CAPACITY)
    for _ in range(steps):
        if machine.alive():
            machine.step()
    restored = pickle.loads(pickle.dumps(machine))
    twin = copy.deepcopy(machine)
    for other in (restored, twin):
        for _ in range(20):
            if other.alive():
                other.step()
    assert restored.log == twin.log
    assert restored.finish_order == twin.finish_order


@settings(max_examples=40)
@given(workloads("wrong"), configs, st.data())
def test_aborts_at_any_moment_leave_nothing(requests, config, data):
    policy = EconoServe(config)
    machine = Machine(policy, requests, CAPACITY)
    doomed = data.draw(st.sets(st.sampled_from([request.rid for request in requests])))
    moment = data.draw(st.integers(0, 80))
    for _ in range(moment):
        if machine.alive():
            machine.step()
    for rid in sorted(doomed):
        request = machine.requests[rid]
        request.state, request.held = "done", 0
        policy.remove(rid)
    machine.run(limit=100_000)
    assert_drained(policy)


def test_a_planned_prompt_that_is_not_launched_is_owed_nothing():
    policy = EconoServe(EconoServeConfig(CAPACITY))
    policy.add(Request("late", 0, 80, 40, exact(40)).task())
    machine = Machine(policy, [], CAPACITY)
    plan = policy.plan(machine.view())
    assert plan.prefill == (("late", 80),)
    policy.on_launch(plan, Launch())
    drained_claims = (len(policy.ledger), policy.ledger.promised_tokens)
    assert drained_claims == (0, 0)
    assert policy.plan(machine.view()) == plan


def test_a_fully_promised_task_resumes_behind_one_that_starves():
    config = EconoServeConfig(CAPACITY, starvation_s=0.0, parked_fraction=1.0)
    policy = EconoServe(config)
    for rid, prompt, response in (("running", 20, 50), ("starving", 40, 110), ("promised", 20, 20)):
        policy.add(Request(rid, 0, prompt, response, exact(response)).task())
    promises = (("running", 70), ("starving", 40), ("promised", 40))
    parts = tuple(
        Prefilled(rid, tokens, 0, True)
        for rid, tokens in zip(("running", "starving", "promised"), (20, 40, 20), strict=True)
    )
    plan = IterationPlan(promises=promises)
    policy.on_launch(plan, Launch(prefilled=parts))
    policy.on_launch(IterationPlan(), Launch(resumed=("running",)))
    view = View(5.0, CAPACITY, used_tokens=80, free_rows=9, max_running=9)
    assert policy.plan(view).resume == ("promised",)
