"""Believes the sender's own estimate of a response as far as it has proved right.

Owns how wrong the hints were, by user and by their size. A sender whose hints are bad is predicted
by the prefix tree; nobody's hints speak for another's.
"""

from collections import OrderedDict

import numpy as np

from econoserve.core.lengths import LengthPrediction
from econoserve.prediction import grid
from econoserve.prediction.predictor import State
from econoserve.prediction.prefix_tree import PrefixTree
from econoserve.prediction.request import RequestFeatures
from econoserve.prediction.residuals import SPREAD, Residuals

SENDERS = 1024
"""Pairs of user and size of hint that are remembered, those that came last."""

COARSE = 16
"""Buckets of the grid that are one size of hint: a factor of about 6."""


class Hint:
    """The predictor ``hint``.

    Args:
        level: probability that a claim should cover, in (0, 1].
        prior_tokens: mean RL assumed until responses have ended, at least 1.
    """

    def __init__(self, level: float, prior_tokens: int = 256) -> None:
        self.level = level
        self._tree = PrefixTree(level, prior_tokens)
        self._senders: OrderedDict[tuple[int, int], Residuals] = OrderedDict()

    def predict(self, features: RequestFeatures) -> LengthPrediction:
        """See ``Predictor.predict``."""
        return self.predict_at(features, grid.LEVELS)

    def predict_at(self, features: RequestFeatures, levels: np.ndarray) -> LengthPrediction:
        """See ``Graded.predict_at``."""
        density = self._tree.density(features)
        if features.expected_tokens is not None:
            estimate = _bucket(features.expected_tokens)
            known = self._senders.get((features.user, estimate // COARSE)) or Residuals()
            density = known.mix(density, estimate)
        return grid.prediction(density, levels, self.level, features.cap_tokens)

    def observe(self, features: RequestFeatures, output_tokens: int, ended: bool) -> None:
        """See ``Predictor.observe``."""
        # Of one that was cut, the error of its hint is not known.
        if ended and features.expected_tokens is not None:
            estimate = _bucket(features.expected_tokens)
            sender = (features.user, estimate // COARSE)
            known = self._senders.pop(sender, None) or Residuals()
            known.learn(self._tree.density(features), estimate, _bucket(output_tokens))
            self._senders[sender] = known
            if len(self._senders) > SENDERS:
                self._senders.popitem(last=False)
        self._tree.observe(features, output_tokens, ended)

    def state(self) -> State:
        """See ``Predictor.state``."""
        known = list(self._senders.values())
        return {
            **self._tree.state(),
            "hint_users": np.array([user for user, _ in self._senders], np.uint64),
            "hint_sizes": np.array([size for _, size in self._senders], np.int64),
            "hint_errors": np.array([one.counts for one in known]).reshape(-1, SPREAD),
            "hint_weights": np.array([one.weight for one in known], float),
            "hint_uses": np.array([one.uses for one in known], float),
        }

    def restore(self, state: State) -> None:
        """See ``Predictor.restore``."""
        self._tree.restore(state)
        self._senders.clear()
        names = ("users", "sizes", "errors", "weights", "uses")
        for user, size, errors, weight, uses in zip(
            *(state[f"hint_{name}"] for name in names), strict=True
        ):
            known = Residuals()
            known.restore({"counts": errors, "weight": weight, "uses": uses})
            self._senders[int(user), int(size)] = known


def _bucket(tokens: int) -> int:
    return grid.cell(max(tokens, 1)) - grid.PAD
