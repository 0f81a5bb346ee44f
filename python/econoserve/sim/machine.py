"""What an instance runs on.

Owns no state: a machine is a description.
"""

from dataclasses import dataclass
from enum import Enum

from econoserve.core.checks import check_least
from econoserve.sim.prefix import PrefixCaching
from econoserve.sim.timing import IterationTime


class Results(Enum):
    """When the scheduler knows of an iteration's end and of who arrived during it."""

    AT_ONCE = "at-once"
    """When it plans the next one."""
    LATE = "late"
    """When it plans the one after that: it plans while the GPU computes, as vLLM and SGLang do."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What an instance has.

    Attributes:
        capacity_tokens: size of the KVC.
        time: how long iterations take.
        move_s_per_token: time to move a token's KVC to host memory or back; the iteration waits.
        max_running: most requests in a batch.
        rows: most requests that hold KVC.
        overhead_s: time that scheduling adds to each iteration.
        caching: what its prefix cache keeps.
        results: when the scheduler knows of them.

    Raises:
        ValueError: a value is out of range.
    """

    capacity_tokens: int
    time: IterationTime
    move_s_per_token: float = 0.0
    max_running: int = 256
    rows: int = 4096
    overhead_s: float = 0.0
    caching: PrefixCaching = PrefixCaching.OFF
    results: Results = Results.AT_ONCE

    def __post_init__(self) -> None:
        check_least(self, capacity_tokens=1, max_running=1, rows=1)
        check_least(self, move_s_per_token=0, overhead_s=0)
