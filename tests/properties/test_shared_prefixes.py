"""Prefixes that several claims hold: what is shared counts once, as far as that can be known."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from econoserve.core.exact import ExactLedger
from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.core.skyline import SkylineLedger


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


def test_prefixes_without_a_key_are_counted_in_full_unless_the_pool_says_that_they_are_one():
    ledger = SkylineLedger(1000)
    for rid in ("a", "b"):
        ledger.pin(rid, 100, key=None)
        ledger.start(rid)
    assert ledger.trial(200).headroom_tokens == 800
    assert ledger.trial(100).headroom_tokens == 900
    # What is in use stays so in that case, and everybody still grows.
    for rid in ("a", "b"):
        ledger.promise(rid, response=(50,))
    assert ledger.trial(100).headroom_tokens == 1000 - 100 - 2 * 50


def test_exact_counts_a_shared_prefix_once_because_the_pool_says_what_is_used():
    ledger = ExactLedger(100)
    for rid in ("a", "b"):
        ledger.pin(rid, 40, key=None)
    assert ledger.held_tokens == 80
    assert ledger.trial(used_tokens=40).headroom_tokens == 60


CAPACITY = 1_000

chats = st.lists(
    st.tuples(st.sampled_from((0, 0, 1, 2)), st.integers(0, 30), st.integers(1, 50), st.booleans()),
    min_size=1,
    max_size=10,
)
"""Of each claim: its key (0: one of its own), tokens that it computed, response, if it decodes."""


def open_chats(ledger, root, branch, drawn):
    """Claims whose cached prefixes begin alike and end in a branch; what the pool uses for them."""
    branches = {}
    for number, (node, own, response, decodes) in enumerate(drawn):
        rid, key = f"c{number}", f"shared {node}" if node else f"node {number}"
        branches[key] = branch
        ledger.pin(rid, root + branch, key)
        ledger.take(rid, own)
        if decodes:
            ledger.promise(rid, response=(response,) * ledger.points)
            ledger.start(rid)
        else:
            ledger.promise(rid, prompt_tokens=response)
    return root + sum(branches.values()) + sum(own for _, own, _, _ in drawn)


@settings(max_examples=300)
@given(
    st.integers(0, 150),
    st.integers(1, 20),
    chats,
    st.integers(1, 600),
    st.integers(1, 200),
    st.sampled_from((KvcMode.SKYLINE, KvcMode.RISK)),
)
def test_the_modes_that_look_ahead_admit_all_that_exact_admits(
    root, branch, drawn, tokens, length, mode
):
    """Also where many claims share a root and no key says so."""
    exact = ExactLedger(CAPACITY)
    ledger = KvcConfig(mode, reserve_fraction=0.0).ledger(CAPACITY)
    used = open_chats(exact, root, branch, drawn)
    assert open_chats(ledger, root, branch, drawn) == used
    response = (length,) * ledger.points
    before, trial = exact.trial(used), ledger.trial(used)
    assert trial.headroom_tokens >= before.headroom_tokens
    assert trial.count(response, 4) >= before.count((length,), 4)
    if before.fits(tokens, (length,)):
        assert trial.fits(tokens, response)
        before.take("new", tokens, (length,))
        trial.take("new", tokens, response)
        assert trial.headroom_tokens >= before.headroom_tokens


@pytest.mark.parametrize("mode", KvcMode)
def test_who_computed_a_prefix_and_who_found_it_count_once(mode):
    ledger = KvcConfig(mode, reserve_fraction=0.0).ledger(CAPACITY)
    ledger.take("creator", 400)
    ledger.pin("user", 400, key="node")
    for rid in ("creator", "user"):
        ledger.promise(rid, response=(50,) * ledger.points)
        ledger.start(rid)
    assert ledger.trial(used_tokens=400).headroom_tokens >= CAPACITY - 400 - 2 * 50
