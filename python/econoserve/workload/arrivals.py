"""When requests arrive: their own time stamps, scaled, or a process that is drawn.

Owns the drawing of times; the order and the lengths of requests stay as they are.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from econoserve.workload.trace import TraceError, TraceRequest


def scaled(requests: Sequence[TraceRequest], rate_rps: float) -> list[TraceRequest]:
    """The trace's own times, stretched or compressed to a mean rate; bursts stay bursts.

    Args:
        requests: by arrival.
        rate_rps: mean arrivals per second, more than 0.

    Returns:
        The requests with their new times, the first at 0 s.

    Raises:
        TraceError: all arrive at the same time, as where a file has no times.
        ValueError: the rate is not more than 0.
    """
    _check_rate(rate_rps)
    span_s = requests[-1].arrival_s - requests[0].arrival_s if requests else 0.0
    if len(requests) > 1 and span_s <= 0:
        raise TraceError(
            "the trace has no times of arrival to scale: draw them (--arrivals poisson)"
        )
    factor = (len(requests) - 1) / rate_rps / span_s if span_s else 0.0
    first_s = requests[0].arrival_s if requests else 0.0
    return [replace(r, arrival_s=(r.arrival_s - first_s) * factor) for r in requests]


def poisson(requests: Sequence[TraceRequest], rate_rps: float, seed: int) -> list[TraceRequest]:
    """Independent arrivals: exponential times between them.

    Args:
        requests: in their order.
        rate_rps: mean arrivals per second, more than 0.
        seed: of the times.

    Returns:
        The requests with their new times.

    Raises:
        ValueError: the rate is not more than 0.
    """
    return gamma(requests, rate_rps, 1.0, seed)


def gamma(
    requests: Sequence[TraceRequest], rate_rps: float, cv: float, seed: int
) -> list[TraceRequest]:
    """Gamma distributed times between arrivals: bursts above a variation of 1, regular below.

    Args:
        requests: in their order.
        rate_rps: mean arrivals per second, more than 0.
        cv: coefficient of variation of the times between arrivals, more than 0; 1 is Poisson.
        seed: of the times.

    Returns:
        The requests with their new times.

    Raises:
        ValueError: the rate or the variation is not more than 0.
    """
    _check_rate(rate_rps)
    if not 0 < cv < float("inf"):
        raise ValueError(f"cv={cv}: give a coefficient of variation above 0")
    shape = 1.0 / cv**2
    gaps_s = np.random.default_rng(seed).gamma(shape, 1.0 / (shape * rate_rps), len(requests))
    times_s = np.cumsum(gaps_s).tolist()
    return [replace(r, arrival_s=at_s) for r, at_s in zip(requests, times_s, strict=True)]


def _check_rate(rate_rps: float) -> None:
    if not 0 < rate_rps < float("inf"):
        raise ValueError(f"rate_rps={rate_rps}: give requests per second, more than 0")
