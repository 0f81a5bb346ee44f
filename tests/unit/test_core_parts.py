"""The parts of the scheduling core, one by one: lengths, cost, queues, order, books."""

import math
import random
import re
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from econoserve.core.books import Books, TaskState
from econoserve.core.cost import MIN_SAMPLES, CostModel, IterationWork, TfsConfig
from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.core.late import Late
from econoserve.core.lengths import LengthPrediction
from econoserve.core.nested import Nesting
from econoserve.core.order import LengthOrder, Order, OrderConfig, Ordering
from econoserve.core.plain import PlainLedger
from econoserve.core.queues import GroupedQueue, Place, from_rank
from econoserve.core.types import (
    NeverFits,
    Preemption,
    Slo,
    Task,
)
from econoserve.policies import make_policy
from econoserve.policies.econoserve import EconoServeConfig

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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantiles_tokens", (3, 2)),
        ("quantiles_tokens", (0, 2)),
        ("level", 0.0),
        ("level", 1.1),
        ("level", math.nan),
        ("cap_tokens", -1),
    ],
)
def test_an_impossible_prediction_is_refused(field, value):
    known = {"quantiles_tokens": (1, 2), "level": 0.5, "cap_tokens": 9}
    with pytest.raises(ValueError, match=re.escape(f"{field}={value}: give ")):
        LengthPrediction(**{**known, field: value})


def test_a_prediction_may_know_nothing_and_allow_nothing():
    prediction = LengthPrediction((), level=1.0, cap_tokens=0)
    assert (prediction.tokens, prediction.mean_tokens) == (1, 1.0)


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


def test_slow_iterations_say_nothing_about_the_others():
    draw, plain, disturbed = random.Random(3), CostModel(), CostModel()
    for index in range(60):
        prompt, decoding = draw.choice((0, draw.randrange(20, 400))), draw.randrange(1, 40)
        work = IterationWork(prompt, prompt * prompt, decoding, decoding * 150)
        elapsed_s = 0.003 + 6e-5 * prompt + 1e-4 * decoding
        plain.observe(work, elapsed_s)
        # The first one compiles a kernel, a later one waits for another process.
        disturbed.observe(work, elapsed_s + (2.0 if index in (0, 1, 40) else 0.0))
    work = IterationWork(200, 40_000, 20, 3_000)
    assert disturbed.seconds(work) == pytest.approx(plain.seconds(work), rel=0.3)


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
    tfs = TfsConfig(limits_tokens=(16, 100_000), saturation=0.9, tpot_burst=2.0)
    # 0.9 of 1 / c1 needs P = 0.9 * c0 / c1 / 0.1 = 900.
    assert tfs.tokens(cost, 0, 0, math.inf) == 900
    # Twice 25 ms may pass: (0.05 - 0.01) / 1e-4 = 400 prompt tokens beside 10 decodes.
    assert tfs.tokens(cost, 10, 0, 0.025) == pytest.approx(410, abs=1)
    assert tfs.tokens(cost, 0, 0, 0.0) == 16
    assert TfsConfig(limits_tokens=(16, 300)).tokens(cost, 0, 0, math.inf) == 300
    assert TfsConfig(pinned_tokens=77).tokens(cost, 0, 0, math.inf) == 77


DECODE_ONLY_S = (0.006, 0.0, 0.0, 1e-5, 0.0)
"""With a CUDA graph."""

MIXED_S = (0.020, 2e-5, 0.0, 2e-5, 0.0)
"""Without one."""


def test_the_tfs_sees_that_mixed_iterations_lose_the_cuda_graph():
    """A fake profile: iterations that only decode are cheap, mixed ones are not."""

    def learned(mixed_s):
        cost = CostModel()
        for step in range(200):
            for prompt, known_s in ((0, DECODE_ONLY_S), (64 + 16 * (step % 40), mixed_s)):
                decoding = 8 + step % 50
                work = IterationWork(prompt, 0, decoding, 0)
                elapsed_s = known_s[0] + known_s[1] * prompt + known_s[3] * decoding
                cost.observe(work, elapsed_s)
        return cost

    two_regimes = learned(MIXED_S)
    one_regime = learned((DECODE_ONLY_S[0], *MIXED_S[1:]))
    assert two_regimes.seconds(IterationWork(decoding=64)) == pytest.approx(0.00664, rel=0.01)
    tfs = TfsConfig(limits_tokens=(128, 100_000), saturation=0.9, tpot_burst=1.0)
    # What an iteration costs before its first prompt token is spread over more of them.
    dear, cheap = (tfs.tokens(one, 64, 0, math.inf) for one in (two_regimes, one_regime))
    assert dear > 2 * cheap
    # A TPOT of 30 ms leaves 30 - 20 - 64 * 0.02 ms for prompts, not 30 - 6.64 ms.
    assert tfs.tokens(two_regimes, 64, 0, 0.030) - 64 == pytest.approx(436, rel=0.02)
    # Where even an empty mixed iteration is too long, no more than the least TFS.
    assert tfs.tokens(two_regimes, 64, 0, 0.015) == 128


def test_a_policy_learns_both_regimes_from_what_it_is_told():
    policy = make_policy("plus", 10_000, tfs=TfsConfig(limits_tokens=(128, 100_000)))
    for step in range(40):
        policy.on_iteration(IterationWork(decoding=8 + step), 0.006 + 1e-5 * (8 + step))
    decode_only = policy.tfs_tokens(8, math.inf)
    for step in range(40):
        prompt = 100 + 10 * step
        policy.on_iteration(IterationWork(prompt, 0, 8, 0), 0.020 + 2e-5 * prompt)
    assert policy.tfs_tokens(8, math.inf) > 2 * decode_only
    # More of the cheap kind change nothing.
    after = policy.tfs_tokens(8, math.inf)
    for _ in range(40):
        policy.on_iteration(IterationWork(decoding=8), 0.0061)
    assert policy.tfs_tokens(8, math.inf) == after


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: TfsConfig(pinned_tokens=0), "pinned_tokens"),
        (lambda: TfsConfig(limits_tokens=(9, 3)), "limits_tokens"),
        (lambda: TfsConfig(saturation=1.0), "saturation"),
        (lambda: TfsConfig(tpot_burst=0.5), "tpot_burst=0.5"),
        (lambda: CostModel(forgetting=0.0), "forgetting"),
        (lambda: CostModel(coefficients_s=(1, 1, 1, 1, -1)), "coefficients_s"),
        (lambda: OrderConfig(group_ratio=1.0), "group_ratio"),
        (lambda: OrderConfig(window_s=0.0), "window_s"),
    ],
)
def test_impossible_constants_are_refused(make, field):
    with pytest.raises(ValueError, match=field):
        make()


CHOICES = [
    (KvcConfig, "mode", KvcMode),
    (KvcConfig, "nesting", Nesting),
    (OrderConfig, "order", Order),
    (OrderConfig, "length_order", LengthOrder),
    (partial(EconoServeConfig, 100), "late", Late),
]


@pytest.mark.parametrize(("config", "field", "choices"), CHOICES)
def test_a_choice_may_be_given_by_its_value(config, field, choices):
    for choice in choices:
        assert getattr(config(**{field: choice}), field) is choice
        assert config(**{field: choice.value}) == config(**{field: choice})


@pytest.mark.parametrize("value", ["risky", "", "EXACT", None, 1, [], Preemption.PARK])
@pytest.mark.parametrize(("config", "field", "choices"), CHOICES)
def test_what_is_no_choice_is_refused_with_the_choices(config, field, choices, value):
    known = ", ".join(choice.value for choice in choices)
    expected = re.escape(f"{field}={value!r}: give one of {known}") + "$"
    with pytest.raises(ValueError, match=expected):
        config(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("risk", 0.0),
        ("risk", 1.0),
        ("risk", math.nan),
        ("points", 1),
        ("lead_tokens", -1),
        ("buffer_tokens", -1),
        ("reserve_fraction", -0.1),
        ("reserve_fraction", 1.0),
    ],
)
@pytest.mark.parametrize("mode", KvcMode)
def test_constants_of_the_ledger_are_checked_whatever_the_mode(mode, field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value}: give ")):
        KvcConfig(mode, **{field: value})


@pytest.mark.parametrize("name", ["plus", "vllm"])
@pytest.mark.parametrize("value", [0, -1, True, "8000", None, 8000.0])
def test_a_capacity_is_a_whole_number(name, value):
    expected = re.escape(f"capacity_tokens={value!r}: give a whole number of 1 or more")
    with pytest.raises(ValueError, match=expected):
        make_policy(name, value)
    with pytest.raises(ValueError, match=expected):
        EconoServeConfig(value)


@pytest.mark.parametrize("value", [None, "risk", {"risk": 0.1}, CostModel()])
@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("kvc", "KvcConfig"),
        ("order", "OrderConfig"),
        ("victims", "VictimConfig"),
        ("tfs", "TfsConfig"),
    ],
)
def test_a_part_of_another_type_is_refused_with_the_class_to_pass(part, kind, value):
    with pytest.raises(ValueError, match=re.escape(f"{part}={value!r}: pass {part}={kind}(...)")):
        make_policy("plus", 100, **{part: value})


@pytest.mark.parametrize(
    ("name", "constant", "hint"),
    [
        ("plus", "risk", "pass kvc=KvcConfig(risk=...); the constants of EconoServe are kvc, "),
        ("plus", "window_s", "pass order=OrderConfig(window_s=...); "),
        ("d", "pinned_tokens", "pass tfs=TfsConfig(pinned_tokens=...); "),
        ("full", "patience_s", "pass victims=VictimConfig(patience_s=...); "),
        ("plus", "mode", "EconoServe(EconoServeConfig(capacity_tokens, kvc=KvcConfig(mode=...)))"),
        ("plus", "nonsense", "no such constant; the constants of EconoServe are kvc, order, "),
        ("sarathi", "risk", "no such constant; the constants of Sarathi are chunk_tokens, "),
    ],
)
def test_an_unknown_constant_is_refused_with_the_known_ones(name, constant, hint):
    with pytest.raises(TypeError, match=rf"^{constant}=0\.1: .*" + re.escape(hint)):
        make_policy(name, 100, **{constant: 0.1})


def test_a_variant_sets_the_mode_and_the_order():
    policy = make_policy("d", 100, kvc=KvcConfig("skyline", risk=0.3), order=OrderConfig("urgency"))
    assert policy.config.kvc == KvcConfig(KvcMode.EXACT, risk=0.3)
    assert policy.config.order.order is Order.ARRIVAL


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
