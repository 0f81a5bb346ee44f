"""Predicts from the words of a prompt, on top of what the prefix tree says.

Owns a linear model on hashed n-grams that says by what factor a response differs from the tree's
median. An n-gram takes part once it tells something: where responses to prompts with it lie above
the tree's median clearly more often than below, or less often. The factor follows its median
(quantile loss, a subgradient step for each response), and the model counts as far as it has
foretold better than the tree alone.
"""

import numpy as np

from econoserve.core.lengths import LengthPrediction
from econoserve.prediction import grid
from econoserve.prediction.predictor import State
from econoserve.prediction.prefix_tree import PrefixTree
from econoserve.prediction.request import RequestFeatures
from econoserve.prediction.residuals import Residuals

TABLE = 1 << 16
"""Weights; n-grams that fall on the same one share it."""

RATE = 0.6
"""Size of the first step, as a logarithm of a length; later ones shrink with their root."""

SMALLEST = 0.02
"""But never below this."""

TELLING = 2.5
"""Standard deviations by which the signs of an n-gram must differ from a fair coin's."""

ENOUGH = 4.0
"""Responses before which no n-gram tells anything."""

MANY = 1000.0
"""Responses at which an n-gram's signs are halved, so that old ones count less."""

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
        self._steps = np.zeros(TABLE)
        self._seen = np.zeros(TABLE)
        self._signs = np.zeros(TABLE)

    def predict(self, features: RequestFeatures) -> LengthPrediction:
        """See ``Predictor.predict``."""
        return self.predict_at(features, grid.LEVELS)

    def predict_at(self, features: RequestFeatures, levels: np.ndarray) -> LengthPrediction:
        """See ``Graded.predict_at``."""
        density = self._tree.density(features)
        if features.edges:
            telling = self._telling(features.ngrams(TABLE))
            estimate = _shifted(_median(density), self._factor(telling))
            density = self._residuals.mix(density, estimate)
        return grid.prediction(density, levels, self.level, features.cap_tokens)

    def observe(self, features: RequestFeatures, output_tokens: int, ended: bool) -> None:
        """See ``Predictor.observe``."""
        if features.edges:
            density = self._tree.density(features)
            grams, median = features.ngrams(TABLE), _median(density)
            telling = self._telling(grams)
            estimate = _shifted(median, self._factor(telling))
            bucket = grid.cell(output_tokens) - grid.PAD
            voice = self._tree.voice(features.user)
            # Of one that was cut below them, nothing is known.
            if ended or bucket > median:
                self._sign(grams, voice * ((bucket > median) - (bucket < median)))
            if ended or bucket > estimate:
                self._step(telling, voice * ((bucket > estimate) - (bucket < estimate)))
            if ended:
                self._residuals.learn(density, estimate, bucket, voice)
        self._tree.observe(features, output_tokens, ended)

    def state(self) -> State:
        """See ``Predictor.state``."""
        return {
            **self._tree.state(),
            **{f"text_{name}": value for name, value in self._residuals.state().items()},
            "text_model": np.stack((self._weights, self._steps, self._seen, self._signs)),
        }

    def restore(self, state: State) -> None:
        """See ``Predictor.restore``."""
        self._tree.restore(state)
        own = {k.removeprefix("text_"): v for k, v in state.items() if k.startswith("text_")}
        self._residuals.restore(own)
        if own["model"].shape != (4, TABLE):
            raise ValueError(f"a model of shape {own['model'].shape}: give (4, {TABLE})")
        self._weights, self._steps, self._seen, self._signs = np.array(own["model"], float)

    def _telling(self, grams: np.ndarray) -> np.ndarray:
        """Those that tell something, each once."""
        seen, signs = self._seen[grams], self._signs[grams]
        return np.unique(grams[(signs * signs > TELLING**2 * seen) & (seen >= ENOUGH)])

    def _factor(self, telling: np.ndarray) -> float:
        """The logarithm of the factor that they suggest."""
        return min(max(float(self._weights[telling].sum()), -FARTHEST), FARTHEST)

    def _sign(self, grams: np.ndarray, sign: float) -> None:
        """Note that a response lay above or below what the tree says."""
        # An n-gram that is there twice is written twice, the same: it counts once.
        self._seen[grams] += abs(sign)
        self._signs[grams] += sign
        many = grams[self._seen[grams] > MANY]
        if len(many):
            self._seen[many] = self._seen[many] / 2
            self._signs[many] = self._signs[many] / 2

    def _step(self, telling: np.ndarray, sign: float) -> None:
        """Move towards a length above or below the estimate."""
        if len(telling):
            self._steps[telling] += abs(sign)
            sizes = np.maximum(RATE / np.sqrt(self._steps[telling] + 1.0), SMALLEST)
            self._weights[telling] += sizes * (sign / len(telling))


def _median(density: np.ndarray) -> int:
    rising = np.cumsum(density[grid.PAD : grid.PAD + grid.BUCKETS])
    return int(np.searchsorted(rising, rising[-1] / 2))


def _shifted(bucket: int, factor: float) -> int:
    return min(max(bucket + round(factor / grid.LOG_STEP), 0), grid.BUCKETS - 1)
