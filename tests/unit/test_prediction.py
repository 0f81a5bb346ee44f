"""Length predictions: quantiles, survival, caps, and what the predictor remembers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from econoserve.core.types import LengthPrediction
from econoserve.prediction.quantile import QUANTILES, QuantilePredictor


def test_the_prior_holds_until_a_response_has_ended():
    predictor = QuantilePredictor(0.5, prior_tokens=40)
    assert predictor.predict(max_new_tokens=1000).tokens == 40
    assert predictor.predict(max_new_tokens=10).tokens == 10
    predictor.observe(7)
    assert predictor.predict(max_new_tokens=1000).tokens == 7


def test_the_level_is_a_quantile_of_what_ended():
    predictor = QuantilePredictor(0.8)
    for length in range(1, 11):
        predictor.observe(length)
    prediction = predictor.predict(max_new_tokens=1000)
    assert prediction.tokens == 8
    # Of the lengths above 5 (6..10), four fifths are at most 9.
    assert prediction.given(5) == 9


def test_old_responses_are_forgotten():
    predictor = QuantilePredictor(1.0, window=2)
    for length in (500, 3, 4):
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


@pytest.mark.parametrize(("level", "window"), [(0.0, 10), (1.1, 10), (0.5, 0)])
def test_impossible_settings_are_refused(level, window):
    with pytest.raises(ValueError, match="give"):
        QuantilePredictor(level, window)
