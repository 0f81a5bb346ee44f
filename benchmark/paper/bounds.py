"""How much capacity can be had at most by giving up the heaviest tenth of the requests.

A share of 90 % that meets its SLO leaves a tenth that does not. Where the KVC is what limits, the
rate that a machine can serve is in inverse proportion to the mean demand of KVC-time of those that
are served. So no policy that uses the KVC no better than another gains more than these ratios.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from econoserve.workload.trace import TraceRequest


@dataclass(frozen=True, slots=True)
class Bounds:
    """Ratios of the whole demand to that without a tenth of the requests.

    Attributes:
        lengths: the tenth with the greatest demand is given up: needs all lengths beforehand.
        prompts: the tenth with the longest prompts is given up: what any server can see.
    """

    lengths: float
    prompts: float


def demand(request: TraceRequest) -> int:
    """KVC-time of a request: tokens held, summed over the iterations of its life.

    Args:
        request: the request.

    Returns:
        Prompt x output + output x (output - 1) / 2.
    """
    output = request.output_tokens
    return request.features.prompt_tokens * output + output * (output - 1) // 2


def bounds(requests: Sequence[TraceRequest], attain: float = 0.9) -> Bounds:
    """What giving up requests is worth.

    Args:
        requests: of a workload, at least one.
        attain: share that has to be served.

    Returns:
        The ratios, 1 or more.
    """
    total = sum(map(demand, requests))
    served = len(requests) - int((1 - attain) * len(requests) + 1e-9)

    def ratio(weight: Callable[[TraceRequest], float]) -> float:
        kept = sorted(requests, key=weight)[:served]
        return total / sum(map(demand, kept))

    return Bounds(ratio(demand), ratio(lambda request: request.features.prompt_tokens))
