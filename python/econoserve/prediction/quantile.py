"""Predicts a response length from the lengths of the responses that ended before it.

Owns the recent lengths. It must never be told how long a running request will be.
"""

import math
from collections import deque

import numpy as np
from sortedcontainers import SortedList

from econoserve.core.lengths import LengthPrediction
from econoserve.prediction.predictor import State
from econoserve.prediction.request import RequestFeatures

QUANTILES = 64
"""Points of the distribution handed to the scheduler; our choice, not the paper's."""

PRIOR_LENGTHS = 32
"""Assumed lengths to begin with, one given up for each that is seen: short responses end first,
so the first ones seen say too little of the rest. Our choice."""


class QuantilePredictor:
    """The empirical distribution of the last responses, capped by each request's own limit.

    It starts from an exponential distribution with a mean of ``prior_tokens``.

    Args:
        level: probability that a claim should cover, in (0, 1].
        window: how many of the last responses count, at least 1.
        prior_tokens: mean RL assumed until responses have ended, at least 1.
    """

    def __init__(self, level: float, window: int = 1000, prior_tokens: int = 256) -> None:
        if not 0.0 < level <= 1.0:
            raise ValueError(f"level={level}: give a probability in (0, 1]")
        if window < 1:
            raise ValueError(f"window={window}: give 1 or more responses")
        if prior_tokens < 1:
            raise ValueError(f"prior_tokens={prior_tokens}: give 1 token or more")
        self.level = level
        self.window = window
        assumed = [
            math.ceil(-prior_tokens * math.log(1 - (rank + 0.5) / PRIOR_LENGTHS))
            for rank in range(PRIOR_LENGTHS)
        ]
        # Given up from the middle outwards, so that what is left keeps its shape.
        middle = PRIOR_LENGTHS // 2
        self._assumed = deque(
            sorted(assumed, key=lambda length: abs(assumed.index(length) - middle))
        )
        self._recent: deque[int] = deque()
        self._sorted: SortedList = SortedList(assumed)
        self._quantiles: tuple[int, ...] | None = None

    def predict(self, max_new_tokens: int) -> LengthPrediction:
        """Predict the RL of a request that arrives now.

        Args:
            max_new_tokens: the request's limit on output tokens.

        Returns:
            The distribution of recent lengths, capped by ``max_new_tokens``.
        """
        return LengthPrediction(self._distribution(), self.level, cap_tokens=max_new_tokens)

    def observe(self, output_tokens: int) -> None:
        """Learn from a response that ended by itself.

        Args:
            output_tokens: its length, at least 1.
        """
        if self._assumed:
            self._sorted.remove(self._assumed.popleft())
        self._recent.append(output_tokens)
        self._sorted.add(output_tokens)
        if len(self._recent) > self.window:
            self._sorted.remove(self._recent.popleft())
        self._quantiles = None

    def observe_cut(self, output_tokens: int) -> None:
        """Learn from a response that ended at its limit: it would have gone on.

        It counts as the median of the known lengths above it, as if its weight were moved to
        the longer ones (the idea of the Kaplan-Meier estimator).

        Args:
            output_tokens: its length, at least 1.
        """
        known = LengthPrediction(self._distribution(), level=0.5, cap_tokens=1 << 30)
        self.observe(known.given(output_tokens))

    def state(self) -> State:
        """What it has learned.

        Returns:
            The recent lengths, and what is left of those assumed at first.
        """
        return {"recent": np.array(self._recent, int), "assumed": np.array(self._assumed, int)}

    def restore(self, state: State) -> None:
        """Take over what another one has learned.

        Args:
            state: from ``state``.

        Raises:
            ValueError, KeyError: it is not such a state.
        """
        recent, assumed = state["recent"].tolist()[-self.window :], state["assumed"].tolist()
        if min((*recent, *assumed), default=0) < 1:
            raise ValueError("lengths are missing or below 1")
        self._recent, self._assumed = deque(recent), deque(assumed)
        self._sorted = SortedList((*recent, *assumed))
        self._quantiles = None

    def _distribution(self) -> tuple[int, ...]:
        if self._quantiles is None:
            count = len(self._sorted)
            points = min(count, QUANTILES)
            self._quantiles = tuple(
                self._sorted[(point + 1) * count // points - 1] for point in range(points)
            )
        return self._quantiles


class GlobalQuantiles:
    """The predictor ``quantile``: all requests are alike.

    Args:
        level: see ``QuantilePredictor``.
        prior_tokens: see there.
    """

    def __init__(self, level: float, prior_tokens: int = 256) -> None:
        self._lengths = QuantilePredictor(level, prior_tokens=prior_tokens)

    def predict(self, features: RequestFeatures) -> LengthPrediction:
        """See ``Predictor.predict``."""
        return self._lengths.predict(features.cap_tokens)

    def predict_at(self, features: RequestFeatures, levels: np.ndarray) -> LengthPrediction:
        """See ``Graded.predict_at``; the levels of the last lengths are true as they are."""
        return self.predict(features)

    def observe(self, features: RequestFeatures, output_tokens: int, ended: bool) -> None:
        """See ``Predictor.observe``."""
        if ended:
            self._lengths.observe(output_tokens)
        else:
            self._lengths.observe_cut(output_tokens)

    def state(self) -> State:
        """See ``Predictor.state``."""
        return self._lengths.state()

    def restore(self, state: State) -> None:
        """See ``Predictor.restore``."""
        self._lengths.restore(state)
