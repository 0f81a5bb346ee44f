"""The ledger's books: promises, takes, and what is left."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from econoserve.core.ledger import ExactLedger


def test_a_promise_moves_to_held_as_it_is_taken():
    ledger = ExactLedger(100, reserve_tokens=10)
    ledger.promise("a", 40)
    assert ledger.admissible_tokens(used_tokens=0) == 50
    ledger.take("a", 15)
    assert (ledger["a"].held_tokens, ledger["a"].promised_tokens) == (15, 25)
    assert ledger.free_tokens(used_tokens=15) == 60
    ledger.close("a")
    assert len(ledger) == ledger.held_tokens == ledger.promised_tokens == 0


def test_taking_more_than_promised_owes_nothing():
    ledger = ExactLedger(100)
    ledger.promise("a", 2)
    ledger.take("a", 5)
    assert (ledger.held_tokens, ledger.promised_tokens) == (5, 0)


def test_a_shared_prefix_counts_once_because_the_pool_says_what_is_used():
    ledger = ExactLedger(100)
    for rid in ("a", "b"):
        ledger.take(rid, 40)
    assert ledger.held_tokens == 80
    assert ledger.free_tokens(used_tokens=40) == 60


@pytest.mark.parametrize(("capacity", "reserve"), [(0, 0), (10, 10), (10, -1)])
def test_impossible_sizes_are_refused(capacity, reserve):
    with pytest.raises(ValueError, match="tokens="):
        ExactLedger(capacity, reserve)


operations = st.lists(
    st.tuples(
        st.sampled_from(("promise", "take", "close")), st.sampled_from("abc"), st.integers(0, 50)
    ),
    max_size=60,
)


@given(operations)
def test_totals_equal_the_sums_over_claims(script):
    ledger = ExactLedger(1000)
    held, promised = dict.fromkeys("abc", 0), dict.fromkeys("abc", 0)
    for operation, rid, tokens in script:
        if operation == "promise":
            ledger.promise(rid, tokens)
            promised[rid] = tokens
        elif operation == "take":
            ledger.take(rid, tokens)
            held[rid] += tokens
            promised[rid] = max(promised[rid] - tokens, 0)
        else:
            ledger.close(rid)
            held[rid] = promised[rid] = 0
    assert ledger.held_tokens == sum(held.values())
    assert ledger.promised_tokens == sum(promised.values())
