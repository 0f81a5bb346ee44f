"""The parts of the scheduling core, one by one: lengths, cost, queues, order, late, victims."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from econoserve.core.books import Books, TaskState
from econoserve.core.cost import MIN_SAMPLES, CostModel, IterationWork, TfsConfig
from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.core.late import Late
from econoserve.core.lengths import LengthPrediction
from econoserve.core.order import LengthOrder, Order, OrderConfig, Ordering
from econoserve.core.plain import PlainLedger
from econoserve.core.queues import GroupedQueue, Place, from_rank
from econoserve.core.types import (
    CachedPrefix,
    IterationPlan,
    Launch,
    NeverFits,
    Outcome,
    Preemption,
    Prefilled,
    Slo,
    Task,
    View,
)
from econoserve.core.victims import VictimConfig
from econoserve.policies.econoserve import EconoServe, EconoServeConfig

lengths = st.lists(st.integers(1, 500), min_size=1, max_size=20).map(sorted).map(tuple)


@given(lengths, st.integers(0, 600), st.integers(1, 12))
def test_outcomes_are_what_survivors_may_reach(quantiles, generated, points):
    prediction = LengthPrediction(quantiles, level=0.5, cap_tokens=400)
    outcomes = prediction.outcomes(generated, points)
    assert len(outcomes) == points and list(outcomes) == sorted(outcomes)
    assert all(min(generated + 1, 400) <= tokens <= 400 for tokens in outcomes)
    survivors = [tokens for tokens in quantiles if tokens > generated]
    if survivors and points > 1:
        assert set(outcomes) <= {min(tokens, 400) for tokens in survivors}


def test_mean_and_variance_are_of_the_capped_lengths():
    prediction = LengthPrediction((2, 4, 100), level=0.5, cap_tokens=6)
    assert prediction.mean_tokens == pytest.approx(4.0)
    assert prediction.variance_tokens2 == pytest.approx(8 / 3)


def measured(coefficients, works):
    features = [
        (1, w.prefill_tokens, w.prefill_squared, w.decoding, w.context_tokens) for w in works
    ]
    return [sum(c * x for c, x in zip(coefficients, f, strict=True)) for f in features]


def works(mixed, count):
    draw = random.Random(5)
    made = []
    for _ in range(count):
        prompt = draw.randint(1, 2048) if mixed else 0
        made.append(
            IterationWork(
                prompt,
                prompt * draw.randint(1, 4096),
                draw.randint(1, 256),
                draw.randint(100, 200_000),
            )
        )
    return made


def test_the_cost_model_finds_the_coefficients_of_both_regimes():
    truth = {False: (4e-3, 0, 0, 2e-5, 3e-8), True: (9e-3, 6e-5, 1e-9, 5e-5, 4e-8)}
    cost = CostModel()
    for mixed, coefficients in truth.items():
        made = works(mixed, 600)
        for work, elapsed_s in zip(made, measured(coefficients, made), strict=True):
            cost.observe(work, elapsed_s)
    for mixed, coefficients in truth.items():
        made = works(mixed, 40)
        for work, elapsed_s in zip(made, measured(coefficients, made), strict=True):
            assert cost.seconds(work) == pytest.approx(elapsed_s, rel=0.02)
    # Mixed iterations lose the CUDA graph: the same decode costs more in them.
    decode = cost.seconds(IterationWork(decoding=64, context_tokens=50_000))
    mixed = cost.seconds(IterationWork(1, 1, 64, 50_000))
    assert mixed > decode + 4e-3


def test_few_samples_change_nothing_and_one_regime_helps_out_the_other():
    cost, prior = CostModel(), CostModel()
    work = IterationWork(decoding=8, context_tokens=100)
    for _ in range(MIN_SAMPLES - 1):
        cost.observe(work, 5.0)
    assert cost.seconds(work) == prior.seconds(work)
    cost.observe(work, 5.0)
    assert cost.seconds(work) == pytest.approx(5.0, rel=0.05)
    assert cost.coefficients_s(mixed=True) == cost.coefficients_s(mixed=False)


def test_a_cost_model_survives_a_million_equal_iterations():
    cost = CostModel()
    work = IterationWork(decoding=8, context_tokens=100)
    for _ in range(20_000):
        cost.observe(work, 0.01)
    cost.observe(IterationWork(decoding=9, context_tokens=120), 0.0101)
    assert all(math.isfinite(c) for c in cost.coefficients_s(mixed=False))
    assert cost.seconds(work) == pytest.approx(0.01, rel=0.05)


def fitted(coefficients):
    return CostModel(coefficients_s=coefficients)


def test_tfs_stops_at_saturation_at_the_tightest_tpot_and_at_its_limits():
    cost = fitted((0.01, 1e-4, 0.0, 0.0, 0.0))
    tfs = TfsConfig(limits_tokens=(16, 100_000), saturation=0.9)
    # 0.9 of 1 / c1 needs P = 0.9 * c0 / c1 / 0.1 = 900.
    assert tfs.tokens(cost, 0, 0, math.inf) == 900
    # With a slack of 50 ms: (0.05 - 0.01) / 1e-4 = 400 prompt tokens beside 10 decodes.
    assert tfs.tokens(cost, 10, 0, 0.05) == pytest.approx(410, abs=1)
    assert tfs.tokens(cost, 0, 0, 0.0) == 16
    assert TfsConfig(limits_tokens=(16, 300)).tokens(cost, 0, 0, math.inf) == 300
    assert TfsConfig(pinned_tokens=77).tokens(cost, 0, 0, math.inf) == 77


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: TfsConfig(pinned_tokens=0), "pinned_tokens"),
        (lambda: TfsConfig(limits_tokens=(9, 3)), "limits_tokens"),
        (lambda: TfsConfig(saturation=1.0), "saturation"),
        (lambda: CostModel(forgetting=0.0), "forgetting"),
        (lambda: CostModel(coefficients_s=(1, 1, 1, 1, -1)), "coefficients_s"),
        (lambda: OrderConfig(group_ratio=1.0), "group_ratio"),
        (lambda: OrderConfig(window_s=0.0), "window_s"),
    ],
)
def test_impossible_constants_are_refused(make, field):
    with pytest.raises(ValueError, match=field):
        make()


class Thing:
    def __init__(self, place):
        self.place = place


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=40), st.data())
def test_a_grouped_queue_is_a_sorted_list(entries, data):
    queue = GroupedQueue(lambda thing: thing.place)
    things = [
        Thing(Place((group, 0), rank, number)) for number, (group, rank) in enumerate(entries)
    ]
    for thing in things:
        queue.add(thing)
    gone = data.draw(st.sets(st.sampled_from(things))) if things else set()
    for thing in sorted(gone, key=lambda thing: thing.place):
        queue.remove(thing)
    left = sorted((t for t in things if t not in gone), key=lambda thing: thing.place)
    assert list(queue) == left and len(queue) == len(left)
    assert list(reversed(queue)) == left[::-1]
    for key, group in queue.groups():
        bound = data.draw(st.integers(0, 9))
        expected = [t for t in left if t.place.group == key and t.place.rank >= bound]
        assert list(from_rank(group, lambda bound=bound: bound)) == expected


def test_levels_are_the_groups_that_start_alike():
    queue = GroupedQueue(lambda thing: thing.place)
    for number, key in enumerate([(1, -2, 3), (1, -2, -4), (1, 0, 0), (5, 0, 0)]):
        queue.add(Thing(Place(key, 0, number)))
    assert queue.after(()) == (1, -2, -4)
    assert queue.level((1, -2)) == [(1, -2, -4), (1, -2, 3)]
    assert queue.after((1, -2)) == (1, 0, 0)
    assert queue.after((5, 0)) is None


class Queues:
    """An order and the books that follow it."""

    def __init__(self, **constants):
        ledger = PlainLedger(10_000)
        self.ordering = Ordering(OrderConfig(**constants), CostModel(), ledger)
        self.books = Books(ledger, self.ordering.pt_place, self.ordering.gt_place)

    def latest_start_s(self, state, generating):
        return self.ordering.latest_start_s(state, generating)


def ordering(**constants):
    return Queues(**constants)


def add(order, rid, prompt=10, rl=20, arrival_s=0.0, slo=None):
    prediction = LengthPrediction((rl,), 1.0, 10_000)
    return order.books.add(Task(rid, arrival_s, prompt, prediction, slo or Slo()))


def waiting(order):
    return [state.task.rid for state in order.books.waiting]


def test_urgency_comes_before_length_and_an_slo_before_none():
    order = ordering(window_s=1.0)
    add(order, "none", prompt=1)
    add(order, "loose", prompt=1, slo=Slo(e2e_s=8.0))
    add(order, "tight-long", prompt=90, slo=Slo(ttft_s=0.5))
    add(order, "tight-short", prompt=9, slo=Slo(ttft_s=0.6))
    assert waiting(order) == ["tight-short", "tight-long", "loose", "none"]


def test_the_length_order_is_a_choice():
    for direction, expected in (
        (LengthOrder.LONGER, ["b", "a"]),
        (LengthOrder.SHORTER, ["a", "b"]),
    ):
        order = ordering(length_order=direction)
        add(order, "a", prompt=10)
        add(order, "b", prompt=900)
        assert waiting(order) == expected


def test_the_latest_start_leaves_time_for_the_service():
    order = ordering()
    short, long = (
        add(order, "s", rl=10, slo=Slo(e2e_s=9)),
        add(order, "l", rl=500, slo=Slo(e2e_s=9)),
    )
    assert order.latest_start_s(long, generating=True) < order.latest_start_s(
        short, generating=True
    )
    assert order.latest_start_s(short, generating=True) < 9


def test_waiting_makes_every_task_the_most_urgent_one():
    order = ordering(best_effort_s=10.0)
    add(order, "old", arrival_s=0.0)
    add(order, "new", arrival_s=11.0, slo=Slo(ttft_s=0.5))
    assert waiting(order) == ["old", "new"]


def test_arrival_order_ignores_everything_else():
    order = ordering(order=Order.ARRIVAL)
    add(order, "a", prompt=900)
    add(order, "b", prompt=1, slo=Slo(ttft_s=0.01))
    assert waiting(order) == ["a", "b"]


def test_arrival_groups_put_equal_lengths_of_one_window_together():
    order = ordering(order=Order.ARRIVAL_GROUPS, window_s=1.0)
    add(order, "a", prompt=100)
    add(order, "b", prompt=10)
    add(order, "c", prompt=101, arrival_s=0.5)
    add(order, "d", prompt=10, arrival_s=5.0)
    assert waiting(order) == ["b", "a", "c", "d"]


def test_a_demoted_task_waits_behind_those_that_can_keep_their_slo():
    order = ordering()
    add(order, "lost", slo=Slo(ttft_s=0.5))
    add(order, "kept", arrival_s=20.0, slo=Slo(ttft_s=0.5))
    order.books.demote("lost")
    assert waiting(order) == ["kept", "lost"]
    order.books.demote("unknown")


def test_books_refuse_what_never_fits_and_known_ids():
    books = ordering().books
    prediction = LengthPrediction((1,), 1.0, 5)
    with pytest.raises(NeverFits, match="prompt_tokens=10000"):
        books.add(Task("big", 0.0, 10_000, prediction))
    assert len(books) == 0
    books.add(Task("a", 0.0, 5, prediction))
    with pytest.raises(ValueError, match="rid='a'"):
        books.add(Task("a", 0.0, 5, prediction))
    assert isinstance(books["a"], TaskState)


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
