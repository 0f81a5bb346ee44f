"""The policy on the obvious machine: promises, conservation, liveness, determinism."""

import pickle
import random
from dataclasses import replace

from drawn import CAPACITY, configs, exact, followers, run_some, work, workloads, worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import Machine, Request

from econoserve.core.kvc import KvcMode
from econoserve.core.late import Late
from econoserve.core.types import Launch
from econoserve.policies.econoserve import EconoServe, EconoServeConfig

exactly = workloads(parkable=st.booleans())
mispredicted = workloads(wrong=True, parkable=st.booleans())


def assert_drained(policy):
    assert len(policy.ledger) == 0
    assert policy.ledger.held_tokens == policy.ledger.promised_tokens == 0
    assert len(policy.books) == 0


@settings(max_examples=180)
@given(exactly, configs, st.integers(1, 8), st.integers(0, 1), followers)
def test_exact_predictions_never_fail_an_allocation(requests, config, max_running, lag, world):
    """I1: nobody gives up KVC, be it for a recompute or for host memory.

    It excludes requests that need the reserve, too: each runs alone, and that may take others'
    KVC. And it is of machines that follow the plan: a response that sits steps out ends later
    than ``nested``, ``skyline`` and ``risk`` were told.
    """
    policy = EconoServe(config)
    room = CAPACITY - policy.ledger.reserve_tokens
    requests = [one for one in requests if one.prompt_tokens + one.true_tokens + 1 <= room]
    machine = Machine(policy, requests, CAPACITY, max_running, lag, world=world)
    machine.run(limit=60 + 40 * work(requests))
    assert machine.failures == 0
    assert_drained(policy)
    assert all(request.preempted == request.moved == 0 for request in requests)


@settings(max_examples=100)
@given(exactly, configs, st.integers(1, 8), st.integers(0, 1), worlds)
def test_exact_allocation_needs_no_machine_that_follows_the_plan(
    requests, config, max_running, lag, world
):
    """I1 in mode ``exact``, whatever is left out of plans: all that is promised fits at once."""
    policy = EconoServe(replace(config, kvc=replace(config.kvc, mode=KvcMode.EXACT)))
    room = CAPACITY - policy.ledger.reserve_tokens
    requests = [one for one in requests if one.prompt_tokens + one.true_tokens + 1 <= room]
    machine = Machine(policy, requests, CAPACITY, max_running, lag, world=world)
    machine.run(limit=500 + 200 * work(requests))
    assert machine.failures == 0
    assert all(request.preempted == request.moved == 0 for request in requests)


@settings(max_examples=180)
@given(mispredicted, configs, st.integers(1, 8), st.integers(0, 1), st.integers(0, 99), worlds)
def test_wrong_predictions_cost_preemptions_but_never_memory_or_progress(
    requests, config, max_running, lag, seed, world
):
    policy = EconoServe(config)
    drops = random.Random(seed) if seed % 2 else None
    machine = Machine(policy, requests, CAPACITY, max_running, lag, drops, world)
    machine.run(limit=2_000 + 200 * work(requests))
    assert machine.failures == 0
    assert sorted(machine.finish_order + machine.rejected) == sorted(machine.requests)
    served = [request for request in requests if request.rid in machine.finish_order]
    assert all(request.produced == request.true_tokens for request in served)
    if config.late is not Late.REJECT:
        assert not machine.rejected
    # Nobody is computed again where moving is cheaper: all that may be parked is moved.
    if config.victims.offload_s_per_token is not None and not world.timed:
        assert all(request.preempted == 0 for request in requests if request.parkable)
    assert_drained(policy)


@settings(max_examples=100)
@given(mispredicted, configs, st.integers(0, 60), worlds)
def test_a_restored_policy_plans_what_the_original_does(requests, config, steps, world):
    machine = Machine(EconoServe(config), requests, CAPACITY, 8, world=world)
    run_some(machine, steps)
    restored = pickle.loads(pickle.dumps(machine))
    for each in (machine, restored):
        run_some(each, 40)
    assert restored.log == machine.log
    assert restored.finish_order == machine.finish_order


@settings(max_examples=50)
@given(mispredicted, configs, st.data(), worlds)
def test_aborts_at_any_moment_leave_nothing(requests, config, data, world):
    policy = EconoServe(config)
    machine = Machine(policy, requests, CAPACITY, world=world)
    doomed = data.draw(st.sets(st.sampled_from([request.rid for request in requests])))
    run_some(machine, data.draw(st.integers(0, 80)))
    for rid in sorted(doomed):
        machine.abort(rid)
    machine.run(limit=100_000)
    assert_drained(policy)


def test_a_planned_prompt_that_is_not_launched_is_owed_nothing():
    policy = EconoServe(EconoServeConfig(CAPACITY))
    late = Request("late", 0, 80, 40, exact(40))
    policy.add(late.task())
    machine = Machine(policy, [late], CAPACITY)
    plan = policy.plan(machine.view())
    assert plan.prefill == (("late", 80),)
    policy.on_launch(plan, Launch())
    drained_claims = (len(policy.ledger), policy.ledger.promised_tokens)
    assert drained_claims == (0, 0)
    assert policy.plan(machine.view()) == plan
