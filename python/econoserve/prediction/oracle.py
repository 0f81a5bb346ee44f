"""Predicts the true length, exactly or with noise: for replays of traces only.

Owns no knowledge: who replays a trace gives it the lengths. A server must never offer it.
"""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from econoserve.core.lengths import LengthPrediction
from econoserve.prediction.grid import LEVELS
from econoserve.prediction.predictor import State
from econoserve.prediction.request import RequestFeatures

Truth = Callable[[RequestFeatures], int]
"""The true response length of a request, in tokens."""

MOST_SIGMA = 100.0
"""With a larger one, factors leave the range of floats."""


class Oracle:
    """The predictor ``oracle``.

    Args:
        level: probability that a claim should cover; any gives the same length.
        truth: the true lengths.
    """

    def __init__(self, level: float, truth: Truth) -> None:
        self.level = level
        self._truth = truth

    def predict(self, features: RequestFeatures) -> LengthPrediction:
        """See ``Predictor.predict``."""
        return LengthPrediction((self._truth(features),), self.level, features.cap_tokens)

    def observe(self, features: RequestFeatures, output_tokens: int, ended: bool) -> None:
        """See ``Predictor.observe``; nothing is learned."""

    def state(self) -> State:
        """See ``Predictor.state``."""
        return {}

    def restore(self, state: State) -> None:
        """See ``Predictor.restore``."""


class NoisyOracle(Oracle):
    """The predictor ``noisy-oracle``: a length off by a log-normal factor, and how far it may be.

    Args:
        level: probability that a claim should cover.
        truth: the true lengths.
        sigma: standard deviation of the factor's logarithm, 0 to ``MOST_SIGMA``.
        seed: of the noise.

    Raises:
        ValueError: ``sigma`` is out of range.
    """

    def __init__(self, level: float, truth: Truth, sigma: float, seed: int = 0) -> None:
        super().__init__(level, truth)
        if not 0.0 <= sigma <= MOST_SIGMA:
            raise ValueError(f"noisy-oracle: sigma={sigma}: give 0 to {MOST_SIGMA:g}")
        self._sigma = sigma
        self._draw = np.random.default_rng(seed)
        normal = NormalDist()
        self._factors = np.exp(sigma * np.array([normal.inv_cdf(level) for level in LEVELS]))

    def predict(self, features: RequestFeatures) -> LengthPrediction:
        """See ``Predictor.predict``."""
        # Knowing the noisy length only, the true one lies as far around it as the noise is wide.
        center = self._truth(features) * np.exp(self._sigma * self._draw.standard_normal())
        lengths = np.clip(np.rint(center * self._factors), 1, 1 << 30).astype(np.int64)
        return LengthPrediction(tuple(lengths.tolist()), self.level, features.cap_tokens)
