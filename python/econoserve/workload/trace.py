"""One request of a workload, as all readers give it."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace

from econoserve.core.types import Slo
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
        slo: its objectives.
        blocks: names of the prompt's full blocks, each standing for all of the prompt up to its
            end, so that prompts share the blocks whose names are equal; none where not known.
        block_tokens: size of a block.
    """

    arrival_s: float
    features: RequestFeatures
    output_tokens: int
    context: Hashable = None
    slo: Slo = field(default_factory=Slo)
    blocks: tuple[int, ...] = ()
    block_tokens: int = 16


def from_zero(requests: Iterable[TraceRequest]) -> list[TraceRequest]:
    """Requests by arrival, the first of them at 0 s.

    Args:
        requests: in any order; ties keep it.

    Returns:
        The requests.

    Raises:
        TraceError: there are none.
    """
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    if not ordered:
        raise TraceError("the trace has no requests: give one with a request or more")
    first_s = ordered[0].arrival_s
    return [replace(request, arrival_s=request.arrival_s - first_s) for request in ordered]


def within_context(
    requests: Iterable[TraceRequest], context_tokens: int, limit: int
) -> tuple[list[TraceRequest], int]:
    """The first requests that a model can serve, limited by its context.

    Prompts with responses that are longer than the context are left out, as the benchmarks of vLLM
    and DistServe do.

    Args:
        requests: of a trace.
        context_tokens: the model's longest context.
        limit: most requests.

    Returns:
        Those with prompt and response within the context, each with the rest of the context as
        its limit on output tokens, if it was not limited to less; and how many were left out
        between them.
    """
    fitting: list[TraceRequest] = []
    left_out = 0
    for request in requests:
        if len(fitting) == limit:
            break
        room = context_tokens - request.features.prompt_tokens
        if request.output_tokens > room:
            left_out += 1
            continue
        cap_tokens = min(request.features.cap_tokens, room)
        features = replace(request.features, cap_tokens=cap_tokens)
        fitting.append(replace(request, features=features))
    return fitting, left_out
