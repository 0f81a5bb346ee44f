"""Prompts that are computed alone, and few together, for the sake of their TTFT."""

import pytest

from econoserve.core.cost import CostModel, IterationWork, TfsConfig
from econoserve.core.lengths import LengthPrediction
from econoserve.core.pausing import BURST, NEAR, PausingConfig
from econoserve.core.types import IterationPlan, Launch, Prefilled, Slo, Task, View
from econoserve.policies.econoserve import EconoServe, EconoServeConfig, variant
from econoserve.prediction.request import RequestFeatures
from econoserve.sim.pool import Live, Pool
from econoserve.sim.records import RequestRecord
from econoserve.sim.run import RunSpec, simulate
from econoserve.workload.trace import TraceRequest
from econoserve.workload.workload import WorkloadSpec

CAPACITY = 10_000
STEP_S, TOKEN_S = 0.010, 0.001
"""An iteration without prompts, and what a prompt token adds to it."""


def learned():
    cost = CostModel()
    for step in range(60):
        decoding, tokens = 4 + step % 3, 10 + 13 * step % 200
        cost.observe(IterationWork(decoding=decoding), STEP_S)
        cost.observe(IterationWork(tokens, 0, decoding), STEP_S + tokens * TOKEN_S)
    return cost


def serving(pace_s=STEP_S, tpot_s=0.1, running=4, **config):
    """A policy whose decodes have had such a pace."""
    policy = EconoServe(
        EconoServeConfig(CAPACITY, tfs=TfsConfig(pinned_tokens=1000), **config), learned()
    )
    rids = [f"r{number}" for number in range(running)]
    for rid in rids:
        come(policy, rid, 0.0, 10, Slo(tpot_s=tpot_s))
    parts = tuple(Prefilled(rid, 10, 0, True) for rid in rids)
    policy.on_launch(IterationPlan(), Launch(prefilled=parts))
    policy.on_launch(IterationPlan(), Launch(resumed=tuple(rids), decoded=tuple(rids)))
    for _ in range(1000):
        policy.on_iteration(IterationWork(decoding=running), pace_s)
    return policy


def come(policy, rid, now_s, prompt, slo):
    policy.add(Task(rid, now_s, prompt, LengthPrediction((200,), 1.0, 400), slo))


def planned(policy, now_s, used=None):
    used = policy.ledger.held_tokens if used is None else used
    return policy.plan(View(now_s, CAPACITY, used, free_rows=99, max_running=64))


def prompts(policy, now_s):
    return [rid for rid, _ in planned(policy, now_s).prefill]


NEAR_SLO = Slo(ttft_s=0.1)
"""A prompt of 50 tokens has to start within 0.04 s then: its pass takes 0.01 s and 0.05 s."""


def test_decodes_sit_out_a_pass_for_a_prompt_that_is_near_its_ttft():
    policy = serving()
    come(policy, "new", 1.0, 50, NEAR_SLO)
    plan = planned(policy, 1.01)
    assert plan.pauses
    assert plan.prefill == (("new", 50),)
    # What runs stays, and decodes in the next one.
    policy.on_launch(plan, Launch(prefilled=(Prefilled("new", 50, 0, True),)))
    assert list(policy.books.running) == ["r0", "r1", "r2", "r3"]
    assert not planned(policy, 1.07).pauses


@pytest.mark.parametrize(
    ("policy", "slo"),
    [
        (serving(), Slo()),
        (serving(), Slo(ttft_s=0.07 + 10 * NEAR * STEP_S)),
        (serving(running=0), NEAR_SLO),
        (serving(tpot_s=None), NEAR_SLO),
        (serving(pace_s=0.09), NEAR_SLO),
        (serving(pausing=PausingConfig(0.0)), NEAR_SLO),
        (serving(pausing=PausingConfig(0.004)), NEAR_SLO),
    ],
    ids=["no TTFT", "far", "nobody decodes", "no TPOT", "slow pace", "off", "KVC scarce"],
)
def test_decodes_go_on_beside_prompts_otherwise(policy, slo):
    come(policy, "new", 1.0, 50, slo)
    plan = planned(policy, 1.01)
    assert plan.prefill
    assert not plan.pauses


def test_decodes_sit_out_for_a_limited_time_and_it_counts_for_their_pace():
    policy = serving(tpot_s=0.1)
    come(policy, "new", 1.0, 50, NEAR_SLO)
    for number in range(2):
        assert planned(policy, 1.01).pauses is (number == 0)
        for _ in range(30):
            policy.on_iteration(IterationWork(prefill_tokens=50, sitting_out=4), 0.06)
    before_s = policy.pace.step_s
    assert policy.pace.paused_s > BURST * 0.1
    policy.on_iteration(IterationWork(decoding=4), STEP_S)
    assert policy.pace.paused_s == 0
    assert policy.pace.step_s == pytest.approx(before_s + (3.6 + STEP_S - before_s) / 256, rel=0.05)


def test_a_prompt_that_ran_alone_is_no_pause():
    policy = serving()
    policy.on_iteration(IterationWork(prefill_tokens=500), 0.5)
    assert policy.pace.paused_s == 0


def test_a_prompt_is_kept_out_where_it_would_make_another_late():
    policy = serving(running=0)
    come(policy, "tight", 1.0, 50, Slo(ttft_s=0.15))
    come(policy, "long", 1.0, 300, Slo(ttft_s=5.0))
    assert prompts(policy, 1.0) == ["tight"]


@pytest.mark.parametrize("ttft_s", [0.6, None], ids=["in time", "no TTFT"])
def test_prompts_go_together_where_nobody_is_late_by_it(ttft_s):
    policy = serving(running=0)
    come(policy, "first", 1.0, 50, Slo(ttft_s=ttft_s))
    come(policy, "long", 1.0, 300, Slo(ttft_s=5.0))
    assert sorted(prompts(policy, 1.0)) == ["first", "long"]


def test_who_is_late_in_any_case_is_not_waited_for():
    policy = serving(running=0, late="serve")
    come(policy, "late", 1.0, 50, Slo(ttft_s=0.15))
    come(policy, "long", 1.0, 300, Slo(ttft_s=5.0))
    assert prompts(policy, 2.0) == ["late", "long"]


@pytest.mark.parametrize("name", ["d", "sd", "sdo", "full"])
def test_only_plus_pauses(name):
    assert variant(name, EconoServeConfig(CAPACITY)).pausing.kvc_fraction == 0


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=f"kvc_fraction={share}: give a share"):
        PausingConfig(share)


def test_the_simulator_counts_what_is_held_while_decodes_sit_out():
    pool = Pool(1000)
    task = Task("a", 0.0, 10, LengthPrediction((5,), 1.0, 5))
    request = TraceRequest(0.0, RequestFeatures(10, 5), 5)
    live = Live(request, task, RequestRecord("a", 0.0, 10, 5, Slo()))
    pool.take(live, 10)
    pool.join(live)
    held_s = 0.0
    for paused in (False, True, True, False, True):
        if not paused:
            pool.decode()
        held_s += pool.used * 2.0
        pool.end_iteration(2.0, sitting_out=int(paused))
    pool.leave(live)
    assert live.held == pool.used == 12
    assert live.token_s == pytest.approx(held_s)
    assert pool.use.iterations == 5


def test_pausing_serves_a_tight_ttft_in_the_simulator():
    workload = WorkloadSpec(
        "synthetic:azure-conv", 2.4, 600, slo=Slo(ttft_s=0.25, tpot_s=0.1), seed=0
    )
    ssr = [
        simulate(
            RunSpec("plus", workload, "a100", "opt-13b", constants={"pausing": PausingConfig(x)})
        ).figures["ssr"]
        for x in (0.0, 0.6)
    ]
    assert ssr[1] > ssr[0] + 0.03
