"""Predict each request when it arrives, and learn when its response has ended: in trace time.

Owns the order of events and what is measured of the predictions.
"""

import heapq
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median
from time import perf_counter

from econoserve.core.lengths import LengthPrediction
from econoserve.prediction.predictor import Predictor
from econoserve.workload.trace import TraceRequest

FIRST_TOKEN_S = 0.5
TOKEN_S = 0.02
"""A response ends so long after its request came: a second's half, and this for each token."""

SETTLING = 2000
"""Requests before coverage counts; half of the trace where it is shorter than twice as many."""


@dataclass(slots=True)
class Accuracy:
    """How good the predictions were.

    Attributes:
        mae: mean distance of the predicted median from the length, in tokens.
        pinball_50: pinball loss of the median, in tokens.
        pinball_90: of the 0.9 quantile.
        coverage_90: share of lengths not above the 0.9 quantile, after settling.
        mae_informed: ``mae`` of those requests of whose context something was known, ``None`` if
            there were none; see ``informed``.
        us_per_request: median time to predict and to learn.
        requests: how many.
    """

    mae: float
    pinball_50: float
    pinball_90: float
    coverage_90: float
    mae_informed: float | None
    us_per_request: float
    requests: int


def at_level(prediction: LengthPrediction, level: float) -> int:
    """A quantile of a prediction.

    Args:
        prediction: any.
        level: the probability.

    Returns:
        Tokens, as a claim of that level would be promised.
    """
    known = prediction.quantiles_tokens or (prediction.tokens,)
    return LengthPrediction(known, level, prediction.cap_tokens).tokens


def replay(
    requests: Sequence[TraceRequest], predictor: Predictor
) -> tuple[list[LengthPrediction], float]:
    """Run a trace through a predictor.

    Args:
        requests: by arrival.
        predictor: new; it learns.

    Returns:
        A prediction for each request, and the median seconds to predict one and to learn from one.
    """
    predictions, predicting_s, learning_s = [], [], []
    running: list[tuple[float, int, TraceRequest]] = []
    number = count()
    for request in requests:
        while running and running[0][0] <= request.arrival_s:
            ended = heapq.heappop(running)[2]
            began_s = perf_counter()
            by_itself = ended.output_tokens < ended.features.cap_tokens
            predictor.observe(ended.features, ended.output_tokens, by_itself)
            learning_s.append(perf_counter() - began_s)
        began_s = perf_counter()
        predictions.append(predictor.predict(request.features))
        predicting_s.append(perf_counter() - began_s)
        end_s = request.arrival_s + FIRST_TOKEN_S + TOKEN_S * request.output_tokens
        heapq.heappush(running, (end_s, next(number), request))
    return predictions, median(predicting_s) + median(learning_s or (0.0,))


def measure(requests: Sequence[TraceRequest], predictor: Predictor) -> Accuracy:
    """How good a predictor is on a trace.

    Args:
        requests: by arrival.
        predictor: new; it learns.

    Returns:
        The figures.
    """
    predictions, spent_s = replay(requests, predictor)
    lengths = [request.output_tokens for request in requests]
    medians = [at_level(prediction, 0.5) for prediction in predictions]
    highs = [at_level(prediction, 0.9) for prediction in predictions]
    settled = SETTLING if len(requests) >= 2 * SETTLING else len(requests) // 2
    covered = [
        length <= high for length, high in zip(lengths[settled:], highs[settled:], strict=True)
    ]
    errors = [abs(y - q) for y, q in zip(lengths, medians, strict=True)]
    known = [error for error, flag in zip(errors, informed(requests), strict=True) if flag]
    return Accuracy(
        mae_informed=_mean(known) if known else None,
        mae=_mean(errors),
        pinball_50=_pinball(lengths, medians, 0.5),
        pinball_90=_pinball(lengths, highs, 0.9),
        coverage_90=_mean(covered),
        us_per_request=spent_s * 1e6,
        requests=len(requests),
    )


def informed(requests: Sequence[TraceRequest]) -> list[bool]:
    """Which requests came after one of the same user, or with a prefix that is not everyone's.

    Args:
        requests: by arrival.

    Returns:
        A flag for each.
    """
    uses = Counter(key for request in requests for key in request.features.prefix_hashes)
    seen: set[int] = set()
    flags = []
    for request in requests:
        features = request.features
        keys = {key for key in features.prefix_hashes if uses[key] < len(requests) / 2}
        if features.user:
            keys.add(features.user)
        flags.append(not keys.isdisjoint(seen))
        seen |= keys
    return flags


def hindsight(requests: Sequence[TraceRequest]) -> float | None:
    """The error of who knows of each context the median of all its lengths, also of later ones.

    Args:
        requests: of a trace that says what lengths were drawn from.

    Returns:
        Mean distance of the medians from the lengths in tokens; ``None`` without contexts.
    """
    groups: dict[Hashable, list[int]] = {}
    for request in requests:
        if request.context is not None:
            groups.setdefault(request.context, []).append(request.output_tokens)
    if not groups:
        return None
    errors = [abs(y - median(lengths)) for lengths in groups.values() for y in lengths]
    return _mean(errors)


def _pinball(lengths: list[int], quantiles: list[int], level: float) -> float:
    return _mean(
        [
            max(level * (y - q), (level - 1) * (y - q))
            for y, q in zip(lengths, quantiles, strict=True)
        ]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
