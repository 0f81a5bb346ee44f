"""Which replica gets a request.

A router sees what one in front of real servers sees: a request when it arrives, and its response
when that has ended. It never sees a length before, nor into a replica.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from econoserve.prediction.predictor import Predictor
from econoserve.prediction.request import RequestFeatures


class Router(Protocol):
    """Chooses a replica for each request. Deterministic in what it is told."""

    def choose(self, rid: str, features: RequestFeatures) -> int:
        """Choose a replica for a request that arrives now.

        Args:
            rid: its id.
            features: what is known of it.

        Returns:
            The replica's number.
        """

    def on_end(self, rid: str, output_tokens: int | None) -> None:
        """Record that a request has left its replica.

        Args:
            rid: its id.
            output_tokens: the length of its response; ``None`` if it was refused.
        """


class RoundRobin:
    """The router ``round-robin``: one after the other, whatever they have to do.

    Args:
        capacities_tokens: the KVC of each replica.
    """

    def __init__(self, capacities_tokens: Sequence[int]) -> None:
        self._count, self._next = len(capacities_tokens), 0

    def choose(self, rid: str, features: RequestFeatures) -> int:
        """See ``Router.choose``."""
        chosen, self._next = self._next, (self._next + 1) % self._count
        return chosen

    def on_end(self, rid: str, output_tokens: int | None) -> None:
        """See ``Router.on_end``; nothing depends on it."""


class LeastLoad:
    """The router ``least-load``: the replica with the fewest requests, the first one of equals.

    It counts requests that have not ended, running or waiting, as the method ``total_requests`` of
    SGLang 0.5.23's data-parallel controller does. vLLM's balancer counts waiting ones four times;
    a router in front of the servers does not see which wait. Tokens are not counted: a prompt says
    little of what its response will hold, which is what ``kvc-demand`` predicts.

    Args:
        capacities_tokens: the KVC of each replica.
    """

    def __init__(self, capacities_tokens: Sequence[int]) -> None:
        self._counts = [0] * len(capacities_tokens)
        self._places: dict[str, int] = {}

    def choose(self, rid: str, features: RequestFeatures) -> int:
        """See ``Router.choose``."""
        chosen = self._counts.index(min(self._counts))
        self._counts[chosen] += 1
        self._places[rid] = chosen
        return chosen

    def on_end(self, rid: str, output_tokens: int | None) -> None:
        """See ``Router.on_end``."""
        self._counts[self._places.pop(rid)] -= 1


class KvcDemand:
    """The router ``kvc-demand``, ours: the replica whose KVC is asked for least.

    A request asks for its prompt and its predicted response, from its arrival to its end. The
    replica with the least sum over its capacity is chosen, this request's own included; of equals
    the first one. It predicts and learns by itself, apart from the replicas' policies.

    Args:
        capacities_tokens: the KVC of each replica.
        predictor: new, of the router alone.
    """

    def __init__(self, capacities_tokens: Sequence[int], predictor: Predictor) -> None:
        self._capacities = tuple(capacities_tokens)
        self._demands = [0] * len(self._capacities)
        self._predictor = predictor
        self._places: dict[str, tuple[int, int, RequestFeatures]] = {}

    def choose(self, rid: str, features: RequestFeatures) -> int:
        """See ``Router.choose``."""
        # Whole tokens: sums of fractions would not come back to nought, and ties would not be ties.
        own = features.prompt_tokens + round(self._predictor.predict(features).mean_tokens)
        chosen = min(
            range(len(self._demands)),
            key=lambda number: (self._demands[number] + own) / self._capacities[number],
        )
        self._demands[chosen] += own
        self._places[rid] = chosen, own, features
        return chosen

    def on_end(self, rid: str, output_tokens: int | None) -> None:
        """See ``Router.on_end``."""
        chosen, own, features = self._places.pop(rid)
        self._demands[chosen] -= own
        if output_tokens is not None:
            self._predictor.observe(features, output_tokens, output_tokens < features.cap_tokens)


ROUTERS = ("round-robin", "least-load", "kvc-demand")
"""What ``make_router`` makes."""


def make_router(
    name: str, capacities_tokens: Sequence[int], new_predictor: Callable[[], Predictor]
) -> Router:
    """A new router.

    Args:
        name: one of ``ROUTERS``.
        capacities_tokens: the KVC of each replica.
        new_predictor: makes the predictor of a router that needs one.

    Returns:
        The router.

    Raises:
        ValueError: there is no such router.
    """
    if name == "round-robin":
        return RoundRobin(capacities_tokens)
    if name == "least-load":
        return LeastLoad(capacities_tokens)
    if name == "kvc-demand":
        return KvcDemand(capacities_tokens, new_predictor())
    raise ValueError(f"router {name!r}: choose one of {', '.join(ROUTERS)}")
