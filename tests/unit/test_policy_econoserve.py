"""EconoServe in small scenes: victims, late requests, cached prefixes, offloaded tasks."""

import pytest

from econoserve.core.cost import TfsConfig
from econoserve.core.filling import HELD_UP
from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.core.late import Late
from econoserve.core.lengths import LengthPrediction
from econoserve.core.order import Order, OrderConfig
from econoserve.core.types import (
    CachedPrefix,
    IterationPlan,
    Launch,
    Outcome,
    Preemption,
    Prefilled,
    Slo,
    Task,
    View,
)
from econoserve.core.victims import VictimConfig
from econoserve.policies.econoserve import EconoServe, EconoServeConfig


def crowd(offload_s_per_token=None):
    """Three GTs of a policy that run in a full KVC; the next token finds no slot."""
    config = EconoServeConfig(
        100,
        kvc=KvcConfig(KvcMode.EXACT, reserve_fraction=0.0),
        victims=VictimConfig(offload_s_per_token=offload_s_per_token),
    )
    policy = EconoServe(config)
    sizes = {"tight": (30, Slo(e2e_s=1.0)), "loose": (30, Slo(e2e_s=500.0)), "none": (40, Slo())}
    for rid, (prompt, slo) in sizes.items():
        policy.add(Task(rid, 0.0, prompt, LengthPrediction((5,), 1.0, 50), slo))
    parts = tuple(Prefilled(rid, prompt, 0, True) for rid, (prompt, _) in sizes.items())
    policy.on_launch(IterationPlan(), Launch(prefilled=parts))
    policy.on_launch(IterationPlan(), Launch(resumed=tuple(sizes)))
    return policy


def test_the_victim_is_the_one_with_the_longest_slack_and_one_is_enough():
    policy = crowd()
    plan = policy.plan(View(0.0, 100, 100, free_rows=9, max_running=9))
    assert plan.preempt == (("loose", Preemption.RECOMPUTE),)
    # With a slot for each, nobody gives way, whatever was promised.
    assert not policy.plan(View(0.0, 100, 97, free_rows=9, max_running=9)).preempt
    assert policy.plan(View(0.0, 100, 98, free_rows=9, max_running=9)).preempt


def test_offloading_is_chosen_where_it_is_cheaper():
    for per_token_s, how in ((1e-9, Preemption.OFFLOAD), (1.0, Preemption.RECOMPUTE)):
        plan = crowd(per_token_s).plan(View(0.0, 100, 100, free_rows=9, max_running=9))
        assert [chosen for _, chosen in plan.preempt] == [how]


def test_an_offloaded_task_comes_back_with_its_kvc():
    policy = crowd(offload_s_per_token=1e-9)
    view = View(0.0, 100, 100, free_rows=9, max_running=9)
    plan = policy.plan(view)
    policy.on_launch(plan, Launch(offloaded=("loose",), decoded=("tight", "none")))
    assert policy.books["loose"].offloaded_tokens == 30 and "loose" not in policy.ledger
    policy.remove("none", Outcome.FINISHED)
    plan = policy.plan(View(0.0, 100, 31, free_rows=9, max_running=9))
    assert plan.resume == ("loose",) and not plan.prefill
    policy.on_launch(plan, Launch(resumed=("loose",), decoded=("tight", "loose")))
    assert policy.ledger.held_by("loose") == 31 and policy.books["loose"].offloaded_tokens == 0


@pytest.mark.parametrize("late", Late)
def test_a_prompt_that_cannot_keep_its_slo(late):
    policy = EconoServe(EconoServeConfig(100, late=late))
    for rid in ("late", "fine"):
        slo = Slo(ttft_s=1.0 if rid == "late" else 20.0)
        policy.add(Task(rid, 0.0, 90, LengthPrediction((5,), 1.0, 50), slo))
    plan = policy.plan(View(5.0, 100, 0, free_rows=9, max_running=9))
    assert plan.demote == (("late",) if late is Late.DEMOTE else ())
    if late is Late.SERVE:
        assert plan.prefill[0][0] == "late" and not plan.reject
        return
    assert plan.prefill[0][0] == "fine"
    if late is Late.REJECT:
        ((rid, reason),) = plan.reject
        assert rid == "late" and "SLO" in reason and "ms ago" in reason
        policy.remove("late", Outcome.REJECTED)
    policy.on_launch(plan, Launch())
    again = policy.plan(View(5.0, 100, 0, free_rows=9, max_running=9))
    assert not again.demote and not again.reject and again.prefill[0][0] == "fine"


def test_what_produced_tokens_is_never_late():
    policy = EconoServe(EconoServeConfig(100, late=Late.REJECT))
    prediction = LengthPrediction((5,), 1.0, 50)
    policy.requeue(Task("back", 0.0, 20, prediction, Slo(ttft_s=1.0), generated_tokens=4))
    plan = policy.plan(View(9.0, 100, 0, free_rows=9, max_running=9))
    assert not plan.reject and plan.prefill == (("back", 20),)


def test_a_long_cached_prompt_starts_although_it_would_not_fit_without_its_prefix():
    policy = EconoServe(EconoServeConfig(100))
    policy.add(Task("cached", 0.0, 90, LengthPrediction((5,), 1.0, 50)))
    full = View(0.0, 100, 80, free_rows=9, max_running=9)
    policy.books.ledger.pin("other", 80, key="prefix")
    assert not policy.plan(full).prefill
    shares = View(0.0, 100, 80, 9, 9, cached_prefix=lambda rid: CachedPrefix(80, 0, "prefix"))
    assert policy.plan(shares).prefill == (("cached", 10),)


@pytest.mark.parametrize("mode", KvcMode)
@pytest.mark.parametrize("order", Order)
def test_offloaded_tasks_come_back_only_as_far_as_they_fit(mode, order):
    policy = EconoServe(
        EconoServeConfig(200, kvc=KvcConfig(mode, reserve_fraction=0.0), order=OrderConfig(order))
    )
    sizes = {"big": (80, 52), "small": (10, 53), "other": (50, 90)}
    for rid, (prompt, rl) in sizes.items():
        policy.add(Task(rid, 0.0, prompt, LengthPrediction((rl,), 1.0, 100)))
    parts = tuple(Prefilled(rid, prompt, 0, True) for rid, (prompt, _) in sizes.items())
    policy.on_launch(IterationPlan(), Launch(prefilled=parts))
    policy.on_launch(IterationPlan(), Launch(resumed=tuple(sizes)))
    policy.on_launch(IterationPlan(), Launch(offloaded=("big", "small"), decoded=("other",)))
    used = 126
    for _ in range(3):
        plan = policy.plan(View(0.0, 200, used, free_rows=9, max_running=9))
        back = [rid for rid in plan.resume if policy.books[rid].offloaded_tokens]
        used += sum(policy.books[rid].offloaded_tokens for rid in back)
        running = (*policy.books.running, *plan.resume)
        used += len(running)
        assert used <= 200
        policy.on_launch(plan, Launch(resumed=plan.resume, decoded=running))


def test_a_demoted_task_that_gives_up_its_kvc_stays_demoted():
    policy = EconoServe(EconoServeConfig(100))
    task = Task("lost", 0.0, 20, LengthPrediction((5,), 1.0, 50), Slo(ttft_s=1.0))
    policy.add(task)
    place = policy.books["lost"].place
    policy.books.demote("lost")
    demoted = policy.books["lost"].place
    assert demoted > place
    policy.requeue(task)
    assert policy.books["lost"].place == demoted


def prompt(rid: str, tokens: int, slo: Slo | None = None) -> Task:
    """A task whose response is short."""
    return Task(rid, 0.0, tokens, LengthPrediction((5,), 1.0, 50), slo or Slo())


def midway(slo: Slo, order: Order = Order.URGENCY):
    """A policy with a TFS of 64 tokens that has computed as many of a prompt of 700."""
    policy = EconoServe(
        EconoServeConfig(1024, tfs=TfsConfig(pinned_tokens=64), order=OrderConfig(order))
    )
    policy.add(prompt("long", 700, slo))
    first = policy.plan(View(0.0, 1024, 0, free_rows=9, max_running=9))
    policy.on_launch(first, Launch(prefilled=(Prefilled("long", 64, 0, False),)))
    return policy, View(0.0, 1024, 64, free_rows=9, max_running=9)


def test_short_prompts_share_the_passes_of_a_long_one():
    policy, view = midway(Slo())
    for rid, tokens in (("short", 20), ("longer", 40)):
        policy.add(prompt(rid, tokens))
    assert policy.plan(view).prefill == (("long", 44), ("short", 20))


def test_they_do_so_however_many_long_ones_wait():
    policy, view = midway(Slo())
    for number in range(20):
        policy.add(prompt(f"long-{number}", 600 + 20 * number))
    policy.add(prompt("short", 20))
    assert policy.plan(view).prefill == (("long", 44), ("short", 20))


def test_what_is_more_urgent_may_take_nearly_all_of_the_pass():
    policy, view = midway(Slo())
    policy.add(prompt("urgent", 60, Slo(ttft_s=0.5)))
    policy.add(prompt("short", 4))
    assert policy.plan(view).prefill == (("long", 4), ("urgent", 60))


def test_without_free_kvc_for_a_pass_a_long_prompt_shares_with_nobody():
    policy, _ = midway(Slo())
    policy.add(prompt("short", 4))
    full = View(0.0, 1024, 1000, free_rows=9, max_running=9)
    assert policy.plan(full).prefill == (("long", 24),)


def test_of_a_prompt_that_shares_a_pass_only_what_is_not_cached_counts():
    policy, _ = midway(Slo())
    policy.add(prompt("short", 50))
    view = View(
        *(0.0, 1024, 64),
        free_rows=9,
        max_running=9,
        cached_prefix=lambda rid: CachedPrefix(tokens=40, evictable_tokens=40),
    )
    assert policy.plan(view).prefill == (("long", 54), ("short", 10))


def test_prompts_that_wait_for_something_else_than_kvc_stop_nobody():
    policy = EconoServe(EconoServeConfig(1024, tfs=TfsConfig(pinned_tokens=64)))
    for number in range(5):
        policy.add(prompt(f"held-{number}", 10))
    policy.add(prompt("free", 12))
    asked = []

    def startable(rid: str) -> bool:
        asked.append(rid)
        return rid == "free"

    view = View(0.0, 1024, 0, free_rows=9, max_running=9, startable=startable)
    assert policy.plan(view).prefill == (("free", 12),)
    for number in range(5, 40):
        policy.add(prompt(f"held-{number}", 10))
    asked.clear()
    assert policy.plan(view).prefill == ()
    assert len(asked) == HELD_UP
    # After all patience, they stop the others, so that what they wait for comes free.
    late = View(100.0, 1024, 0, free_rows=9, max_running=9, startable=startable)
    asked.clear()
    assert policy.plan(late).prefill == ()
    assert len(asked) == 1


def test_a_long_prompt_with_an_slo_shares_only_with_what_is_as_urgent():
    policy, view = midway(Slo(ttft_s=3.0))
    policy.add(prompt("short", 20))
    assert policy.plan(view).prefill == (("long", 64),)
    policy.add(prompt("urgent", 20, Slo(ttft_s=0.5)))
    assert policy.plan(view).prefill == (("long", 44), ("urgent", 20))


def test_in_strict_order_a_long_prompt_shares_with_nobody():
    policy, view = midway(Slo(), Order.ARRIVAL)
    policy.add(prompt("short", 20))
    assert policy.plan(view).prefill == (("long", 64),)
