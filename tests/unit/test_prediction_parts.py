"""The other predictors, calibration, the guard, and files of what was learned."""

import numpy as np
import pytest

from econoserve.core.lengths import LengthPrediction
from econoserve.prediction.calibration import Calibrated
from econoserve.prediction.grid import LEVELS
from econoserve.prediction.guard import Guarded
from econoserve.prediction.oracle import NoisyOracle
from econoserve.prediction.quantile import GlobalQuantiles
from econoserve.prediction.registry import (
    DEFAULT,
    PREDICTORS,
    make_predictor,
    make_replay_predictor,
)
from econoserve.prediction.request import RequestFeatures, fingerprint
from econoserve.prediction.saving import PredictorStateError, load, save
from econoserve.prediction.text import Text

CAP = 8192


def request(draw, words=(), **context):
    tokens = [*draw.integers(1000, 30_000, 60).tolist(), *words]
    return RequestFeatures.of_prompt(tokens, CAP, **context)


def feed(predictor, count, make):
    """Predict and observe; the errors of the medians in the second half."""
    errors = []
    for number in range(count):
        features, length = make(number)
        told = predictor.predict(features).quantiles_tokens[31]
        predictor.observe(features, length, True)
        errors.append(abs(told - length))
    return np.mean(errors[count // 2 :])


def test_words_are_understood():
    def stream():
        draw = np.random.default_rng(2)
        words = np.arange(100, 110)
        lengths = np.geomspace(20, 2000, 10)

        def make(_):
            word = int(draw.integers(10))
            length = int(lengths[word] * draw.lognormal(0, 0.1))
            return request(draw, words[word : word + 1].tolist()), max(length, 1)

        return make

    text = feed(Text(0.5), 1500, stream())
    tree = feed(make_predictor("prefix-tree", 0.5), 1500, stream())
    assert text < 0.75 * tree


def test_noise_in_words_does_little_harm():
    def stream():
        draw = np.random.default_rng(2)
        return lambda _: (request(draw), max(int(draw.lognormal(5, 0.5)), 1))

    text = feed(Text(0.5), 1200, stream())
    tree = feed(make_predictor("prefix-tree", 0.5), 1200, stream())
    assert text < 1.1 * tree


def test_good_hints_are_believed_and_bad_ones_are_not():
    predictor, draw = make_predictor("hint", 0.5), np.random.default_rng(4)
    good, bad = fingerprint("good"), fingerprint("bad")
    for _ in range(300):
        length = int(draw.lognormal(5.5, 1.0)) + 1
        # Always a third too high, which can be learned.
        feed(predictor, 1, lambda _, y=length: (hinted(good, int(y * 4 / 3) + 1), y))
        feed(predictor, 1, lambda _: (hinted(bad, int(draw.integers(1, 8000))), 50))
    for length in (100, 300, 900):
        told = predictor.predict(hinted(good, int(length * 4 / 3)))
        assert told.quantiles_tokens[31] == pytest.approx(length, rel=0.2)
    assert predictor.predict(hinted(bad, 4000)).quantiles_tokens[31] == pytest.approx(50, rel=0.15)


def hinted(user, expected):
    return RequestFeatures(100, CAP, user=user, expected_tokens=expected)


class Wrong:
    """Says that lengths are so many times what they are, from 10 to 1000 tokens."""

    def __init__(self, factor):
        self.factor = factor

    def predict_at(self, features, levels):
        lengths = np.maximum(self.factor * (10 + 990 * levels), 1).astype(int)
        return LengthPrediction(tuple(lengths.tolist()), 0.5, features.cap_tokens)

    def observe(self, features, output_tokens, ended):
        pass

    def state(self):
        return {}

    def restore(self, state):
        pass


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.4, 2.5])
def test_calibration_brings_the_coverage_back(factor):
    predictor, draw = Calibrated(Wrong(factor)), np.random.default_rng(5)
    assert predictor.coverage(0.9) == 0.9
    for _ in range(2500):
        features = RequestFeatures(10, CAP)
        predictor.predict(features)
        predictor.observe(features, int(draw.uniform(10, 1000)), True)
    # Where the longest quantile is too short, no other level helps.
    least = 0.87 if factor >= 1 else 0.75
    assert least <= predictor.coverage(0.9) <= 0.93
    if factor >= 1:
        assert 0.46 <= predictor.coverage(0.5) <= 0.54


def test_one_user_cannot_upset_the_calibration():
    predictor, draw = Calibrated(Wrong(1.0)), np.random.default_rng(5)
    for number in range(1500):
        for poison in (False, True):
            user = fingerprint("poison") if poison else fingerprint(f"user {number % 30}")
            features = RequestFeatures(10, CAP, user=user)
            predictor.predict(features)
            predictor.observe(features, 8000 if poison else int(draw.uniform(10, 1000)), True)
    told = predictor.predict(RequestFeatures(10, CAP))
    assert told.quantiles_tokens[31] == pytest.approx(505, rel=0.12)


class Broken(Wrong):
    def __init__(self, answer):
        self.answer = answer

    def predict_at(self, features, levels):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def observe(self, features, output_tokens, ended):
        raise RuntimeError("cannot learn")


@pytest.mark.parametrize(
    "answer",
    [
        RuntimeError("cannot predict"),
        None,
        LengthPrediction((5,), 0.5, 7),
        LengthPrediction((5, 1 << 40), 0.5, CAP),
        LengthPrediction((1.5,), 0.5, CAP),
        LengthPrediction((), 0.5, CAP),
    ],
)
def test_the_guard_falls_back(answer):
    guarded = Guarded(Calibrated(Broken(answer)), GlobalQuantiles(0.5))
    plain = GlobalQuantiles(0.5)
    for length in range(1, 200):
        features = RequestFeatures(10, CAP)
        guarded.predict(features)
        guarded.observe(features, length, True)
        plain.observe(features, length, True)
    assert guarded.fallbacks == 2 * 199
    assert guarded.predict(features) == plain.predict(features)


@pytest.mark.parametrize("name", PREDICTORS)
def test_each_predictor_works_from_the_first_request_and_survives_a_restart(name, tmp_path):
    def served(predictor, seed, count):
        draw = np.random.default_rng(seed)
        for number in range(count):
            user = fingerprint(f"user {number % 5}")
            features = request(draw, user=user, expected_tokens=100)
            told = predictor.predict(features)
            assert told.cap_tokens == CAP and 1 <= told.tokens <= CAP
            assert list(told.outcomes(0, 8)) == sorted(told.outcomes(0, 8))
            predictor.observe(features, int(draw.lognormal(4, 1)) + 1, number % 7 > 0)
        return told

    first, second = make_predictor(name, 0.9), make_predictor(name, 0.9)
    served(first, 1, 150)
    path = tmp_path / "state.npz"
    save(first.state(), name, path)
    load(second, name, path.read_bytes(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["state.npz"]
    assert served(first, 2, 60) == served(second, 2, 60)
    assert first.fallbacks == second.fallbacks == 0


@pytest.mark.parametrize("damage", [b"", b"no archive", None, "cut"])
def test_a_broken_file_is_refused(damage, tmp_path):
    path = tmp_path / "state.npz"
    save(make_predictor(DEFAULT, 0.5).state(), DEFAULT, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage is None:
        np.savez(path.open("wb"), other=np.zeros(3))
    else:
        path.write_bytes(damage)
    with pytest.raises(PredictorStateError, match=r"state\.npz.*another"):
        load(make_predictor(DEFAULT, 0.5), DEFAULT, path.read_bytes(), path)


def test_another_predictors_file_is_refused(tmp_path):
    path = tmp_path / "state.npz"
    save(make_predictor("quantile", 0.5).state(), "quantile", path)
    with pytest.raises(PredictorStateError, match="'quantile', not 'text': set --econoserve-pred"):
        load(make_predictor("text", 0.5), "text", path.read_bytes(), path)


def test_a_server_is_offered_no_oracle():
    for name in ("oracle", "noisy-oracle(0.3)"):
        with pytest.raises(ValueError, match="only the replay"):
            make_predictor(name, 0.5)
    with pytest.raises(ValueError, match="choose one of prefix-tree"):
        make_predictor("crystal", 0.5)


def test_the_oracles_know():
    features = RequestFeatures(10, CAP)
    assert make_replay_predictor("oracle", 0.5, lambda _: 77).predict(features).tokens == 77
    noisy = make_replay_predictor("noisy-oracle(0.3)", 0.5, lambda _: 1000)
    told = [noisy.predict(features).quantiles_tokens for _ in range(500)]
    assert np.mean([one[57] >= 1000 for one in told]) == pytest.approx(0.9, abs=0.04)
    exact = NoisyOracle(0.5, lambda _: 1000, 0.0).predict(features)
    assert set(exact.quantiles_tokens) == {1000} and len(exact.quantiles_tokens) == len(LEVELS)
    with pytest.raises(ValueError, match="noisy-oracle"):
        make_replay_predictor("noisy-oracle(x)", 0.5, lambda _: 1)
    with pytest.raises(ValueError, match="sigma"):
        make_replay_predictor("noisy-oracle(-1)", 0.5, lambda _: 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("noisy-oracle(inf)", "noisy-oracle: sigma=inf: give 0 to 100"),
        ("noisy-oracle(nan)", "noisy-oracle: sigma=nan: give 0 to 100"),
        ("noisy-oracle(101)", "noisy-oracle: sigma=101.0: give 0 to 100"),
        ("crystal", "prefix-tree, .*, hint, oracle, noisy-oracle(SIGMA)"),
        ("noisy-oracle(0.3", "is not known: .*, oracle, noisy-oracle(SIGMA)"),
    ],
)
def test_a_replay_says_which_predictors_it_has(name, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        make_replay_predictor(name, 0.5, lambda _: 1)


def test_the_greatest_noise_gives_lengths():
    features = RequestFeatures(10, CAP)
    noisy = make_replay_predictor("noisy-oracle(100)", 0.5, lambda _: 1000)
    for _ in range(200):
        assert min(noisy.predict(features).quantiles_tokens) >= 1
