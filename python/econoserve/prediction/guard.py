"""Keeps a predictor's failures from requests: what raises or makes no sense is replaced.

Owns the replacement, which learns all along, and the count of its uses.
"""

import logging
from collections import deque
from copy import deepcopy

from econoserve.core.lengths import LengthPrediction
from econoserve.prediction.calibration import Calibrated
from econoserve.prediction.predictor import State
from econoserve.prediction.quantile import GlobalQuantiles
from econoserve.prediction.request import RequestFeatures

logger = logging.getLogger(__name__)

UNTOLD = 1000
"""Responses kept for the replacement, which remembers no more."""

LONGEST_TOKENS = 1 << 32
"""Beyond this, a predicted length makes no sense."""


class Guarded:
    """A predictor that is replaced by ``quantile`` where it fails.

    Attributes:
        inner: the predictor, calibrated.
        fallbacks: calls in which it failed.

    Args:
        inner: the predictor, calibrated.
        fallback: takes its place.
    """

    def __init__(self, inner: Calibrated, fallback: GlobalQuantiles) -> None:
        self.inner = inner
        self.fallbacks = 0
        self._fallback = fallback
        # It learns only when it is needed: these are then told to it.
        self._untold: deque[tuple[RequestFeatures, int, bool]] = deque()

    def predict(self, features: RequestFeatures) -> LengthPrediction:
        """See ``Predictor.predict``; it never raises."""
        try:
            told = self.inner.predict(features)
            problem = _problem(told, features)
        except Exception as error:
            problem = repr(error)
        if problem is None:
            return told
        self._failed(problem)
        self._tell()
        return self._fallback.predict(features)

    def observe(self, features: RequestFeatures, output_tokens: int, ended: bool) -> None:
        """See ``Predictor.observe``; it never raises."""
        self._untold.append((features, output_tokens, ended))
        # At the same moment on every rank: what is told later is told of another distribution.
        if len(self._untold) >= UNTOLD:
            self._tell()
        try:
            self.inner.observe(features, output_tokens, ended)
        except Exception as error:
            self._failed(repr(error))

    def forget(self, features: RequestFeatures) -> None:
        """See ``Calibrated.forget``."""
        self.inner.forget(features)

    def state(self) -> State:
        """See ``Predictor.state``."""
        told = deepcopy(self._fallback)
        for observation in self._untold:
            told.observe(*observation)
        return {
            **self.inner.state(),
            **{f"fallback_{name}": value for name, value in told.state().items()},
        }

    def restore(self, state: State) -> None:
        """See ``Predictor.restore``."""
        own = {k.removeprefix("fallback_"): v for k, v in state.items() if k[:9] == "fallback_"}
        self.inner.restore(state)
        self._fallback.restore(own)
        self._untold.clear()

    def coverage(self, level: float) -> float:
        """See ``Calibrated.coverage``."""
        return self.inner.coverage(level)

    def _tell(self) -> None:
        while self._untold:
            self._fallback.observe(*self._untold.popleft())

    def _failed(self, problem: str) -> None:
        self.fallbacks += 1
        if self.fallbacks == 1:
            logger.error("The length predictor failed, recent lengths are used: %s", problem)


def _problem(told: object, features: RequestFeatures) -> str | None:
    """What is wrong with a prediction, if anything."""
    if not isinstance(told, LengthPrediction):
        return f"predicted {told!r}, not a LengthPrediction"
    known = told.quantiles_tokens
    if told.cap_tokens != features.cap_tokens:
        return f"cap_tokens={told.cap_tokens}, not the request's {features.cap_tokens}"
    if not known or type(known[0]) is not int or type(known[-1]) is not int:
        return f"quantiles_tokens={known!r}, not whole numbers"
    if known[-1] > LONGEST_TOKENS:
        return f"a length of {known[-1]}"
    return None
