"""The policy on the obvious machine: promises, conservation, liveness, determinism."""

import copy
import pickle
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from machine import Machine, Request

from econoserve.core.cost import TfsConfig
from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.core.late import Late
from econoserve.core.lengths import LengthPrediction
from econoserve.core.nested import Nesting
from econoserve.core.order import LengthOrder, Order, OrderConfig
from econoserve.core.types import (
    Launch,
    Outcome,
    Slo,
)
from econoserve.core.victims import VictimConfig
from econoserve.policies.econoserve import EconoServe, EconoServeConfig

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


orders = st.builds(
    OrderConfig,
    order=st.sampled_from(Order),
    length_order=st.sampled_from(LengthOrder),
    window_s=st.sampled_from((0.05, 1.0)),
)
kvcs = st.builds(
    KvcConfig,
    mode=st.sampled_from(KvcMode),
    reserve_fraction=st.sampled_from((0.0, 0.02, 0.2)),
    lead_tokens=st.sampled_from((0, 8)),
    buffer_tokens=st.sampled_from((0, 2)),
    nesting=st.sampled_from(Nesting),
    risk=st.sampled_from((0.01, 0.4)),
)
configs = st.builds(
    EconoServeConfig,
    capacity_tokens=st.just(CAPACITY),
    kvc=kvcs,
    order=orders,
    tfs=st.integers(1, 128).map(TfsConfig) | st.just(TfsConfig(limits_tokens=(8, 256))),
    parked_fraction=st.sampled_from((0.0, 0.2, 0.8)),
    late=st.sampled_from(Late),
    victims=st.sampled_from((VictimConfig(), VictimConfig(offload_s_per_token=1e-9))),
    starvation_s=st.sampled_from((0.05, 30.0)),
)


def assert_drained(policy):
    assert len(policy.ledger) == 0
    assert policy.ledger.held_tokens == policy.ledger.promised_tokens == 0
    assert len(policy.books) == 0


@settings(max_examples=300)
@given(workloads(), configs, st.integers(1, 8), st.integers(0, 1))
def test_exact_predictions_never_fail_an_allocation(requests, config, max_running, lag):
    policy = EconoServe(config)
    # What needs the reserve, too, runs alone; that may take others' KVC.
    room = CAPACITY - policy.ledger.reserve_tokens
    requests = [one for one in requests if one.prompt_tokens + one.true_tokens + 1 <= room]
    machine = Machine(policy, requests, CAPACITY, max_running, lag)
    machine.run(limit=60 + 40 * sum(r.prompt_tokens + r.true_tokens for r in requests))
    assert machine.failures == 0
    assert_drained(policy)
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
    assert sorted(machine.finish_order + machine.rejected) == sorted(machine.requests)
    served = [request for request in requests if request.rid in machine.finish_order]
    assert all(request.produced == request.true_tokens for request in served)
    if config.late is not Late.REJECT:
        assert not machine.rejected
    # Nobody gives way unless somebody needed its KVC, and offloading costs less if it can be had.
    offloads = config.victims.offload_s_per_token is not None
    assert all(request.preempted == 0 for request in requests) or not offloads
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
        policy.remove(rid, Outcome.ABORTED)
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
