"""The ledger, whatever its mode, against the obvious model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model import Simple, claims, fits, occupancy, open_claims

from econoserve.core.exact import ExactLedger
from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.core.nested import NestedLedger
from econoserve.core.risk import RiskLedger
from econoserve.core.skyline import SkylineLedger

CAPACITY = 300


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


arrivals = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), max_size=6)
changes = st.dictionaries(
    st.integers(0, 7), st.tuples(st.sampled_from(("promise", "leave")), st.integers(1, 60))
)


class Plan:
    """Decisions that a trial and then its ledger are told, as a policy would.

    First who decodes is promised anew or gives way, then who is parked starts, then who is new
    is taken: it decodes from the next step on.
    """

    def __init__(self, ledger, simple):
        self.ledger, self.left = ledger, {}
        self.used = open_claims(ledger, simple)
        self.decodes = {f"c{number}": claim.decodes for number, claim in enumerate(simple)}
        self.trial = ledger.trial(self.used)
        self.promises, self.leaving, self.new = {}, [], {}

    def change(self, rid, what, length):
        response = (length,) * self.ledger.points
        if what == "leave":
            self.trial.release(rid)
            self.leaving.append(rid)
        elif self.decodes[rid]:
            self.promises[rid] = (response, self.trial.extend(rid, response))
        elif self.trial.count(response, 1):
            self.promises[rid] = (response, self.trial.start(rid, response))
            self.decodes[rid] = True

    def take(self, rid, tokens, length):
        response = (length,) * self.ledger.points
        if self.trial.fits(tokens, response):
            self.new[rid] = (tokens, response, self.trial.take(rid, tokens, response))

    def carry_out(self):
        ledger = self.ledger
        for rid in self.leaving:
            self.used -= ledger.held_by(rid)
            ledger.close(rid)
            del self.decodes[rid]
        for rid, (response, host) in self.promises.items():
            ledger.promise(rid, response=response, host=host)
            ledger.start(rid)
        decoded = [rid for rid, decodes in self.decodes.items() if decodes]
        ledger.advance(decoded)
        self.used += len(decoded)
        for rid, (tokens, response, host) in self.new.items():
            ledger.promise(rid, tokens, response, host)
            ledger.take(rid, tokens)
            ledger.start(rid)
            self.used += tokens
        return ledger.trial(self.used)


@settings(max_examples=600)
@given(claims, changes, arrivals, st.sampled_from(KvcMode))
def test_a_trial_is_the_ledger_that_follows_it(simple, changes, arrivals, mode):
    plan = Plan(KvcConfig(mode=mode, reserve_fraction=0.0).ledger(CAPACITY), simple)
    # Those that decode are dealt with before those that are parked.
    known = [number for number in range(len(simple)) if number in changes]
    for number in sorted(known, key=lambda number: not simple[number].decodes):
        plan.change(f"c{number}", *changes[number])
    for number, (tokens, length) in enumerate(arrivals):
        plan.take(f"a{number}", tokens, length)
    planned = plan.trial.headroom_tokens
    followed = plan.carry_out().headroom_tokens
    if mode is not KvcMode.RISK:
        assert planned == followed
        return
    # What ends between two points of its grid counts longer; a grid drawn anew has other points.
    certain = SkylineLedger(CAPACITY)
    certain.step = plan.ledger.step
    for rid in plan.ledger._claims:
        claim = plan.ledger[rid]
        certain.take(rid, plan.ledger.held_by(rid))
        if claim.since is None:
            certain.promise(rid, prompt_tokens=claim.prompt_tokens)
        else:
            certain.promise(rid, response=(claim.ends[-1] - plan.ledger.step,))
            certain.start(rid)
    skyline = certain.trial(plan.used).headroom_tokens
    everything = CAPACITY - plan.used - plan.ledger.promised_tokens
    assert everything <= planned <= skyline
    assert everything <= followed <= skyline


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


def test_kvc_that_no_claim_explains_is_taken_for_good():
    for mode in KvcMode:
        ledger = KvcConfig(mode=mode, reserve_fraction=0.1).ledger(100)
        assert ledger.trial(used_tokens=30).headroom_tokens == 60


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
