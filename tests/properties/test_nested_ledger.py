"""Mode ``nested``: who lives in whose promise, and that it is never too much."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from econoserve.core.exact import ExactLedger
from econoserve.core.nested import NestedLedger, Nesting
from econoserve.core.skyline import SkylineLedger


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


class Pair:
    """``nested`` and ``skyline`` with the same claims; nested decides, skyline must agree."""

    def __init__(self, nested, skyline):
        self.ledgers = (nested, skyline)
        self.used, self.left, self.parked, self.made = 0, {}, {}, 0

    def new(self):
        self.made += 1
        return f"r{self.made}"

    def step(self, arrivals, starts, park, skips):
        """One iteration: parked ones start, new ones are taken or parked; some sit it out."""
        nested, skyline = (ledger.trial(self.used) for ledger in self.ledgers)
        started, taken = {}, {}
        for rid, length in list(self.parked.items())[:starts]:
            if nested.count((length,), 1):
                assert skyline.count((length,), 1), "nested starts what skyline refuses"
                started[rid] = (length, nested.start(rid, (length,)))
                skyline.start(rid, (length,))
        for tokens, length in arrivals:
            rid = self.new()
            # None: all that nested has left for it.
            tokens = max(nested.headroom_tokens - length, 1) if tokens is None else tokens
            if nested.fits(tokens, (length,)):
                assert skyline.fits(tokens, (length,)), "nested admits what skyline refuses"
                taken[rid] = (tokens, length, nested.take(rid, tokens, (length,)))
                skyline.take(rid, tokens, (length,))
            elif park and nested.fits(tokens, ()):
                assert skyline.fits(tokens, ()), "nested parks what skyline refuses"
                taken[rid] = (tokens, 0, nested.take(rid, tokens, ()))
                skyline.take(rid, tokens, ())
                self.parked[rid] = length
        for rid, (length, host) in started.items():
            del self.parked[rid]
            self.left[rid] = length
            for ledger in self.ledgers:
                ledger.promise(rid, 0, (length,), host if ledger is self.ledgers[0] else None)
                ledger.start(rid)
        decoded = [rid for rid in self.left if rid not in skips]
        for ledger in self.ledgers:
            ledger.advance(decoded)
        self.used += len(decoded)
        for rid in decoded:
            self.left[rid] -= 1
        for rid, (tokens, length, host) in taken.items():
            self.used += tokens
            for ledger in self.ledgers:
                response = (length,) if length else ()
                ledger.promise(rid, tokens, response, host if ledger is self.ledgers[0] else None)
                ledger.take(rid, tokens)
                if length:
                    ledger.start(rid)
            if length:
                self.left[rid] = length
        for rid in [rid for rid, left in self.left.items() if left == 0]:
            self.used -= self.ledgers[0].held_by(rid)
            del self.left[rid]
            for ledger in self.ledgers:
                ledger.close(rid)


steps = st.lists(
    st.tuples(
        st.lists(st.tuples(st.none() | st.integers(1, 15), st.integers(1, 60)), max_size=2),
        st.integers(0, 2),
        st.booleans(),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=300)
@given(
    steps,
    st.sampled_from(Nesting),
    st.integers(0, 3),
    st.sets(st.integers(1, 12)).map(lambda numbers: {f"r{number}" for number in numbers}),
)
def test_nested_admits_nothing_that_skyline_refuses(steps, nesting, buffer, lazy):
    """I4, with prompts, parked claims, and claims that decode in every third step only."""
    nested = NestedLedger(150, lead_tokens=0, buffer_tokens=buffer, nesting=nesting)
    pair = Pair(nested, SkylineLedger(150, lead_tokens=0))
    for index, (arrivals, starts, park) in enumerate(steps):
        pair.step(arrivals, starts, park, lazy if index % 3 else ())
        assert pair.used <= 150 or lazy


@settings(max_examples=300)
@given(
    st.integers(4, 80),
    st.integers(1, 40),
    st.lists(st.sampled_from(("host", "guest", "both")), max_size=70),
)
def test_a_guest_is_credited_with_the_tokens_that_it_took_and_no_others(length, guest, turns):
    ledger = NestedLedger(100, lead_tokens=0, buffer_tokens=0)
    left = {"host": length, "guest": min(guest, length // 2)}
    for rid, host in (("host", None), ("guest", "host")):
        ledger.promise(rid, response=(left[rid],), host=host)
        ledger.start(rid)
    assert ledger["guest"].host == "host"
    used = 0
    for turn in turns:
        decoded = [rid for rid in ("host", "guest") if turn in (rid, "both")]
        if any(left[rid] == 0 for rid in decoded):
            return
        ledger.advance(decoded)
        used += len(decoded)
        for rid in decoded:
            left[rid] -= 1
        # A guest's tokens lie in its host's promise; an owner has a promise of its own.
        owed = left["host"] - ledger.held_by("guest")
        if ledger["guest"].host is None:
            owed = left["host"] + left["guest"]
        assert ledger.free_tokens(used) == ledger.trial(used).headroom_tokens == 100 - used - owed


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
