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
from econoserve.prediction.shares import FAIR, LOWEST

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

ROUNDS = 8
"""In which cut responses are shared out."""

LEAST_OTHERS = 8
"""Users beside one from which on its say is limited; of fewer, each is the traffic."""

COLUMNS = 4
"""What is kept of each response."""

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
        # Of each response: its level in the predictor's distribution (of STEPS), how many of the
        # quantiles that were told it exceeds, whether it ended by itself, and a group of users.
        self._recent: deque[tuple[int, int, int, int]] = deque(maxlen=WINDOW)
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
        if found is not None:
            self._note(features.user, found[1], found[2], output_tokens, ended)
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
        _, below, ended, _ = np.array(self._recent).T
        counts = _shared_out(below, ended == 1, np.ones(len(below)), POINTS + 1, 0.0)
        return float(counts[:rank].sum() / counts.sum())

    def state(self) -> State:
        """See ``Predictor.state``."""
        return {
            **self.inner.state(),
            "calibration_recent": np.array(self._recent, np.int64).reshape(-1, COLUMNS),
            "calibration_levels": self._levels,
            "calibration_news": self._news,
        }

    def restore(self, state: State) -> None:
        """See ``Predictor.restore``."""
        recent = state["calibration_recent"]
        if state["calibration_levels"].shape != LEVELS.shape:
            raise ValueError(f"{len(state['calibration_levels'])} levels: give {POINTS}")
        if recent.ndim != 2 or recent.shape[1] != COLUMNS:
            raise ValueError(f"places of shape {recent.shape}: give {COLUMNS} columns")
        self.inner.restore(state)
        self._recent.clear()
        self._recent.extend(map(tuple, recent.tolist()))
        self._levels, self._news = state["calibration_levels"], int(state["calibration_news"])
        self._pending.clear()

    def _note(
        self,
        user: int,
        quantiles: tuple[int, ...],
        levels: np.ndarray,
        output_tokens: int,
        ended: bool,
    ) -> None:
        above = bisect_right(quantiles, output_tokens)
        below = bisect_left(quantiles, output_tokens) if ended else above
        # Where several quantiles are this length, it is as much above as below them.
        middle = (below + above) // 2
        low = levels[middle - 1] if middle else 0.0
        high = levels[middle] if middle < len(levels) else 1.0
        step = min(int((low + high) / 2 * STEPS), STEPS - 1)
        self._recent.append((step, below, int(ended), user & LOWEST))
        self._news += 1
        if self._news >= PERIOD:
            self._learn()

    def _learn(self) -> None:
        """Which level to ask for instead of each."""
        self._news = 0
        steps, _, ended, users = np.array(self._recent).T
        counts = _shared_out(steps, ended == 1, _weights(users), STEPS, ASSUMED)
        shares = (counts + ASSUMED / STEPS) / (counts.sum() + ASSUMED)
        rising = np.concatenate(((0.0,), np.cumsum(shares)))
        self._levels = np.interp(LEVELS, rising, _ENDS)


def _weights(users: np.ndarray) -> np.ndarray:
    """How much each response counts: where there are many users, none has most of the say."""
    given = np.bincount(users, minlength=LOWEST + 1).astype(float)
    others = np.count_nonzero(given) - 1
    if others < LEAST_OTHERS:
        return np.ones(len(users))
    most = FAIR * (len(users) - given) / others
    return np.minimum(1.0, most / np.maximum(given, 1.0))[users]


def _shared_out(
    places: np.ndarray, ended: np.ndarray, weights: np.ndarray, size: int, assumed: float
) -> np.ndarray:
    """Weights by place, those of responses that were cut shared out over what lies beyond.

    They follow the shares that result, by expectation maximisation (Turnbull's estimator).
    """
    whole = np.bincount(places[ended], weights[ended], minlength=size)
    cut = np.bincount(places[~ended], weights[~ended], minlength=size)
    counts = whole
    if not cut.any():
        return counts
    shares = np.full(size, 1.0 / size)
    for _ in range(ROUNDS):
        beyond = np.maximum(np.cumsum(shares[::-1])[::-1], 1e-12)
        counts = whole + shares * np.cumsum(cut / beyond)
        shares = counts + max(assumed, 1e-3) / size
        shares /= shares.sum()
    return counts
