"""What the instances of one phase have in common: a machine, a pipeline, and counted KVC."""

from dataclasses import dataclass

from econoserve.core.checks import check_least
from econoserve.sim.records import KvcUse, RequestRecord
from econoserve.sim.timing import IterationTime
from econoserve.workload.trace import TraceRequest

BLOCK_TOKENS = 16
"""Tokens of a block of KVC, as DistServe and vLLM have them by default."""


def blocks_of(tokens: int) -> int:
    """Blocks that hold tokens of a request.

    Args:
        tokens: how many.

    Returns:
        Whole blocks.
    """
    return -(-tokens // BLOCK_TOKENS)


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through both phases.

    While it runs in a batch of decodes, ``held`` and ``produced`` are those before it joined.

    Attributes:
        request: as it arrived; its true length only ends its response.
        record: what came of it.
        held: tokens of its KVC.
        produced: output tokens that are out.
        joined: number of the batch's first iteration that it runs in.
        ends: number of the iteration that produces its last token, if it runs on.
    """

    request: TraceRequest
    record: RequestRecord
    held: int
    produced: int = 0
    joined: int = 0
    ends: int = 0


@dataclass(frozen=True, slots=True)
class StageMachine:
    """An instance of one phase.

    Attributes:
        capacity_tokens: its KVC.
        time: how long a pass takes without a pipeline.
        stages: of its pipeline.
        max_running: most requests in a batch of decodes.
        move_s_per_token: time to move a token's KVC to host memory or back.
        link_s_per_token: time to fetch a token's KVC from another instance.
        overhead_s: time that scheduling adds to each iteration.

    Raises:
        ValueError: a value is out of range.
    """

    capacity_tokens: int
    time: IterationTime
    stages: int = 1
    max_running: int = 256
    move_s_per_token: float = 0.0
    link_s_per_token: float = 0.0
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        check_least(self, capacity_tokens=BLOCK_TOKENS, stages=1, max_running=1)
        check_least(self, move_s_per_token=0, link_s_per_token=0, overhead_s=0)

    @property
    def blocks(self) -> int:
        """Whole blocks of its KVC."""
        return self.capacity_tokens // BLOCK_TOKENS

    @property
    def room_tokens(self) -> int:
        """Tokens of a request that has all blocks."""
        return self.blocks * BLOCK_TOKENS


class Pipeline:
    """Stages that batches pass in their order; each has one batch at a time.

    Args:
        stages: how many.
    """

    def __init__(self, stages: int) -> None:
        self._free_s = [0.0] * stages

    @property
    def free_s(self) -> float:
        """When the first stage is free."""
        return self._free_s[0]

    def enter(self, now_s: float, stage_s: float, wait_s: float = 0.0) -> float:
        """Let a batch enter.

        Args:
            now_s: the time; the first stage is free.
            stage_s: what the batch takes in each stage.
            wait_s: what the first stage takes longer.

        Returns:
            When it leaves the last stage.
        """
        at_s = now_s + wait_s
        for number, free_s in enumerate(self._free_s):
            at_s = max(at_s, free_s) + stage_s
            self._free_s[number] = at_s
        return at_s


class Meter:
    """Counts how an instance's KVC is used.

    Args:
        capacity_tokens: its size.
        begin_s: when the run begins.

    Attributes:
        held: tokens that are held now.
        useful: those of them that are in a pass.
    """

    def __init__(self, capacity_tokens: int, begin_s: float) -> None:
        self.held = self.useful = 0
        self._capacity_tokens = capacity_tokens
        self._counted_s = begin_s
        self._held_s = self._useful_s = self._offered_s = 0.0

    @property
    def use(self) -> KvcUse:
        """How the KVC was used so far."""
        return KvcUse(self._held_s, self._useful_s, self._offered_s)

    def count(self, now_s: float) -> None:
        """Count the time up to now, in which nothing has changed.

        Args:
            now_s: the time.
        """
        elapsed_s, self._counted_s = now_s - self._counted_s, now_s
        self._held_s += self.held * elapsed_s
        self._useful_s += self.useful * elapsed_s
        self._offered_s += self._capacity_tokens * elapsed_s
