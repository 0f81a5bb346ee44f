"""Requests that sit passes out, on the obvious machine: nothing is lost, and they go on soon."""

from random import Random

import pytest
from drawn import CAPACITY, configs, exact, followers, work, workloads, worlds
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


@settings(max_examples=80)
@given(
    workloads(most=6, slos=(TIGHT,)),
    st.sampled_from(KvcMode),
    st.integers(2, 8),
    st.integers(0, 1),
    followers,
)
def test_sitting_passes_out_breaks_no_promise(requests, mode, max_running, lag, world):
    """I1: who sits a pass out ends later, beside prompts of that pass that decode from then on."""
    config = EconoServeConfig(
        CAPACITY,
        kvc=KvcConfig(mode, reserve_fraction=0.0),
        pausing=PausingConfig(1.0),
        parked_fraction=0.0,
        late=Late.SERVE,
    )
    machine = Machine(EconoServe(config), requests, CAPACITY, max_running, lag, world=world)
    machine.run(limit=60 + 40 * work(requests))
    assert machine.failures == 0
    assert all(request.preempted == request.moved == 0 for request in requests)
