"""What every predictor does: predict when a request arrives, learn when its response has ended."""

from typing import Any, Protocol

from econoserve.core.lengths import LengthPrediction
from econoserve.prediction.request import RequestFeatures

State = dict[str, Any]
"""What a predictor knows, by name: numpy arrays, numbers, texts, and lists of them."""


class Predictor(Protocol):
    """Predicts response lengths and learns from those that ended.

    With several ranks, all call the same methods in the same order. Then all predict the same:
    there is no clock, no randomness, and no order that depends on hashes of texts.
    """

    def predict(self, features: RequestFeatures) -> LengthPrediction:
        """Predict the RL of a request that arrives now.

        Args:
            features: the request.

        Returns:
            A distribution, capped by the request's limit.
        """

    def observe(self, features: RequestFeatures, output_tokens: int, ended: bool) -> None:
        """Learn from a response that is complete.

        Args:
            features: the request, best the object that was given to ``predict``.
            output_tokens: the length of its response, at least 1.
            ended: whether it ended by itself. ``False`` where its limit or its user cut it: it
                would have gone on.
        """

    def state(self) -> State:
        """What it has learned.

        Returns:
            A copy that ``restore`` takes.
        """

    def restore(self, state: State) -> None:
        """Take over what another one of this kind has learned.

        Args:
            state: from ``state``.

        Raises:
            ValueError, KeyError, TypeError: it is not from a predictor of this kind; this one
                may be unusable then.
        """
