"""One request of a trace, as all readers give it."""

from collections.abc import Hashable
from dataclasses import dataclass

from econoserve.prediction.request import RequestFeatures

CAP_TOKENS = 32_768
"""Limit on output tokens of every request: traces do not say, and it must not tell the length."""


class TraceError(ValueError):
    """A trace that cannot be used."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        arrival_s: from the trace's begin.
        features: what a server sees.
        output_tokens: the length of its response.
        context: what its length was drawn from, where that is known. No predictor sees it.
    """

    arrival_s: float
    features: RequestFeatures
    output_tokens: int
    context: Hashable = None
