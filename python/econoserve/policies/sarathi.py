"""Sarathi-Serve (OSDI'24): stall-free batches of decodes and prompt chunks.

Every iteration has a budget of tokens, the chunk. All decodes go first, then the prompt that is
under way, then new ones in order of arrival, the last of them as far as the budget goes. A prompt
is admitted if the blocks of all of it are free above a watermark, and takes them at once. KVC
grows block by block; when no block is left, the request that came last is preempted, returns to
the front of the queue and is computed again.

Checked against microsoft/sarathi-serve 96f9911 and its branch osdi-sarathi-serve ceaa066
(sarathi/core/scheduler/sarathi_scheduler.py, sarathi/core/block_space_manager), and
microsoft/vidur 7d47513 (sarathi_replica_scheduler.py). Where this differs:

- The pool hands out tokens. Blocks are counted here: a request's last block is taken whole. A
  request that is alone may use the pool to its last token instead of preempting itself for ever.
- The prompt under way cannot be preempted here. The one before it gives way; the last that
  decodes keeps its KVC and waits for that prompt to end, which can then be preempted.
- Who gave way is admitted in the next iteration at the earliest. The original can admit it again
  in the same one, but only if the watermark is less than a block.
- The schedule of chunk sizes by prompt position, off by default there, is left out.
"""

from collections import deque
from dataclasses import dataclass

from econoserve.core.books import Phase, TaskState
from econoserve.core.paged import PagedPolicy, check_paged
from econoserve.core.types import IterationPlan, Preemption, View


@dataclass(frozen=True, slots=True)
class SarathiConfig:
    """The policy's constants; the defaults are Sarathi-Serve's.

    Attributes:
        capacity_tokens: size of the KVC.
        chunk_tokens: budget of an iteration, decode tokens included.
        block_tokens: tokens of a block.
        watermark_fraction: share of the blocks that an admission leaves free.
        max_seqs: most requests that hold KVC.

    Raises:
        ValueError: a value is out of range.
    """

    capacity_tokens: int
    chunk_tokens: int = 512
    block_tokens: int = 16
    watermark_fraction: float = 0.01
    max_seqs: int = 128

    def __post_init__(self) -> None:
        check_paged(
            {
                "chunk_tokens": self.chunk_tokens,
                "block_tokens": self.block_tokens,
                "max_seqs": self.max_seqs,
            },
            self.watermark_fraction,
        )


class Sarathi(PagedPolicy):
    """The policy; ``core.policy.Policy`` describes its methods.

    Args:
        config: its constants.
    """

    def __init__(self, config: SarathiConfig) -> None:
        self.config = config
        super().__init__(config.capacity_tokens, config.block_tokens, config.watermark_fraction)

    def plan(self, view: View) -> IterationPlan:
        """See ``Policy.plan``."""
        decoders = self.decoders()
        stay, preempt, free = self._decode(decoders, self.free_tokens(view))
        budget = self.config.chunk_tokens - len(stay)
        parts = self.unfinished_chunks(budget)
        if len(stay) == len(decoders):
            budget -= sum(tokens for _, tokens in parts)
            parts += self.new_chunks(view, free, budget, self.config.max_seqs)
        return IterationPlan(
            prefill=tuple(parts),
            resume=tuple(s.task.rid for s in stay if s.phase is Phase.READY),
            preempt=tuple(preempt),
        )

    def _decode(
        self, decoders: list[TaskState], free: int
    ) -> tuple[list[TaskState], list[tuple[str, Preemption]], int]:
        """Who decodes, who gives way, and what KVC is free then."""
        block = self.config.block_tokens
        left = deque(decoders)
        stay: list[TaskState] = []
        preempt: list[tuple[str, Preemption]] = []
        while left:
            state = left.popleft()
            while free < block and left:
                victim = left.pop()
                preempt.append((victim.task.rid, Preemption.RECOMPUTE))
                free += self.freed_tokens(victim)
            grows = self.grows(state)
            # Sarathi-Serve asks for a free block even where the last one still has room.
            if free < block and stay:
                preempt.append((state.task.rid, Preemption.RECOMPUTE))
                break
            if free < block and grows and self.books.prefilling:
                if state.phase is Phase.RUNNING:
                    preempt.append((state.task.rid, Preemption.PARK))
                break
            stay.append(state)
            free -= block if grows else 0
        return stay, preempt, free
