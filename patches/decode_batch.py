"""Seam: requests that hold KV but do not run (parked GTs): resume them, end them, take their KV.

Upstream: ``Scheduler._build_hisparse_decode_batch`` shows how a decode batch is built from
requests that already hold KV; ``release_req`` and ``release_kv_cache`` give KV back. Changed:
lengths come from the KV that was committed, not from ``output_ids``, which lag by a step under
overlap scheduling, and the last token stays where the forward pass left it, in ``FutureMap``.
Why no public seam serves: upstream has no notion of a parked request. A public
``ScheduleBatch.from_prefilled(reqs)`` would make this module unnecessary.
"""

from typing import TYPE_CHECKING

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch, release_req
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

TARGETS: dict[str, dict[str, str]] = {
    "sglang.srt.managers.schedule_batch.ScheduleBatch": {
        "init_new": "e9f3ef069ad3c427a708efb9b51ec988879629f1e5ef8a93de683f99623f0477",
        "filter_batch": "17e9b543d3c8c16eba215f5324efe6fff0ee64fff46c4059a23229ed73ec0045",
        "merge_batch": "efcc96367ceacfa6fcac1b6684ea582145c276ef615b926b256adf76aaf8c751",
        "prepare_for_decode": "1690ff7deee18f0f8a4477dfe65f155714065e998da4d31a3e046bd1757d1ae2",
    },
    "sglang.srt.managers.schedule_batch": {
        "release_req": "e9a690b5c7084bb5f69496e1b8e200a75a05db87a7232dc66bdbb5feba112c43",
    },
    "sglang.srt.managers.schedule_batch.Req": {
        "reset_for_retract": "371e01019e07f2f4a018c32302429c0c797ad5f9b191bf17ce809857d59fdb0f",
        "update_finish_state": "e351e67cbe30acac2609289bef91fdb916ce007938dde40be2b1e53b56197a0d",
    },
    "sglang.srt.mem_cache.common": {
        "release_kv_cache": "90e19434d1fa8c220ddc6bf9349fcbf831e46de1310d92156887a113045435f9",
    },
    "sglang.srt.mem_cache.allocation": {
        "alloc_for_decode_default": "6d1d0b8ad6c7fd94a51fbbf2a379cfc48e098fe5035a714770e6954888131644",
    },
    "sglang.srt.managers.overlap_utils": {
        "resolve_forward_inputs": "961cfa7af7ccd2a67eb780f04c0fc80ad4ee8f59c3891073f9cc9adaea490850",
    },
    "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo": {
        "from_schedule_batch": "48352e06affec0436a3f074cccd020fc67b4ec8c66bba3f85b9a8c286221c44b",
    },
}


def build_decode_batch(scheduler: "Scheduler", reqs: list[Req]) -> ScheduleBatch:
    """Build a decode batch of requests whose prompt is in the KV cache.

    Args:
        scheduler: the scheduler that owns the pools.
        reqs: requests with a request row, at least one; none of them in another batch.

    Returns:
        A batch ready for ``merge_batch`` or ``prepare_for_decode``.
    """
    batch = ScheduleBatch.init_new(
        reqs=reqs,
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=scheduler.tree_cache,
        model_config=scheduler.model_config,
        enable_overlap=scheduler.enable_overlap,
        spec_algorithm=scheduler.spec_algorithm,
    )
    rows = torch.tensor([req.kv.req_pool_idx for req in reqs], dtype=torch.int64)
    lengths = torch.tensor([req.kv.kv_committed_len for req in reqs], dtype=torch.int64)
    batch.req_pool_indices_cpu = rows
    batch.req_pool_indices = rows.to(scheduler.device)
    batch.seq_lens_cpu = lengths
    batch.seq_lens = lengths.to(scheduler.device)
    batch.orig_seq_lens = lengths.to(torch.int32).to(scheduler.device)
    batch.seq_lens_sum = int(lengths.sum())
    batch.multimodal_inputs = [req.multimodal_inputs for req in reqs]
    if batch.return_logprob:
        batch.top_logprobs_nums = [req.logprob.top_logprobs_num for req in reqs]
        batch.token_ids_logprobs = [req.logprob.token_ids_logprob for req in reqs]
    batch.sampling_info = SamplingBatchInfo.from_schedule_batch(
        batch, scheduler.model_config.vocab_size
    )
    return batch


def release_for_recompute(scheduler: "Scheduler", req: Req) -> None:
    """Take a request's KV back; it can be queued and prefilled again.

    Args:
        scheduler: the scheduler that owns the pools.
        req: a request that holds KV and is in no batch any more.
    """
    release_req(
        req=req,
        remaing_req_count=0,
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=scheduler.tree_cache,
        hisparse_coordinator=None,
    )


def finish_parked(scheduler: "Scheduler", req: Req) -> None:
    """End a parked request that was aborted: free its KV and send its last output.

    Args:
        scheduler: the scheduler that owns the pools.
        req: a request with ``to_finish`` set, in no batch and with no result in flight.
    """
    req.update_finish_state(0)
    req.kv.retraction_backup = None
    if req.kv.holds_kv:
        release_kv_cache(req, scheduler.tree_cache, checkpoint=True)
    req.time_stats.set_completion_time()
    scheduler._maybe_clear_mm_inputs(ScheduleBatch(reqs=[req]))
    scheduler.output_streamer.stream_output([req], req.return_logprob)
