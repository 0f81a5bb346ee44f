"""Length predictions: quantiles, survival, caps, and what the predictor remembers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from econoserve.core.lengths import LengthPrediction
from econoserve.prediction.quantile import PRIOR_LENGTHS, QUANTILES, QuantilePredictor


def seen(level, *lengths):
    """A predictor that has forgotten its prior and seen these lengths last."""
    predictor = QuantilePredictor(level, window=max(len(lengths), 1))
    for _ in range(PRIOR_LENGTHS):
        predictor.observe(1)
    for length in lengths:
        predictor.observe(length)
    return predictor


def test_the_prior_is_exponential_and_capped_by_the_request():
    predictor = QuantilePredictor(0.5, prior_tokens=100)
    # The median of an exponential distribution is its mean times ln 2.
    assert predictor.predict(max_new_tokens=1000).tokens == pytest.approx(69, abs=4)
    assert predictor.predict(max_new_tokens=10).tokens == 10


def test_early_short_responses_do_not_replace_the_prior_at_once():
    predictor = QuantilePredictor(0.8, prior_tokens=100)
    for _ in range(8):
        predictor.observe(5)
    assert predictor.predict(max_new_tokens=1000).tokens > 100
    for _ in range(PRIOR_LENGTHS - 8):
        predictor.observe(5)
    assert predictor.predict(max_new_tokens=1000).tokens == 5


def test_the_level_is_a_quantile_of_what_ended():
    prediction = seen(0.8, *range(1, 11)).predict(max_new_tokens=1000)
    assert prediction.tokens == 8
    # Of the lengths above 5 (6..10), four fifths are at most 9.
    assert prediction.given(5) == 9


def test_a_response_cut_at_its_limit_counts_as_a_longer_one():
    predictor = seen(1.0, 10, 20, 30, 40)
    predictor.observe_cut(15)
    # The median of 20, 30, 40 was counted, and the oldest length forgotten.
    assert predictor.predict(1000).quantiles_tokens == (20, 30, 30, 40)


def test_when_all_are_cut_the_limit_is_predicted():
    predictor = QuantilePredictor(0.5, prior_tokens=8)
    for _ in range(200):
        predictor.observe_cut(50)
    assert predictor.predict(max_new_tokens=50).tokens == 50


def test_a_cut_after_one_token_says_little():
    predictor = QuantilePredictor(0.5, prior_tokens=100)
    for _ in range(40):
        predictor.observe_cut(1)
    assert predictor.predict(max_new_tokens=1000).tokens > 20


def test_old_responses_are_forgotten():
    assert seen(1.0, 500, 3, 4).predict(1000).tokens == 500
    predictor = QuantilePredictor(1.0, window=2)
    for length in (*range(1, PRIOR_LENGTHS + 1), 500, 3, 4):
        predictor.observe(length)
    assert predictor.predict(max_new_tokens=1000).tokens == 4


@given(
    st.lists(st.integers(1, 5000), max_size=300),
    st.floats(0.01, 1.0),
    st.integers(1, 4000),
    st.integers(0, 4000),
)
def test_a_survivor_is_predicted_to_go_on_within_its_cap(lengths, level, cap, generated):
    predictor = QuantilePredictor(level)
    for length in lengths:
        predictor.observe(length)
    prediction = predictor.predict(cap)
    assert len(prediction.quantiles_tokens) <= QUANTILES
    assert prediction.given(generated) <= cap
    if generated < cap:
        assert prediction.given(generated) > generated


def test_beyond_everything_seen_the_known_part_doubles():
    prediction = LengthPrediction((10, 20), level=0.9, cap_tokens=1000)
    assert prediction.given(100) == 200


@pytest.mark.parametrize(
    ("level", "window", "prior"), [(0.0, 10, 9), (1.1, 10, 9), (0.5, 0, 9), (0.5, 10, 0)]
)
def test_impossible_settings_are_refused(level, window, prior):
    with pytest.raises(ValueError, match="give"):
        QuantilePredictor(level, window, prior)
