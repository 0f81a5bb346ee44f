"""Prompts that start together, and large requests that step back: by hand, and in the simulator."""

import pickle
from dataclasses import replace

import pytest

from econoserve.core.cost import CostModel, IterationWork, TfsConfig
from econoserve.core.holding import SLOW_STEPS, HoldingConfig
from econoserve.core.late import Late
from econoserve.core.lengths import LengthPrediction
from econoserve.core.order import OrderConfig
from econoserve.core.shedding import Shedding, SheddingConfig, demand_of
from econoserve.core.types import IterationPlan, Launch, Outcome, Prefilled, Slo, Task, View
from econoserve.policies.econoserve import EconoServe, EconoServeConfig
from econoserve.sim.run import RunSpec, simulate
from econoserve.workload.workload import WorkloadSpec

CAPACITY = 10_000
NO_SLO = Slo()
STEP_S, MIXED_S = 0.010, 0.030
"""An iteration that decodes, and one with prompts, however many."""


def learned(mixed_s=MIXED_S):
    """A cost model that has seen both kinds of iterations."""
    cost = CostModel()
    for step in range(50):
        cost.observe(IterationWork(decoding=4 + step % 3), STEP_S)
        cost.observe(IterationWork(prefill_tokens=10 + step % 7, decoding=4 + step % 3), mixed_s)
    return cost


def serving(running=8, mixed_s=MIXED_S, slo=NO_SLO, **config):
    """A policy with so many requests that decode."""
    tfs = TfsConfig(pinned_tokens=512)
    policy = EconoServe(EconoServeConfig(CAPACITY, tfs=tfs, **config), learned(mixed_s))
    rids = [f"r{number}" for number in range(running)]
    for rid in rids:
        policy.add(Task(rid, 0.0, 10, LengthPrediction((200,), 1.0, 400), slo))
    parts = tuple(Prefilled(rid, 10, 0, True) for rid in rids)
    policy.on_launch(IterationPlan(), Launch(prefilled=parts))
    policy.on_launch(IterationPlan(), Launch(resumed=tuple(rids), decoded=tuple(rids)))
    return policy


def at_pace(pace_s, tpot_s):
    """A policy whose decodes have had such a pace."""
    policy = serving(slo=Slo(tpot_s=tpot_s))
    for _ in range(1000):
        policy.on_iteration(IterationWork(prefill_tokens=12, decoding=5), MIXED_S)
        policy.on_iteration(IterationWork(decoding=5), 2 * pace_s - MIXED_S)
    return policy


def come(policy, rid, now_s, prompt=10, slo=NO_SLO):
    policy.add(Task(rid, now_s, prompt, LengthPrediction((200,), 1.0, 400), slo))


def started(policy, now_s):
    used = policy.ledger.held_tokens
    plan = policy.plan(View(now_s, CAPACITY, used, free_rows=99, max_running=64))
    return [rid for rid, _ in plan.prefill]


def step(policy):
    """An iteration that only decodes."""
    policy.on_launch(IterationPlan(), Launch(decoded=tuple(policy.books.running)))


def test_a_prompt_waits_until_its_waiting_outweighs_the_pass():
    policy = serving()
    come(policy, "new", 1.0)
    # Eight requests would wait 20 ms longer each: 160 ms, which is 80 ms before a first token.
    assert started(policy, 1.0) == []
    assert started(policy, 1.07) == []
    assert started(policy, 1.09) == ["new"]


def test_several_prompts_wait_less_long():
    policy = serving()
    for rid in ("a", "b", "c", "d"):
        come(policy, rid, 1.0)
    assert started(policy, 1.019) == []
    assert started(policy, 1.021) == ["a", "b", "c", "d"]


def test_a_prompt_is_held_for_a_few_steps_only():
    policy = serving(holding=HoldingConfig(steps=3))
    come(policy, "new", 1.0)
    for _ in range(2):
        assert started(policy, 1.0) == []
        step(policy)
    assert started(policy, 1.0) == ["new"]


def test_a_prompt_with_little_time_is_not_held():
    policy = at_pace(0.02, tpot_s=0.022)
    come(policy, "new", 1.0, slo=Slo(ttft_s=0.13))
    assert started(policy, 1.005) == []
    assert started(policy, 1.03) == ["new"]


@pytest.mark.parametrize("tpot_s", [0.03, None], ids=["loose", "none"])
def test_a_prompt_with_an_slo_is_not_held_where_the_decodes_do_not_need_it(tpot_s):
    policy = at_pace(0.02, tpot_s)
    come(policy, "new", 1.0, slo=Slo(ttft_s=0.2))
    assert started(policy, 1.0) == ["new"]


def test_prompts_without_an_slo_are_not_held_where_the_decodes_keep_theirs_easily():
    policy = at_pace(0.02, tpot_s=0.03)
    come(policy, "new", 1.0)
    assert started(policy, 1.0) == ["new"]


@pytest.mark.parametrize(
    "policy",
    [
        serving(running=0),
        serving(mixed_s=STEP_S),
        serving(holding=HoldingConfig(steps=0)),
    ],
    ids=["nobody decodes", "mixed iterations cost no more", "off"],
)
def test_a_prompt_is_not_held_where_that_saves_nothing(policy):
    come(policy, "new", 1.0)
    assert started(policy, 1.0) == ["new"]


def slowed(tpot_s, alone_s=STEP_S):
    """A policy whose decodes have had a pace of 20 ms, and a prompt."""
    policy = serving(slo=Slo(tpot_s=tpot_s), holding=HoldingConfig(steps=1))
    for _ in range(1000):
        policy.on_iteration(IterationWork(prefill_tokens=12, decoding=5), MIXED_S)
        policy.on_iteration(IterationWork(decoding=5), alone_s)
    come(policy, "new", 1.0)
    return policy


def test_prompts_wait_while_the_decodes_are_too_slow_for_their_objective():
    policy = slowed(0.018)
    assert started(policy, 9.0) == []
    for _ in range(500):
        policy.on_iteration(IterationWork(decoding=5), STEP_S)
    assert started(policy, 9.0) == ["new"]


def test_a_slow_pace_holds_prompts_for_some_steps_only():
    policy = slowed(0.018)
    for _ in range(SLOW_STEPS - 1):
        assert started(policy, 9.0) == []
        step(policy)
    assert started(policy, 9.0) == ["new"]


def test_what_the_decodes_cannot_keep_by_themselves_does_not_stop_prompts():
    assert started(slowed(0.009), 9.0) == ["new"]
    # Nor what leaves prompts next to nothing of the time.
    assert started(slowed(0.011), 9.0) == ["new"]
    # Nor where decoding is slower than the cost model knows.
    assert started(slowed(0.018, alone_s=0.019), 9.0) == ["new"]


def test_the_pace_is_forgotten_when_nobody_runs():
    policy = slowed(0.018)
    policy.on_launch(IterationPlan(), Launch())
    assert policy.pace.step_s > 0
    for rid in list(policy.books.running):
        policy.remove(rid, Outcome.FINISHED)
    policy.on_launch(IterationPlan(), Launch())
    assert policy.pace.step_s == policy.pace.alone_s == policy.pace.paused_s == 0


def test_one_stall_is_not_the_pace():
    policy = serving(slo=Slo(tpot_s=0.018), holding=HoldingConfig(steps=1))
    for _ in range(1000):
        policy.on_iteration(IterationWork(decoding=5), STEP_S)
    policy.on_iteration(IterationWork(decoding=5), 30.0)
    come(policy, "new", 1.0)
    assert started(policy, 9.0) == ["new"]


def test_a_plan_with_held_prompts_is_the_same_again():
    policy = serving()
    come(policy, "new", 1.0)
    view = View(1.0, CAPACITY, policy.ledger.held_tokens, free_rows=99, max_running=64)
    before = pickle.dumps(policy)
    assert policy.plan(view) == policy.plan(view) == pickle.loads(before).plan(view)


def arrivals(shedding, number, state_of):
    """Whether each of so many requests is deferred."""
    states = [state_of(index) for index in range(number)]
    for state in states:
        shedding.arrive(state)
    return states


def state_of_size(index):
    policy = EconoServe(EconoServeConfig(CAPACITY))
    come(policy, "x", 0.0, prompt=10 + 37 * index % 1000)
    state = policy.books["x"]
    state.deferred = False
    return state


def test_demand_is_kvc_times_steps():
    policy = EconoServe(EconoServeConfig(CAPACITY))
    policy.add(Task("x", 0.0, 100, LengthPrediction((10, 30), 0.5, 50)))
    # Responses of 10 or 30 tokens: 100 x 20 + (10^2 + 30^2) / 2 / 2.
    assert demand_of(policy.books["x"]) == pytest.approx(100 * 20 + 250)


def test_nobody_is_deferred_while_nobody_loses():
    states = arrivals(Shedding(SheddingConfig(), CAPACITY), 100, state_of_size)
    assert not any(state.deferred for state in states)


def test_losses_defer_the_largest_and_are_forgotten():
    shedding = Shedding(SheddingConfig(step=0.1, most=0.1), CAPACITY)
    small = arrivals(shedding, 100, state_of_size)[0]
    shedding.lose(small)
    later = arrivals(shedding, 100, state_of_size)
    deferred = [state for state in later if state.deferred]
    assert 3 <= len(deferred) <= 12
    least = min(demand_of(state) for state in deferred)
    assert sum(demand_of(state) > least for state in later) <= 15
    arrivals(shedding, 2000, state_of_size)
    assert not any(state.deferred for state in arrivals(shedding, 50, state_of_size))


def test_what_the_deferred_lose_defers_nobody_else():
    shedding = Shedding(SheddingConfig(), CAPACITY)
    state = state_of_size(0)
    state.deferred = True
    for _ in range(50):
        shedding.lose(state)
    assert not any(state.deferred for state in arrivals(shedding, 50, state_of_size))


def test_a_deferred_prompt_leaves_room_until_it_is_due():
    config = {"holding": HoldingConfig(steps=0), "shedding": SheddingConfig(margin_fraction=0.4)}
    policy = serving(**config)
    come(policy, "large", 1.0, prompt=5000)
    policy.books["large"].deferred = True
    come(policy, "small", 1.0, prompt=100)
    # 10,000 tokens hold 8 x 210 and 5,000 and 200, but not 4,000 besides.
    assert started(policy, 1.0) == ["small"]
    policy.books["large"].deferred = False
    assert "large" in started(policy, 1.0)
    policy.books["large"].deferred = True
    assert "large" in started(policy, 1.0 + policy.config.order.best_effort_s)


def test_those_that_step_back_hold_up_nobody():
    config = {"holding": HoldingConfig(steps=0), "shedding": SheddingConfig(margin_fraction=0.4)}
    policy = serving(**config)
    for index in range(5):
        come(policy, f"large{index}", 1.0 + index / 100, prompt=5000)
        policy.books[f"large{index}"].deferred = True
    come(policy, "small", 3.0, prompt=100)
    assert started(policy, 3.0) == ["small"]


def test_a_request_that_lost_its_slo_leaves_room_until_its_new_deadline():
    config = {"holding": HoldingConfig(steps=0), "shedding": SheddingConfig(margin_fraction=0.4)}
    policy = serving(**config, order=OrderConfig(demoted_s=20.0))
    come(policy, "lost", 1.0, prompt=5000, slo=Slo(ttft_s=0.5))
    policy.on_launch(IterationPlan(demote=("lost",)), Launch())
    assert policy.books["lost"].demoted
    assert started(policy, 20.9) == []
    assert started(policy, 21.1) == ["lost"]


def test_a_deferred_request_runs_alone_whatever_it_leaves():
    policy = EconoServe(EconoServeConfig(CAPACITY))
    come(policy, "huge", 1.0, prompt=9500)
    policy.books["huge"].deferred = True
    assert started(policy, 1.0) == ["huge"]


def test_where_nobody_is_found_late_nobody_steps_back():
    spec = replace(OVERLOAD, constants={"late": Late.SERVE})
    never = {"late": Late.SERVE, "shedding": SheddingConfig(margin_fraction=0, step=0, most=0)}
    assert simulate(spec).figures == simulate(replace(OVERLOAD, constants=never)).figures


def test_a_refused_request_counts_as_a_loss():
    policy = EconoServe(EconoServeConfig(CAPACITY, shedding=SheddingConfig(step=0.1)))
    come(policy, "late", 0.0, slo=Slo(ttft_s=0.1))
    policy.remove("late", Outcome.REJECTED)
    for index in range(20):
        come(policy, f"n{index}", 1.0, prompt=10 + index)
    assert policy.books["n19"].deferred
    assert not policy.books["n5"].deferred


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: HoldingConfig(steps=-1), "steps=-1"),
        (lambda: HoldingConfig(pace=0.0), "pace=0.0"),
        (lambda: SheddingConfig(margin_fraction=1.0), "margin_fraction=1.0"),
        (lambda: SheddingConfig(step=-0.1), "step=-0.1"),
        (lambda: EconoServeConfig(10, holding=SheddingConfig()), "holding="),
    ],
)
def test_values_out_of_range_are_named(make, field):
    with pytest.raises(ValueError, match=field):
        make()


OVERLOAD = RunSpec(
    "plus",
    WorkloadSpec("synthetic:sharegpt", 2.2, 500, slo=Slo(ttft_s=1.0, tpot_s=0.2), seed=5),
    "a100",
    "opt-13b",
    predictor="prefix-tree",
    capacity_tokens=8_000,
)
"""More than the machine can do."""


def test_more_keep_their_slo_in_an_overload_where_large_requests_step_back():
    never = {"shedding": SheddingConfig(margin_fraction=0, step=0, most=0)}
    with_it = simulate(OVERLOAD).figures
    without = simulate(replace(OVERLOAD, constants=never)).figures
    assert with_it["served"] == without["served"] == with_it["requests"]
    assert with_it["ssr"] > without["ssr"] + 0.05, (with_it["ssr"], without["ssr"])
