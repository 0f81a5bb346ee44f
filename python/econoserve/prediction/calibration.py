"""Makes a predictor's quantiles true: of the lengths, a share of q lies below the quantile q.

Owns where recent lengths fell in their predicted distributions, and the correction that follows
from it: which level of the predictor to ask for, to get the level that is wanted.
"""

from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from typing import Protocol

import numpy as np

from econoserve.core.lengths import LengthPrediction
from econoserve.prediction.grid import LEVELS, POINTS
from econoserve.prediction.predictor import Predictor, State
from econoserve.prediction.request import RequestFeatures
from econoserve.prediction.shares import Shares

WINDOW = 1000
"""Responses by which coverage is measured and corrected."""

ASSUMED = 30.0
"""Responses that the predictor's own word counts for."""

PERIOD = 20
"""Responses after which the correction is worked out anew."""

PENDING = 16_384
"""Predictions whose responses are waited for; of older ones, coverage is not learned."""

STEPS = 256
"""Parts of the range from 0 to 1 in which levels are counted."""

_ENDS = np.arange(STEPS + 1) / STEPS


class Graded(Predictor, Protocol):
    """A predictor that can be asked for any levels of its distribution."""

    def predict_at(self, features: RequestFeatures, levels: np.ndarray) -> LengthPrediction:
        """Predict the RL of a request that arrives now.

        Args:
            features: the request.
            levels: ascending probabilities.

        Returns:
            The quantiles at these levels; they are handed on as if they were evenly spaced.
        """


class Calibrated:
    """A predictor whose quantiles are corrected by what they covered.

    Args:
        inner: the predictor.
    """

    def __init__(self, inner: Graded) -> None:
        self.inner = inner
        self._pending: OrderedDict[int, tuple] = OrderedDict()
        # Of each response: its level in the predictor's distribution (of STEPS), its weight, and
        # how many of the quantiles that were told it exceeds.
        self._recent: deque[tuple[int, float, int]] = deque()
        self._counts = [0.0] * STEPS
        self._shares: Shares | None = None
        self._news = 0
        self._levels = LEVELS

    def predict(self, features: RequestFeatures) -> LengthPrediction:
        """See ``Predictor.predict``."""
        levels = self._levels
        told = self.inner.predict_at(features, levels)
        # The features are kept with it, so that no other object has their identity meanwhile.
        self._pending[id(features)] = (features, told.quantiles_tokens, levels)
        if len(self._pending) > PENDING:
            self._pending.popitem(last=False)
        return told

    def observe(self, features: RequestFeatures, output_tokens: int, ended: bool) -> None:
        """See ``Predictor.observe``."""
        found = self._pending.pop(id(features), None)
        if found is not None and ended:
            self._note(features.user, found[1], found[2], output_tokens)
        self.inner.observe(features, output_tokens, ended)

    def forget(self, features: RequestFeatures) -> None:
        """Wait no longer for the response of a request.

        Args:
            features: the object that was given to ``predict``.
        """
        self._pending.pop(id(features), None)

    def coverage(self, level: float) -> float:
        """The share of recent lengths that were not above the quantile that was told.

        Args:
            level: of the quantile, in (0, 1].

        Returns:
            From 0 to 1; ``level`` itself until a response has ended.
        """
        if not self._recent:
            return level
        rank = min(max(int(np.ceil(level * POINTS - 1e-9)), 1), POINTS)
        return sum(below < rank for _, _, below in self._recent) / len(self._recent)

    def state(self) -> State:
        """See ``Predictor.state``."""
        givers = self._shares.items() if self._shares is not None else []
        return {
            **self.inner.state(),
            "calibration_recent": np.array(self._recent, float).reshape(-1, 3),
            "calibration_levels": self._levels,
            "calibration_counts": np.array(self._counts),
            "calibration_news": self._news,
            "calibration_users": np.array([user for user, _ in givers], np.uint64),
            "calibration_given": np.array([given for _, given in givers], float),
        }

    def restore(self, state: State) -> None:
        """See ``Predictor.restore``."""
        recent = state["calibration_recent"]
        if state["calibration_levels"].shape != LEVELS.shape:
            raise ValueError(f"{len(state['calibration_levels'])} levels: give {POINTS}")
        if recent.ndim != 2 or recent.shape[1] != 3:
            raise ValueError(f"places of shape {recent.shape}: give 3 columns")
        users, given = state["calibration_users"].tolist(), state["calibration_given"].tolist()
        self.inner.restore(state)
        self._recent.clear()
        self._recent.extend(
            (int(step), weight, int(below)) for step, weight, below in recent.tolist()
        )
        self._counts = state["calibration_counts"].tolist()
        givers = list(zip(users, given, strict=True))
        self._shares = Shares.of(givers) if givers else None
        self._levels, self._news = state["calibration_levels"], int(state["calibration_news"])
        self._pending.clear()

    def _note(
        self, user: int, quantiles: tuple[int, ...], levels: np.ndarray, output_tokens: int
    ) -> None:
        weight = 1.0
        if self._shares is None:
            self._shares = Shares(user, 1.0)
        else:
            weight = self._shares.weight(user)
        below = bisect_left(quantiles, output_tokens)
        # Where several quantiles are this length, it is as much above as below them.
        middle = (below + bisect_right(quantiles, output_tokens)) // 2
        low = levels[middle - 1] if middle else 0.0
        high = levels[middle] if middle < len(levels) else 1.0
        step = min(int((low + high) / 2 * STEPS), STEPS - 1)
        self._recent.append((step, weight, below))
        self._counts[step] += weight
        if len(self._recent) > WINDOW:
            step, weight, _ = self._recent.popleft()
            self._counts[step] -= weight
        self._news += 1
        if self._news >= PERIOD:
            self._learn()

    def _learn(self) -> None:
        """Which level to ask for instead of each."""
        self._news = 0
        # Sums of what was added and taken away may fall short of zero by a rounding error.
        counts = np.maximum(self._counts, 0.0)
        shares = (counts + ASSUMED / STEPS) / (counts.sum() + ASSUMED)
        rising = np.concatenate(((0.0,), np.cumsum(shares)))
        self._levels = np.interp(LEVELS, rising, _ENDS)
