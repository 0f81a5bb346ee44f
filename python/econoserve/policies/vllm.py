"""vLLM as it was in 2023 (SOSP'23): paged KVC, prompts first, the last to come gives way.

An iteration computes whole prompts or decodes, never both. Prompts go first, in order of arrival,
if all blocks of the prompt are free above a watermark. Decoding requests grow block by block; when
no block is left, the request that came last is preempted, returns to the front of the queue and is
computed again, prompt and output. Where one was preempted, nobody is admitted.

Checked against vllm-project/vllm v0.2.0 (vllm/core/scheduler.py, vllm/core/block_manager.py) and
the re-implementations in microsoft/sarathi-serve 96f9911 and microsoft/vidur 7d47513. Where this
differs:

- The pool hands out tokens. Blocks are counted here: a request's last block is taken whole. A
  request that is alone may use the pool to its last token instead of preempting itself for ever.
- A preemption frees no prefix from the cache, which may stay in use. With prefix caching, what it
  frees is therefore understated: all cached tokens count as shared.
- v0.2.1 and v0.2.2 limited padding between prompts; the kernels here do not pad.
- A prompt longer than the budget runs alone; v0.2.0 refuses it.
- Swapping (of beam search) is left out: requests have one sequence.
- Decoding requests are parked while prompts are computed. Where the machine cannot park one, it
  decodes along.
"""

from dataclasses import dataclass

from econoserve.core.books import TaskState
from econoserve.core.checks import check_least, check_share
from econoserve.core.paged import PagedPolicy, unfinished_prompts
from econoserve.core.types import IterationPlan, Preemption, View


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """The policy's constants; the defaults are vLLM's.

    Attributes:
        capacity_tokens: size of the KVC.
        block_tokens: tokens of a block.
        watermark_fraction: share of the blocks that an admission leaves free.
        max_batch_tokens: most prompt tokens in one iteration; vLLM takes the model's longest
            context where that is more.
        max_seqs: most requests that hold KVC.

    Raises:
        ValueError: a value is out of range.
    """

    capacity_tokens: int
    block_tokens: int = 16
    watermark_fraction: float = 0.01
    max_batch_tokens: int = 2048
    max_seqs: int = 256

    def __post_init__(self) -> None:
        check_least(self, capacity_tokens=1, block_tokens=1, max_batch_tokens=1, max_seqs=1)
        check_share("watermark_fraction", self.watermark_fraction)


class Vllm(PagedPolicy):
    """The policy; ``core.policy.Policy`` describes its methods.

    Args:
        config: its constants.
    """

    def __init__(self, config: VllmConfig) -> None:
        self.config = config
        super().__init__(config.capacity_tokens, config.block_tokens, config.watermark_fraction)

    def plan(self, view: View) -> IterationPlan:
        """See ``Policy.plan``."""
        free = self.free_tokens(view)
        prompts = self._prompts(view, free)
        if not prompts:
            return self.decode(free).plan([])
        return IterationPlan(
            prefill=tuple(prompts),
            preempt=tuple((rid, Preemption.PARK) for rid in self.books.running),
        )

    def asked_tokens(self, state: TaskState) -> int:
        """See ``PagedPolicy``; vLLM asks for a block even where the last one still has room."""
        return self.block_tokens

    def _prompts(self, view: View, free: int) -> list[tuple[str, int]]:
        """Whole prompts, first those that the machine cut short; nobody passes another."""
        config, parts = self.config, unfinished_prompts(self.books)
        budget = config.max_batch_tokens - sum(tokens for _, tokens in parts)
        places = min(min(config.max_seqs, view.max_running) - self.holders, view.free_rows)
        free -= self.watermark_tokens
        for state in self.books.waiting:
            if places < 1:
                break
            cached = view.cached_prefix(state.task.rid)
            tokens = state.task.prompt_tokens - cached.tokens
            needed = self.in_blocks(state.task.prompt_tokens)
            needed -= cached.tokens - cached.evictable_tokens
            alone = not self.holders and not parts
            if needed > free and not alone:
                break
            if tokens > budget and parts:
                break
            parts.append((state.task.rid, tokens))
            free -= needed
            budget -= tokens
            places -= 1
        return parts
