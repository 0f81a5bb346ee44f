"""Requests that sit passes out, on the obvious machine: nothing is lost, and they go on soon."""

from random import Random

import pytest
from drawn import CAPACITY, configs, exact, work, workloads, worlds
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from machine import Machine, Request, World

from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.core.late import Late
from econoserve.core.pausing import PausingConfig
from econoserve.core.types import Slo
from econoserve.policies.econoserve import EconoServe, EconoServeConfig

TIGHT = Slo(ttft_s=0.05, tpot_s=0.5)
"""Prompts are near their latest start from the beginning, and decodes have time."""

hurried = workloads(wrong=True, parkable=st.booleans(), slos=(TIGHT, TIGHT, Slo()))


@settings(max_examples=80)
@given(hurried, configs, st.integers(1, 8), st.integers(0, 1), worlds)
def test_sitting_passes_out_costs_no_memory_and_no_progress(
    requests, config, max_running, lag, world
):
    policy = EconoServe(config)
    machine = Machine(policy, requests, CAPACITY, max_running, lag, world=world)
    machine.run(limit=2_000 + 200 * work(requests))
    assert machine.failures == 0
    assert sorted(machine.finish_order + machine.rejected) == sorted(machine.requests)
    served = [request for request in requests if request.rid in machine.finish_order]
    assert all(request.produced == request.true_tokens for request in served)
    assert len(policy.ledger) == policy.ledger.held_tokens == policy.ledger.promised_tokens == 0


def test_the_drawn_requests_do_sit_passes_out():
    def pauses(requests):
        policy = EconoServe(EconoServeConfig(CAPACITY, late=Late.SERVE))
        machine = Machine(policy, requests, CAPACITY, world=World(timed=True))
        machine.run(limit=10_000)
        return sum(plan.pauses for plan in machine.log) > 1

    quick = settings(phases=[Phase.generate], database=None)
    assert find(hurried, pauses, settings=quick, random=Random(0))


@pytest.mark.parametrize("every", [1, 2])
def test_who_decodes_goes_on_however_many_prompts_are_near_their_ttft(every):
    """Prompts of one token each leave no KVC taken, so only the time that is sat out ends it."""
    one = Request("one", 0, 5, 40, exact(40), Slo(tpot_s=0.02))
    prompts = [
        Request(f"p{number}", 2 + number * every, 10, 1, exact(1), Slo(ttft_s=0.02))
        for number in range(300)
    ]
    machine = Machine(
        EconoServe(EconoServeConfig(400)), [one, *prompts], 400, world=World(timed=True)
    )
    machine.run(limit=1000)
    assert any(plan.pauses for plan in machine.log)
    assert one.finished_at < 300


def assert_unbroken(requests, capacity, mode, max_running, lag):
    """I1: who sits a pass out ends later, beside prompts of that pass that decode from then on."""
    config = EconoServeConfig(
        capacity,
        kvc=KvcConfig(mode, reserve_fraction=0.0),
        pausing=PausingConfig(1.0),
        parked_fraction=0.0,
        late=Late.SERVE,
    )
    world = World(timed=True)
    machine = Machine(EconoServe(config), requests, capacity, max_running, lag, world=world)
    machine.run(limit=60 + 40 * work(requests))
    assert machine.failures == 0
    assert all(request.preempted == request.moved == 0 for request in requests)
    return machine


@settings(max_examples=80)
@given(
    workloads(most=6, slos=(TIGHT,)),
    st.sampled_from(KvcMode),
    st.integers(2, 8),
    st.integers(0, 1),
)
def test_sitting_passes_out_breaks_no_promise(requests, mode, max_running, lag):
    assert_unbroken(requests, CAPACITY, mode, max_running, lag)


@pytest.mark.parametrize("mode", [KvcMode.SKYLINE, KvcMode.RISK])
@pytest.mark.parametrize(
    ("capacity", "sizes"),
    [
        (47, [(18, 11, 24, 0.05), (23, 11, 21, 0.05), (20, 3, 12, 0.2), (17, 2, 4, 0.05)]),
        (49, [(24, 5, 26, 0.02), (2, 3, 7, 0.2), (15, 5, 28, 0.02)]),
        (65, [(0, 9, 25, 0.02), (4, 6, 21, 0.02), (1, 9, 25, 0.05), (21, 8, 14, 0.1)]),
    ],
)
def test_the_token_that_a_prompt_of_a_paused_pass_takes_early_is_promised(capacity, sizes, mode):
    """Sizes are arrival, prompt, response and TTFT, for which a promise without it was broken."""
    requests = [
        Request(f"r{number}", arrival, prompt, response, exact(response), Slo(ttft_s, 0.5))
        for number, (arrival, prompt, response, ttft_s) in enumerate(sizes)
    ]
    machine = assert_unbroken(requests, capacity, mode, max_running=8, lag=1)
    assert any(plan.pauses for plan in machine.log)
