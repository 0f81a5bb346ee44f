"""Predicts from the words of a prompt, on top of what the prefix tree says.

Owns a linear model on hashed n-grams that says by what factor a response differs from the tree's
median. It follows the median of that factor (quantile loss), with steps that shrink for n-grams
seen often (AdaGrad), and counts as far as it has foretold better than the tree alone.
"""

import math

import numpy as np

from econoserve.core.lengths import LengthPrediction
from econoserve.prediction import grid
from econoserve.prediction.predictor import State
from econoserve.prediction.prefix_tree import PrefixTree
from econoserve.prediction.request import RequestFeatures
from econoserve.prediction.residuals import Residuals

TABLE = 1 << 16
"""Weights; n-grams that fall on the same one share it."""

RATE = 0.5
"""Size of the first steps."""

FARTHEST = 3.0
"""Most that the model may say: a factor of 20, as a logarithm."""


class Text:
    """The predictor ``text``.

    Args:
        level: probability that a claim should cover, in (0, 1].
        prior_tokens: mean RL assumed until responses have ended, at least 1.
    """

    def __init__(self, level: float, prior_tokens: int = 256) -> None:
        self.level = level
        self._tree = PrefixTree(level, prior_tokens)
        self._residuals = Residuals()
        self._weights = np.zeros(TABLE)
        self._squares = np.ones(TABLE)

    def predict(self, features: RequestFeatures) -> LengthPrediction:
        """See ``Predictor.predict``."""
        return self.predict_at(features, grid.LEVELS)

    def predict_at(self, features: RequestFeatures, levels: np.ndarray) -> LengthPrediction:
        """See ``Graded.predict_at``."""
        density = self._tree.density(features)
        if features.edges:
            grams = features.ngrams(TABLE)
            estimate = _shifted(_median(density), self._factor(grams))
            density = self._residuals.mix(density, estimate)
        return grid.prediction(density, levels, self.level, features.cap_tokens)

    def observe(self, features: RequestFeatures, output_tokens: int, ended: bool) -> None:
        """See ``Predictor.observe``."""
        if features.edges:
            density = self._tree.density(features)
            grams = features.ngrams(TABLE)
            median, factor = _median(density), self._factor(grams)
            estimate = _shifted(median, factor)
            above = output_tokens > grid.UPPERS[estimate]
            # Where it was cut below the estimate, nothing is known of either side.
            if ended or above:
                voice = self._tree.voice(features.user)
                self._step(grams, above, voice)
                if ended:
                    bucket = grid.cell(output_tokens) - grid.PAD
                    self._residuals.learn(density, estimate, bucket, voice)
        self._tree.observe(features, output_tokens, ended)

    def state(self) -> State:
        """See ``Predictor.state``."""
        return {
            **self._tree.state(),
            **{f"text_{name}": value for name, value in self._residuals.state().items()},
            "text_model": np.stack((self._weights, self._squares)),
        }

    def restore(self, state: State) -> None:
        """See ``Predictor.restore``."""
        self._tree.restore(state)
        own = {k.removeprefix("text_"): v for k, v in state.items() if k.startswith("text_")}
        self._residuals.restore(own)
        if own["model"].shape != (2, TABLE):
            raise ValueError(f"a model of shape {own['model'].shape}: give (2, {TABLE})")
        self._weights, self._squares = np.array(own["model"], float)

    def _factor(self, grams: np.ndarray) -> float:
        """The logarithm of the factor that the n-grams suggest."""
        total = float(self._weights[grams].sum()) / math.sqrt(len(grams))
        return min(max(total, -FARTHEST), FARTHEST)

    def _step(self, grams: np.ndarray, above: bool, voice: float) -> None:
        """Move towards a length above or below the estimate."""
        gradient = voice * (0.5 if above else -0.5) / math.sqrt(len(grams))
        squares = self._squares[grams] + gradient * gradient * len(grams)
        self._squares[grams] = squares
        self._weights[grams] += RATE * gradient / np.sqrt(squares)


def _median(density: np.ndarray) -> int:
    rising = np.cumsum(density[grid.PAD : grid.PAD + grid.BUCKETS])
    return int(np.searchsorted(rising, rising[-1] / 2))


def _shifted(bucket: int, factor: float) -> int:
    return min(max(bucket + round(factor / grid.LOG_STEP), 0), grid.BUCKETS - 1)
