"""Whether all tensor-parallel ranks plan alike; one that does not would hang the others.

Owns the running digest of plans, when it is compared, and what the ranks must begin with alike.
"""

import zlib

import torch
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import broadcast_pyobj
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from econoserve.core.types import IterationPlan


class Agreement:
    """A digest of all plans so far.

    Args:
        every: plans between two comparisons; 0: never.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._plans = 0
        self._digest = 0

    def note(self, plan: IterationPlan | None) -> bool:
        """Take a plan into the digest.

        Args:
            plan: the plan, ``None`` where planning failed.

        Returns:
            Whether the digests are to be compared now.
        """
        if not self._every:
            return False
        decided = None
        if plan is not None:
            decided = (plan.prefill, plan.resume, plan.preempt, plan.reject, plan.demote)
            decided += (plan.pauses,)
        self._digest = zlib.crc32(repr(decided).encode(), self._digest)
        self._plans += 1
        return self._plans % self._every == 0

    def holds(self, group: ProcessGroup) -> bool:
        """Compare the digests of all ranks; every rank of the group must call it.

        Args:
            group: the ranks, with a CPU backend.

        Returns:
            Whether all are equal.
        """
        extremes = torch.tensor([self._digest, -self._digest], dtype=torch.int64)
        all_reduce(extremes, ReduceOp.MAX, group=group)
        return bool(extremes[0] == -extremes[1])


def first_ranks(content: bytes | None) -> bytes | None:
    """Make the first tensor-parallel rank's answer that of all.

    Args:
        content: this rank's answer.

    Returns:
        The first rank's.
    """
    group = get_parallel().tp_group
    if group.world_size == 1:
        return content
    told: list[bytes | None] = broadcast_pyobj(
        [content], group.rank, group.cpu_group, src=group.ranks[0]
    )
    return told[0]
