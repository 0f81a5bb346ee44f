"""Streams in which few say who they are, many limits, and ranks that do not all keep a file."""

import numpy as np
import pytest

from econoserve.prediction.calibration import Calibrated
from econoserve.prediction.guard import UNTOLD, Guarded
from econoserve.prediction.quantile import GlobalQuantiles
from econoserve.prediction.registry import make_predictor
from econoserve.prediction.request import RequestFeatures, fingerprint


def request(draw, cap_tokens=8192, **context):
    """A prompt like no other."""
    return RequestFeatures.of_prompt(
        draw.integers(1000, 30_000, 40).tolist(), cap_tokens, **context
    )


def serve(predictor, draw, count, mean_tokens, users=(0,), caps=(8192,)):
    """Predict and learn; for each request its features, the 0.9 quantile told and its length."""
    seen = []
    for number in range(count):
        user = users[number % len(users)]
        features = request(draw, caps[number % len(caps)], user=user)
        told = predictor.predict(features).quantiles_tokens[57]
        length = max(int(draw.exponential(mean_tokens)), 1)
        cut = min(length, features.cap_tokens)
        predictor.observe(features, cut, cut == length)
        seen.append((features, told, length))
    return seen


def covered(seen):
    """The share of lengths not above what was told."""
    return np.mean([length <= told for _, told, length in seen])


@pytest.mark.parametrize("others", [0, 1, 40], ids=["alone", "beside one", "beside forty"])
def test_who_gives_no_name_is_learned_from_all_the_same(others):
    draw, predictor = np.random.default_rng(1), make_predictor("prefix-tree", 0.5)
    named = [fingerprint(f"user {number}") for number in range(others)]
    serve(predictor, draw, 1000, 100)
    if named:
        serve(predictor, draw, len(named), 100, named)
    anonymous = [0] * 19
    stream = [*anonymous, named[0]] if named else anonymous
    seen = serve(predictor, draw, 2000, 1000, stream)[1000:]
    assert 0.82 <= covered([one for one in seen if one[0].user == 0]) <= 0.97


def test_limits_of_others_do_not_bend_the_quantiles():
    draw, predictor = np.random.default_rng(2), make_predictor("prefix-tree", 0.5)
    seen = serve(predictor, draw, 4000, 300, caps=(64, 64, 64, 8192))[2000:]
    assert 0.86 <= covered([one for one in seen if one[0].cap_tokens == 8192]) <= 0.94
    assert 0.86 <= predictor.coverage(0.9) <= 0.94


def test_answers_of_one_grammar_say_nothing_of_others():
    draw, predictor = np.random.default_rng(3), make_predictor("prefix-tree", 0.5)
    prompt = list(range(2000, 2060))
    free, short = (
        RequestFeatures.of_prompt(prompt, 8192, constraint=constraint)
        for constraint in (0, fingerprint("yes|no"))
    )
    for _ in range(400):
        for features, length in ((free, int(draw.normal(400, 20))), (short, 2)):
            predictor.predict(features)
            predictor.observe(features, length, True)
    assert predictor.predict(free).tokens == pytest.approx(400, rel=0.1)
    assert predictor.predict(short).tokens <= 3


class Failing(GlobalQuantiles):
    """Fails when it is asked for levels after so many observations."""

    left = 3 * UNTOLD // 2

    def predict_at(self, features, levels):
        if self.left <= 0:
            raise RuntimeError("a fault for the test")
        return self.predict(features)

    def observe(self, features, output_tokens, ended):
        self.left -= 1
        super().observe(features, output_tokens, ended)


def test_who_keeps_a_file_predicts_like_who_does_not():
    told = []
    for period in (10**9, 200):
        draw = np.random.default_rng(4)
        guarded = Guarded(Calibrated(Failing(0.5)), GlobalQuantiles(0.5))
        for number in range(Failing.left + 50):
            features = request(draw)
            told.append(guarded.predict(features))
            guarded.observe(features, int(draw.integers(1, 900)), number % 3 > 0)
            if number % period == 0:
                guarded.state()
        assert guarded.fallbacks == 50
    half = len(told) // 2
    assert told[:half] == told[half:]


def test_requests_that_went_away_are_not_waited_for():
    draw, predictor = np.random.default_rng(5), make_predictor("prefix-tree", 0.5)
    for _ in range(50):
        features = request(draw)
        predictor.predict(features)
        predictor.forget(features)
    assert not predictor.inner._pending
