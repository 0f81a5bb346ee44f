"""Predicts that every response is as long as its request allows.

Owns nothing; it is what a scheduler does that knows nothing of lengths.
"""

from econoserve.core.lengths import LengthPrediction
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
        cap_tokens = max(features.cap_tokens, 1)
        return LengthPrediction((cap_tokens,), self.level, features.cap_tokens)

    def observe(self, features: RequestFeatures, output_tokens: int, ended: bool) -> None:
        """See ``Predictor.observe``; nothing is learned."""

    def state(self) -> State:
        """See ``Predictor.state``."""
        return {}

    def restore(self, state: State) -> None:
        """See ``Predictor.restore``."""
