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
- A preemption frees no prefix from the cache, which may stay in use. With prefix caching, what it
  frees is therefore understated: all cached tokens count as shared.
- The prompt under way cannot be preempted here. The one before it gives way; the last that
  decodes keeps its KVC and waits for that prompt to end, which can then be preempted.
- Who gave way is admitted in the next iteration at the earliest. The original can admit it again
  in the same one, but only if the watermark is less than a block.
- The schedule of chunk sizes by prompt position, off by default there, is left out.
"""

from dataclasses import dataclass

from econoserve.core.books import TaskState
from econoserve.core.checks import check_least, check_share
from econoserve.core.paged import PagedPolicy
from econoserve.core.types import IterationPlan, View


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
        check_least(self, capacity_tokens=1, chunk_tokens=1, block_tokens=1, max_seqs=1)
        check_share("watermark_fraction", self.watermark_fraction)


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
        return self.decodes_and_chunks(view, self.config.chunk_tokens, self.config.max_seqs)

    def asked_tokens(self, state: TaskState) -> int:
        """See ``PagedPolicy``; it asks for a block even where the last one still has room."""
        return self.block_tokens
