"""Predict each request when it arrives, and learn when its response has ended: in trace time.

Owns the order of events and what is measured of the predictions.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median
from time import perf_counter

from benchmark.prediction.trace import TraceRequest
from econoserve.core.lengths import LengthPrediction
from econoserve.prediction.predictor import Predictor

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
        us_per_request: median time to predict and to learn.
        requests: how many.
    """

    mae: float
    pinball_50: float
    pinball_90: float
    coverage_90: float
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
            predictor.observe(ended.features, ended.output_tokens, True)
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
    return Accuracy(
        mae=_mean([abs(y - q) for y, q in zip(lengths, medians, strict=True)]),
        pinball_50=_pinball(lengths, medians, 0.5),
        pinball_90=_pinball(lengths, highs, 0.9),
        coverage_90=_mean(covered),
        us_per_request=spent_s * 1e6,
        requests=len(requests),
    )


def _pinball(lengths: list[int], quantiles: list[int], level: float) -> float:
    return _mean(
        [
            max(level * (y - q), (level - 1) * (y - q))
            for y, q in zip(lengths, quantiles, strict=True)
        ]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
