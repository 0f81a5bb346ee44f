"""vLLM V1, as it is today: one token budget for decodes and prompt chunks, running requests first.

Every iteration spends its budget on running requests in order of arrival (a decode takes one
token, the prompt that is under way as many as are left), then on new prompts, first come first
served; the last of them is cut where the budget ends. Each request gets the blocks that it needs
now. Where none is left, the request that came last is preempted, returns to the front of the queue
and is computed again; nobody is admitted then. A prompt is admitted only if all of it fits now.

Checked against vllm-project/vllm v0.33.0 (vllm/v1/core/sched/scheduler.py,
vllm/v1/core/kv_cache_manager.py, vllm/config/scheduler.py, vllm/engine/arg_utils.py). Where this
differs:

- The pool hands out tokens. Blocks are counted here: a request's last block is taken whole. A
  request that is alone may use the pool to its last token, where vLLM refuses longer contexts.
- The prompt under way cannot be preempted here, so it takes the blocks of all of it when it
  starts; vLLM takes them chunk by chunk. The request before it gives way in its place; the last
  that decodes keeps its KVC and waits for that prompt to end, which can then be preempted.
- One prompt may end an iteration unfinished, so ``long_prefill_token_threshold`` (off by default)
  is left out, as are priorities, speculative decoding and KV connectors.
"""

from dataclasses import dataclass

from econoserve.core.checks import check_least, check_share
from econoserve.core.paged import PagedPolicy
from econoserve.core.types import IterationPlan, View


@dataclass(frozen=True, slots=True)
class VllmV1Config:
    """The policy's constants; the defaults are those of vLLM's server.

    Attributes:
        capacity_tokens: size of the KVC.
        max_batch_tokens: budget of an iteration. vLLM: 2048; 8192 on an H100 or H200, 16384 from
            160 GiB of GPU memory on.
        max_seqs: most requests that hold KVC. vLLM: 256; 1024 on those GPUs.
        block_tokens: tokens of a block.
        watermark_fraction: share of the blocks that an admission leaves free.

    Raises:
        ValueError: a value is out of range.
    """

    capacity_tokens: int
    max_batch_tokens: int = 2048
    max_seqs: int = 256
    block_tokens: int = 16
    watermark_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_least(self, capacity_tokens=1, max_batch_tokens=1, max_seqs=1, block_tokens=1)
        check_share("watermark_fraction", self.watermark_fraction)


class VllmV1(PagedPolicy):
    """The policy; ``core.policy.Policy`` describes its methods.

    Args:
        config: its constants.
    """

    def __init__(self, config: VllmV1Config) -> None:
        self.config = config
        super().__init__(config.capacity_tokens, config.block_tokens, config.watermark_fraction)

    def plan(self, view: View) -> IterationPlan:
        """See ``Policy.plan``."""
        config = self.config
        # Everybody who holds KVC finds a token in the budget to decode.
        most_holders = min(config.max_seqs, config.max_batch_tokens)
        return self.decodes_and_chunks(view, config.max_batch_tokens, most_holders)
