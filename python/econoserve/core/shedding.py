"""Who steps back in an overload, so that as many as possible keep their SLO.

When more is asked than the machine can do, somebody misses the SLO. Requests differ in what they
ask of the KVC by orders of magnitude, and any one of them counts as one. So those that ask most
step back first, as many as needed: they start only where KVC is left over, as do requests that lost
their SLO. (Trunk reservation, as in loss networks; the rule is ours, not the paper's.)
"""

from collections import deque
from dataclasses import dataclass

from sortedcontainers import SortedList

from econoserve.core.books import TaskState
from econoserve.core.checks import check_share

WINDOW = 512
"""Requests whose demand is remembered."""

MEMORY = 200.0
"""Arrivals after which a loss is forgotten, on the average."""


@dataclass(frozen=True, slots=True)
class SheddingConfig:
    """The constants; ours, not the paper's.

    Attributes:
        margin_fraction: share of the KVC that deferred requests leave free.
        step: by how much a lost SLO raises the share of requests that are deferred.
        most: the largest such share.

    Raises:
        ValueError: a value is out of range.
    """

    margin_fraction: float = 0.1
    step: float = 0.03
    most: float = 0.1

    def __post_init__(self) -> None:
        for name in ("margin_fraction", "step", "most"):
            check_share(name, getattr(self, name))


class Shedding:
    """Defers the requests that ask most, in so far as others lose their SLO.

    Args:
        config: the constants.
        capacity_tokens: size of the KVC.
    """

    def __init__(self, config: SheddingConfig, capacity_tokens: int) -> None:
        self.config = config
        self.margin_tokens = int(config.margin_fraction * capacity_tokens)
        self._share = 0.0
        self._recent: deque[float] = deque()
        self._sorted: SortedList = SortedList()

    def arrive(self, state: TaskState) -> None:
        """Decide whether a newcomer is deferred; what has generated tokens is none.

        Args:
            state: the task.
        """
        if state.task.generated_tokens:
            return
        demand = demand_of(state)
        self._recent.append(demand)
        self._sorted.add(demand)
        if len(self._recent) > WINDOW:
            self._sorted.remove(self._recent.popleft())
        self._share -= self._share / MEMORY
        rank = self._sorted.bisect_left(demand)
        state.deferred = rank >= (1 - self._share) * len(self._sorted)

    def lose(self, state: TaskState) -> None:
        """A request lost its SLO before it started.

        Args:
            state: the task.
        """
        if not state.deferred:
            self._share = min(self._share + self.config.step, self.config.most)


def demand_of(state: TaskState) -> float:
    """KVC that a request asks for, times the steps for which it does, as expected.

    Args:
        state: the task.

    Returns:
        p E[R] + E[R^2] / 2 for a prompt of p tokens and a response of R, in tokens times steps.
    """
    prediction = state.task.prediction
    mean = prediction.mean_tokens
    return state.task.prompt_tokens * mean + (mean * mean + prediction.variance_tokens2) / 2
