"""Makes a predictor's quantiles true: of the lengths, a share of q lies below the quantile q.

Owns where recent lengths fell in their predicted distributions, and the correction that follows
from it. It never changes the order of a request's outcomes, only how likely they are said to be.
"""

from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque

import numpy as np

from econoserve.core.lengths import LengthPrediction
from econoserve.prediction.grid import POINTS
from econoserve.prediction.predictor import Predictor, State
from econoserve.prediction.request import RequestFeatures
from econoserve.prediction.shares import Shares

WINDOW = 1000
"""Responses by which coverage is measured and corrected."""

ASSUMED = 100.0
"""Responses that the predictor's own word counts for."""

PERIOD = 20
"""Responses after which the correction is worked out anew."""

PENDING = 65_536
"""Predictions whose responses are waited for."""

STRETCH = 4.0
"""The longest predicted length is stretched by up to this factor where too many exceed it."""


class Calibrated:
    """A predictor whose quantiles are corrected by what they covered.

    Args:
        inner: the predictor.
    """

    def __init__(self, inner: Predictor) -> None:
        self.inner = inner
        self._pending: OrderedDict[int, tuple] = OrderedDict()
        # Of each response: its place among the inner quantiles (0 to 1), its weight, its place
        # among those that were told.
        self._recent: deque[tuple[int, float, int]] = deque(maxlen=WINDOW)
        self._shares: Shares | None = None
        self._news = 0
        self._map: list[tuple[int, float]] | None = None
        self._stretch = 1.0

    def predict(self, features: RequestFeatures) -> LengthPrediction:
        """See ``Predictor.predict``."""
        raw = self.inner.predict(features)
        told = self._corrected(raw)
        # The features are kept with it, so that no other object has their identity meanwhile.
        self._pending[id(features)] = (features, raw.quantiles_tokens, told.quantiles_tokens)
        if len(self._pending) > PENDING:
            self._pending.popitem(last=False)
        return told

    def observe(self, features: RequestFeatures, output_tokens: int, ended: bool) -> None:
        """See ``Predictor.observe``."""
        found = self._pending.pop(id(features), None)
        if found is not None and ended and len(found[1]) == POINTS:
            self._note(
                features.user, _place(found[1], output_tokens), _place(found[2], output_tokens)
            )
        self.inner.observe(features, output_tokens, ended)

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
        return sum(told < rank for _, _, told in self._recent) / len(self._recent)

    def state(self) -> State:
        """See ``Predictor.state``."""
        givers = self._shares.items() if self._shares is not None else []
        return {
            **self.inner.state(),
            "calibration_recent": np.array(self._recent, float).reshape(-1, 3),
            "calibration_users": np.array([user for user, _ in givers], np.uint64),
            "calibration_given": np.array([given for _, given in givers], float),
        }

    def restore(self, state: State) -> None:
        """See ``Predictor.restore``."""
        recent = state["calibration_recent"]
        if recent.ndim != 2 or recent.shape[1] != 3:
            raise ValueError(f"places of shape {recent.shape}: give 3 columns")
        users, given = state["calibration_users"].tolist(), state["calibration_given"].tolist()
        self.inner.restore(state)
        self._recent.clear()
        self._recent.extend((int(raw), weight, int(told)) for raw, weight, told in recent.tolist())
        givers = list(zip(users, given, strict=True))
        self._shares = Shares.of(givers) if givers else None
        self._pending.clear()
        self._learn()

    def _note(self, user: int, raw: int, told: int) -> None:
        weight = 1.0
        if self._shares is None:
            self._shares = Shares(user, 1.0)
        else:
            weight = self._shares.weight(user)
        self._recent.append((raw, weight, told))
        self._news += 1
        if self._news >= PERIOD:
            self._learn()

    def _learn(self) -> None:
        """Where to look for each quantile among the inner ones."""
        self._news = 0
        if not self._recent:
            self._map, self._stretch = None, 1.0
            return
        places = np.array([raw for raw, _, _ in self._recent])
        weights = np.array([weight for _, weight, _ in self._recent])
        # Below the first quantile, between each two, and above the last one: the last two gaps
        # and the first two are halves.
        counts = np.bincount(places, weights, POINTS + 1)
        own = np.full(POINTS + 1, 1.0 / POINTS)
        own[[0, -1]] /= 2
        shares = (counts + ASSUMED * own) / (counts.sum() + ASSUMED)
        rising = np.cumsum(shares)[:-1]
        levels = (np.arange(POINTS) + 0.5) / POINTS
        found = np.interp(levels, rising, np.arange(POINTS))
        low = np.minimum(found.astype(int), POINTS - 2)
        self._map = list(zip(low.tolist(), (found - low).tolist(), strict=True))
        # More lie above the last quantile than should: it was too short by an unknown factor.
        excess = shares[-1] * 2 * POINTS
        self._stretch = float(np.clip(excess / 2, 1.0, STRETCH))

    def _corrected(self, raw: LengthPrediction) -> LengthPrediction:
        known = raw.quantiles_tokens
        if self._map is None or len(known) != POINTS:
            return raw
        last = known[-1]
        if self._stretch > 1.0:
            known = (*known[:-1], int(last * self._stretch))
        lengths = tuple(
            [int(known[low] + part * (known[low + 1] - known[low])) for low, part in self._map]
        )
        return LengthPrediction(lengths, raw.level, raw.cap_tokens)


def _place(quantiles: tuple[int, ...], output_tokens: int) -> int:
    """How many quantiles a length exceeds; where several equal it, the middle one of them."""
    low = bisect_left(quantiles, output_tokens)
    high = bisect_right(quantiles, output_tokens)
    return (low + high) // 2
