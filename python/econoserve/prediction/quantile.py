"""Predicts a response length from the lengths of the responses that ended before it.

Owns the recent lengths. It must never be told how long a running request will be.
"""

from collections import deque

from sortedcontainers import SortedList

from econoserve.core.types import LengthPrediction

QUANTILES = 64
"""Points of the distribution handed to the scheduler; our choice, not the paper's."""


class QuantilePredictor:
    """The empirical distribution of the last responses, capped by each request's own limit.

    Args:
        level: probability that a claim should cover, in (0, 1].
        window: how many of the last responses count, at least 1.
        prior_tokens: assumed RL until the first response ends.
    """

    def __init__(self, level: float, window: int = 1000, prior_tokens: int = 256) -> None:
        if not 0.0 < level <= 1.0:
            raise ValueError(f"level={level}: give a probability in (0, 1]")
        if window < 1:
            raise ValueError(f"window={window}: give 1 or more responses")
        self.level = level
        self.window = window
        self.prior_tokens = prior_tokens
        self._recent: deque[int] = deque()
        self._sorted: SortedList = SortedList()
        self._quantiles: tuple[int, ...] | None = ()

    def predict(self, max_new_tokens: int) -> LengthPrediction:
        """Predict the RL of a request that arrives now.

        Args:
            max_new_tokens: the request's limit on output tokens.

        Returns:
            The distribution of recent lengths, capped by ``max_new_tokens``.
        """
        if self._quantiles is None:
            count = len(self._sorted)
            points = min(count, QUANTILES)
            self._quantiles = tuple(
                self._sorted[(point + 1) * count // points - 1] for point in range(points)
            )
        return LengthPrediction(
            quantiles_tokens=self._quantiles,
            level=self.level,
            cap_tokens=max_new_tokens,
            prior_tokens=self.prior_tokens,
        )

    def observe(self, output_tokens: int) -> None:
        """Learn from a response that ended by itself or at its limit (not from an abort).

        Args:
            output_tokens: its length, at least 1.
        """
        self._recent.append(output_tokens)
        self._sorted.add(output_tokens)
        if len(self._recent) > self.window:
            self._sorted.remove(self._recent.popleft())
        self._quantiles = None
