"""The ledger's modes against the obvious model."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model import Simple, fits, occupancy

from econoserve.core.exact import ExactLedger
from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.core.nested import NestedLedger, Nesting
from econoserve.core.risk import CELLS, RiskLedger
from econoserve.core.skyline import SkylineLedger

CAPACITY = 300

claims = st.lists(
    st.builds(Simple, st.integers(0, 60), st.integers(1, 60), st.booleans()), max_size=8
)


def open_claims(ledger, simple):
    """The same claims in a ledger; those that decode are promised one length."""
    for number, claim in enumerate(simple):
        rid = f"c{number}"
        ledger.take(rid, claim.held)
        if claim.decodes:
            ledger.promise(rid, response=(claim.left,) * ledger.points)
            ledger.start(rid)
        else:
            ledger.promise(rid, prompt_tokens=claim.left)
    return sum(claim.held for claim in simple)


@given(claims)
def test_the_peak_formula_equals_the_simulated_peak(simple):
    decoding = [claim for claim in simple if claim.decodes]
    if not decoding:
        return
    # The design's formula: sort by r descending; peak = max_i (i * r_i + sum_{j <= i} a_j).
    order = sorted(decoding, key=lambda claim: -claim.left)
    held = formula = 0
    for rank, claim in enumerate(order, start=1):
        held += claim.held
        formula = max(formula, rank * claim.left + held)
    assert formula == max(occupancy(decoding, order[0].left))
    ledger = SkylineLedger(1000)
    used = open_claims(ledger, decoding)
    assert 1000 - ledger.trial(used).headroom_tokens == formula


@settings(max_examples=400)
@given(claims, st.integers(1, 80), st.integers(0, 30))
def test_skyline_admits_exactly_what_the_simulation_admits(simple, length, reserve):
    ledger = SkylineLedger(CAPACITY, reserve)
    used = open_claims(ledger, simple)
    trial = ledger.trial(used)
    if not fits(simple, CAPACITY - reserve):
        assert trial.room(length) < 0 or trial.headroom_tokens < 0
        return
    room = trial.room(length)
    assert (room >= 0) == fits([*simple, Simple(0, length, True)], CAPACITY - reserve)
    if room >= 0:
        assert fits([*simple, Simple(room, length, True)], CAPACITY - reserve)
        assert not fits([*simple, Simple(room + 1, length, True)], CAPACITY - reserve)
    headroom = trial.headroom_tokens
    assert fits([*simple, Simple(headroom, 0, False)], CAPACITY - reserve)
    assert not fits([*simple, Simple(headroom + 1, 0, False)], CAPACITY - reserve)


@settings(max_examples=300)
@given(claims, st.integers(1, 60), st.integers(0, 6))
def test_skyline_counts_how_many_parked_responses_may_start(simple, length, most):
    parked = [Simple(5, 0, False) for _ in range(most)]
    ledger = SkylineLedger(CAPACITY)
    used = open_claims(ledger, [*simple, *parked])
    if not fits([*simple, *parked], CAPACITY):
        return
    count = ledger.trial(used).count((length,), most)
    fitting = [
        n
        for n in range(most + 1)
        # What they hold counts as if it stayed: it is theirs until they end, then nobody's.
        if fits([*simple, *parked, *[Simple(0, length, True)] * n], CAPACITY)
    ]
    assert count == max(fitting, default=0)


@settings(max_examples=200)
@given(claims, st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), max_size=6), st.data())
def test_a_trial_agrees_with_the_ledger_that_follows_it(simple, arrivals, data):
    mode = data.draw(st.sampled_from(KvcMode))
    ledger = KvcConfig(mode=mode, reserve_fraction=0.0).ledger(CAPACITY)
    used = open_claims(ledger, simple)
    trial = ledger.trial(used)
    for number, (tokens, length) in enumerate(arrivals):
        rid, response = f"a{number}", (length,) * ledger.points
        if not trial.fits(tokens, response):
            continue
        host = trial.take(rid, tokens, response)
        ledger.promise(rid, tokens, response, host)
        ledger.take(rid, tokens)
        ledger.start(rid)
        used += tokens
    # A trial is ahead by one step for what starts after this iteration, so it may be stricter.
    assert trial.headroom_tokens <= ledger.trial(used).headroom_tokens + len(arrivals)


class Twin:
    """A ledger and the obvious books beside it, under the same random operations."""

    def __init__(self, ledger):
        self.ledger, self.held, self.promised, self.decodes = ledger, {}, {}, {}

    def check(self):
        ledger = self.ledger
        assert ledger.held_tokens == sum(self.held.values())
        assert ledger.promised_tokens == sum(self.promised.values())
        for rid, held in self.held.items():
            assert ledger.held_by(rid) == held
            assert ledger.promised_to(rid) == self.promised[rid]

    def apply(self, operation, rid, tokens):
        ledger, points = self.ledger, self.ledger.points
        known = rid in self.held
        if operation == "take":
            ledger.take(rid, tokens)
            self.held[rid] = self.held.get(rid, 0) + tokens
            self.promised.setdefault(rid, 0)
            self.decodes.setdefault(rid, False)
        elif operation == "promise" and known:
            ledger.promise(rid, response=(tokens,) * points)
            self.promised[rid] = tokens
        elif operation == "start" and known:
            ledger.start(rid)
            self.decodes[rid] = True
        elif operation == "stop" and known and self.decodes[rid]:
            ledger.stop(rid)
            self.promised[rid], self.decodes[rid] = 0, False
        elif operation == "close":
            ledger.close(rid)
            for column in (self.held, self.promised, self.decodes):
                column.pop(rid, None)
        elif operation in ("advance", "advance some"):
            decoding = [rid for rid, decodes in self.decodes.items() if decodes]
            took = decoding if operation == "advance" else decoding[::2]
            ledger.advance(tuple(took))
            for each in took:
                self.held[each] += 1
                self.promised[each] = max(self.promised[each] - 1, 0)


operations = st.lists(
    st.tuples(
        st.sampled_from(
            ("take", "promise", "start", "stop", "close", "advance", "advance", "advance some")
        ),
        st.sampled_from("abcd"),
        st.integers(0, 30),
    ),
    max_size=80,
)


@settings(max_examples=300)
@given(operations, st.sampled_from(KvcMode))
def test_totals_equal_the_sums_over_claims_in_every_mode(script, mode):
    twin = Twin(KvcConfig(mode=mode).ledger(1000))
    for operation, rid, tokens in script:
        # A claim takes prompt tokens only while it does not decode.
        if operation == "take" and twin.decodes.get(rid):
            continue
        twin.apply(operation, rid, tokens)
        twin.check()
    for rid in "abcd":
        twin.apply("close", rid, 0)
    assert len(twin.ledger) == twin.ledger.held_tokens == twin.ledger.promised_tokens == 0
    assert twin.ledger.trial(0).headroom_tokens == 1000 - twin.ledger.reserve_tokens


def fill(ledger, supply, iterations, also=None):
    """Admit from an endless supply, run exact lengths, and check the pool; mean use of it."""
    used, left, made, total = 0, {}, 0, 0
    for _ in range(iterations):
        trial = ledger.trial(used)
        for length in supply():
            rid = f"r{made}"
            if not trial.count((length,) * ledger.points, 1):
                continue
            if also is not None:
                assert also.trial(used).count((length,), 1), "nested admits what skyline refuses"
                also.take(rid, 0)
                also.promise(rid, response=(length,))
                also.start(rid)
            ledger.take(rid, 0)
            trial = ledger.trial(used)
            host = trial.start(rid, (length,) * ledger.points)
            ledger.promise(rid, 0, (length,) * ledger.points, host)
            ledger.start(rid)
            left[rid] = length
            made += 1
            trial = ledger.trial(used)
        ledger.advance(tuple(left))
        used += len(left)
        assert used <= ledger.capacity_tokens
        total += used
        if also is not None:
            also.advance(tuple(left))
        for rid in [rid for rid, tokens in left.items() if tokens == 1]:
            used -= ledger.held_by(rid)
            ledger.close(rid)
            if also is not None:
                also.close(rid)
            del left[rid]
        left = {rid: tokens - 1 for rid, tokens in left.items()}
    return total / iterations / ledger.capacity_tokens


@settings(max_examples=100)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.sampled_from(Nesting),
    st.integers(0, 3),
)
def test_nested_never_admits_what_skyline_refuses_nor_fills_the_pool(lengths, nesting, buffer):
    ledger = NestedLedger(120, buffer_tokens=buffer, nesting=nesting)
    fill(ledger, lambda: lengths, 120, also=SkylineLedger(120))


HOST_TOKENS = 512
IDEAL = {None: 0.5, Nesting.ONE_LEVEL: 0.625, Nesting.CHAIN: 2 / 3, Nesting.TREE: 0.75}


def ideal_use(nesting):
    """Mean use of one host's promise over its life, every guest as long as it may be."""
    ledger = NestedLedger(HOST_TOKENS, lead_tokens=0, buffer_tokens=0, nesting=nesting)
    guests = [HOST_TOKENS >> level for level in range(10)]
    return fill(ledger, lambda: guests, 8 * HOST_TOKENS)


@pytest.mark.parametrize("nesting", Nesting)
def test_nesting_approaches_its_bound_in_the_ideal_setting(nesting):
    use = ideal_use(nesting)
    assert IDEAL[nesting] - 0.03 < use <= IDEAL[nesting] + 0.005


def test_no_guests_use_half_and_skyline_passes_every_nesting_bound():
    guests = [HOST_TOKENS >> level for level in range(10)]
    exact = fill(ExactLedger(HOST_TOKENS, lead_tokens=0), lambda: [HOST_TOKENS], 4 * HOST_TOKENS)
    assert exact == pytest.approx(0.5, abs=0.01)
    skyline = fill(SkylineLedger(HOST_TOKENS, lead_tokens=0), lambda: guests, 8 * HOST_TOKENS)
    assert skyline > 0.75


distributions = st.lists(
    st.tuples(
        st.integers(0, 60), st.lists(st.integers(1, 100), min_size=4, max_size=4).map(sorted)
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200)
@given(distributions, st.integers(0, 14))
def test_risk_knows_mean_and_variance_of_the_occupancy(drawn, steps):
    ledger = RiskLedger(10_000, points=4)
    for number, (held, outcomes) in enumerate(drawn):
        ledger.take(f"c{number}", held)
        ledger.promise(f"c{number}", response=tuple(outcomes))
        ledger.start(f"c{number}")
    ledger.occupancy()
    survivors = [
        (held + steps, [end - steps for end in outcomes if end >= steps])
        for held, outcomes in drawn
        if outcomes[-1] > steps
    ]
    for number, (_, outcomes) in enumerate(drawn):
        if outcomes[-1] <= steps:
            ledger.close(f"c{number}")
    for _ in range(steps):
        ledger.advance(tuple(f"c{n}" for n, (_, ends) in enumerate(drawn) if ends[-1] > steps))
    grid, (mean, variance) = ledger.occupancy()
    before = ledger.step
    for index, (end, mean_tokens, variance_tokens2) in enumerate(
        zip(grid, mean, variance, strict=True)
    ):
        exact_mean = exact_variance = 0.0
        for held, ends in survivors:
            alive = sum(left > before - ledger.step for left in ends) / len(ends)
            alive = 1.0 if index == 0 else alive
            size = held + end - ledger.step
            exact_mean += alive * size
            exact_variance += alive * (1 - alive) * size * size
        assert mean_tokens == pytest.approx(exact_mean, abs=1e-6)
        assert variance_tokens2 == pytest.approx(exact_variance, rel=1e-6, abs=1e-3)
        before = end


@settings(max_examples=300)
@given(claims, st.integers(0, 60), st.integers(1, 80))
def test_with_certain_lengths_risk_is_the_skyline(simple, tokens, length):
    risk, skyline = RiskLedger(CAPACITY), SkylineLedger(CAPACITY)
    used = open_claims(risk, simple)
    open_claims(skyline, simple)
    assert risk.trial(used).headroom_tokens == skyline.trial(used).headroom_tokens
    if risk.trial(used).fits(tokens, (length,) * risk.points):
        assert skyline.trial(used).fits(tokens, (length,))
    elif length in {claim.left - 1 for claim in simple if claim.decodes}:
        # Its end is a point of the grid, so nothing is rounded.
        assert not skyline.trial(used).fits(tokens, (length,))


def test_a_coarse_grid_admits_little_less():
    skyline, risk = SkylineLedger(100_000), RiskLedger(100_000)
    draw = random.Random(3)
    for number in range(4 * CELLS):
        held, left = draw.randint(50, 300), draw.randint(1, 500)
        for ledger in (skyline, risk):
            ledger.take(f"c{number}", held)
            ledger.promise(f"c{number}", response=(left,) * ledger.points)
            ledger.start(f"c{number}")
    exact, coarse = (ledger.trial(0).headroom_tokens for ledger in (skyline, risk))
    assert 0.97 * exact < coarse <= exact


@pytest.mark.parametrize("risk", [0.01, 0.1])
def test_the_risk_level_is_kept_where_lengths_follow_their_distribution(risk):
    draw = random.Random(7)
    lengths = sorted(int(draw.lognormvariate(4.5, 0.8)) + 1 for _ in range(4000))
    response = tuple(lengths[(2 * i + 1) * len(lengths) // 16] for i in range(8))
    ledger = RiskLedger(20_000, risk=risk)
    held, number = [], 0
    while ledger.trial(sum(held)).fits(60, response):
        ledger.take(f"c{number}", 60)
        ledger.promise(f"c{number}", response=response)
        ledger.start(f"c{number}")
        held.append(60)
        number += 1
    assert number > 60
    overflows = 0
    for _ in range(400):
        ends = sorted(draw.choice(lengths) for _ in held)
        peak = max((len(ends) - index) * (60 + end) for index, end in enumerate(ends))
        overflows += peak > ledger.capacity_tokens
    # The worst of all steps is looked at, while each step alone keeps the level.
    assert overflows / 400 <= 5 * risk
    assert overflows / 400 < 0.3


def test_a_prefix_that_several_hold_counts_once_and_outlives_its_first_holder():
    ledger = SkylineLedger(1000)
    for rid in ("a", "b", "c"):
        ledger.pin(rid, 100, key=7)
        ledger.take(rid, 10)
        ledger.promise(rid, response=(20,))
        ledger.start(rid)
    # 100 once, then 10 + 20 for each at the peak.
    assert ledger.trial(130).headroom_tokens == 1000 - 100 - 3 * 30
    ledger.close("a")
    assert ledger.trial(120).headroom_tokens == 1000 - 100 - 2 * 30
    ledger.close("b")
    assert ledger.trial(110).headroom_tokens == 1000 - 130
    ledger.close("c")
    assert ledger.trial(0).headroom_tokens == 1000


def test_prefixes_without_a_key_are_counted_in_full():
    ledger = SkylineLedger(1000)
    for rid in ("a", "b"):
        ledger.pin(rid, 100, key=None)
        ledger.start(rid)
    assert ledger.trial(100).headroom_tokens == 800


def test_exact_counts_a_shared_prefix_once_because_the_pool_says_what_is_used():
    ledger = ExactLedger(100)
    for rid in ("a", "b"):
        ledger.pin(rid, 40, key=None)
    assert ledger.held_tokens == 80
    assert ledger.trial(used_tokens=40).headroom_tokens == 60


def test_kvc_that_no_claim_explains_is_taken_for_good():
    for mode in KvcMode:
        ledger = KvcConfig(mode=mode, reserve_fraction=0.1).ledger(100)
        assert ledger.trial(used_tokens=30).headroom_tokens == 60


def test_a_guest_that_overstays_owns_its_slots_and_the_host_keeps_its_promise():
    ledger = NestedLedger(100, lead_tokens=0, buffer_tokens=0)
    ledger.promise("host", response=(80,))
    ledger.start("host")
    trial = ledger.trial(0)
    assert trial.headroom_tokens == 20
    host = trial.start("guest", (40,)) if "guest" in ledger else trial.take("guest", 0, (39,))
    assert host == "host"
    ledger.promise("guest", response=(40,), host=host)
    ledger.start("guest")
    for _ in range(40):
        ledger.advance(("host", "guest"))
    assert ledger["guest"].host == "host"
    ledger.advance(("host", "guest"))
    assert ledger["guest"].host is None
    # The guest owns the 41 tokens it took; the host is still owed all of its 39.
    assert ledger.promised_to("host") == 39
    assert ledger.free_tokens(used_tokens=82) == 100 - 82 - 39


def test_a_guest_moves_up_when_its_host_ends_early():
    ledger = NestedLedger(200, lead_tokens=0, buffer_tokens=0)
    for rid, length, host in (("top", 160, None), ("middle", 80, "top"), ("inner", 40, "middle")):
        ledger.promise(rid, response=(length,), host=host)
        ledger.start(rid)
    assert ledger["inner"].host == "middle"
    for _ in range(10):
        ledger.advance(("top", "middle", "inner"))
    ledger.close("middle")
    assert ledger["inner"].host == "top" and ledger["top"].guest == "inner"
    assert ledger.free_tokens(used_tokens=20) == 200 - 160
    ledger.close("top")
    assert ledger["inner"].host is None
    assert ledger.free_tokens(used_tokens=10) == 200 - 40


@pytest.mark.parametrize(
    ("capacity", "reserve", "lead"), [(0, 0, 0), (9, 9, 0), (9, -1, 0), (9, 0, -1)]
)
def test_impossible_sizes_are_refused(capacity, reserve, lead):
    with pytest.raises(ValueError, match="tokens="):
        ExactLedger(capacity, reserve, lead)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: RiskLedger(100, risk=0.0), "risk"),
        (lambda: RiskLedger(100, points=1), "points"),
        (lambda: NestedLedger(100, buffer_tokens=-1), "buffer_tokens"),
        (lambda: KvcConfig(reserve_fraction=1.0), "reserve_fraction"),
    ],
)
def test_impossible_constants_are_refused(make, field):
    with pytest.raises(ValueError, match=field):
        make()


@pytest.mark.parametrize("mode", KvcMode)
def test_who_was_promised_anew_and_gives_way_in_one_plan_leaves_nothing(mode):
    ledger = KvcConfig(mode=mode, reserve_fraction=0.0).ledger(1000)
    for rid in ("a", "b"):
        ledger.take(rid, 50)
        ledger.promise(rid, response=tuple(range(20, 20 + ledger.points)))
        ledger.start(rid)
    trial = ledger.trial(100)
    trial.extend("a", tuple(range(300, 300 + ledger.points)))
    trial.release("a")
    expected = ledger.trial(100)
    expected.release("a")
    assert trial.headroom_tokens == expected.headroom_tokens


def test_nested_admits_no_guest_where_promises_exceed_what_is_left():
    ledger = NestedLedger(100, lead_tokens=0, buffer_tokens=0)
    ledger.promise("host", response=(90,))
    ledger.start("host")
    assert ledger.trial(0).count((10,), 1) == 1
    assert ledger.trial(20).count((10,), 1) == 0


def test_a_host_whose_promise_shrinks_charges_its_guest_at_once():
    ledger = NestedLedger(100, lead_tokens=0, buffer_tokens=0)
    for rid, length, host in (("host", 80, None), ("guest", 40, "host")):
        ledger.promise(rid, response=(length,), host=host)
        ledger.start(rid)
    trial = ledger.trial(0)
    trial.extend("host", (30,))
    planned = trial.headroom_tokens
    ledger.promise("host", response=(30,))
    assert planned == ledger.trial(0).headroom_tokens == 100 - 30 - 40
