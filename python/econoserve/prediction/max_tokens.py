"""Predicts that every response is as long as its request allows.

Owns nothing; it is what a scheduler does that knows nothing of lengths.
"""

import numpy as np

from econoserve.core.lengths import LengthPrediction
from econoserve.prediction.grid import LEVELS
from econoserve.prediction.predictor import State
from econoserve.prediction.request import RequestFeatures


class MaxTokens:
    """The predictor ``max-tokens``.

    Args:
        level: probability that a claim should cover; any gives the same length.
    """

    def __init__(self, level: float) -> None:
        self.level = level

    def predict(self, features: RequestFeatures) -> LengthPrediction:
        """See ``Predictor.predict``."""
        return self.predict_at(features, LEVELS)

    def predict_at(self, features: RequestFeatures, levels: np.ndarray) -> LengthPrediction:
        """See ``Graded.predict_at``."""
        cap_tokens = max(features.cap_tokens, 1)
        return LengthPrediction((cap_tokens,) * len(levels), self.level, features.cap_tokens)

    def observe(self, features: RequestFeatures, output_tokens: int, ended: bool) -> None:
        """See ``Predictor.observe``; nothing is learned."""

    def state(self) -> State:
        """See ``Predictor.state``."""
        return {}

    def restore(self, state: State) -> None:
        """See ``Predictor.restore``."""
