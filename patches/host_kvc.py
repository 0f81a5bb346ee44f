"""Seam: a request's KV moves to host memory and comes back into other slots.

Upstream: ``Req.offload_kv_cache`` and ``load_kv_cache`` do this for retracted requests where prefill
and decode are disaggregated. Changed: any request that is in no batch, on one machine; the token to
decode next is put where the forward pass looks for it. Why no public seam serves: upstream ties it
to disaggregation. ``release_req(offload_kv=True)`` for every mode would make this module
unnecessary.
"""

from typing import TYPE_CHECKING

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocation import alloc_token_slots

from econoserve.patches.decode_batch import release_for_recompute

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

TARGETS: dict[str, dict[str, str]] = {
    "sglang.srt.managers.schedule_batch.Req": {
        "offload_kv_cache": "58756a6939f8eb368862931f7aaa6533a73c07e03a2d2511d8f7ca6c4c96c033",
        "load_kv_cache": "70a47fe2caff96b90d6fcbb6f5cbc6c5774abbb143656e10b45f8026949ab23b",
    },
    "sglang.srt.mem_cache.memory_pool.ReqToTokenPool": {
        "alloc": "1f54a29c8518e64c38b1bdf78e21dfcfb3a175a87c8c4ad5d06bd2cb93384680",
    },
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool": {
        "get_kv_size_bytes": "d5db65b9504e4304f377b4d5ad19258ddc69a93d603136957a23bc4938905aa8",
        "get_cpu_copy": "caf39316fd43b4aed4a85280eca7ca9c746d7206f7bd33300689c15e1358e67c",
        "load_cpu_copy": "f5f261ee17063acb55029014587567025e29dec192153e62c874798c7fa06fef",
    },
    "sglang.srt.mem_cache.allocation": {
        "alloc_token_slots": "480fab57f51b7b0e9b44360096a0d055c774052ba35e766254c2118573b94488",
    },
}


def bytes_per_token(scheduler: "Scheduler") -> float:
    """Size of one token's KV.

    Args:
        scheduler: the scheduler that owns the pools.

    Returns:
        Bytes, on this rank.
    """
    size = scheduler.token_to_kv_pool_allocator.get_kvcache().get_kv_size_bytes()
    # Keys and values, or what stands for both of them (MLA).
    total = sum(size) if isinstance(size, tuple) else size
    return max(total, 1) / max(scheduler.max_total_num_tokens, 1)


def is_offloaded(req: Req) -> bool:
    """Whether a request's KV lies in host memory.

    Args:
        req: the request.

    Returns:
        ``True`` between ``offload`` and ``restore``.
    """
    return req.kv.retraction_backup is not None


def offload(scheduler: "Scheduler", req: Req) -> int | None:
    """Copy a request's KV to host memory and give its slots back.

    A token whose result is in flight is dropped and decoded again, as in upstream's retraction.

    Args:
        scheduler: the scheduler that owns the pools.
        req: a request that holds KV and is in no batch any more.

    Returns:
        Tokens dropped, 0 or 1. ``None`` where it cannot be done: no token of its response is known
        yet, or the KV of some that are known was never written; nothing has changed then.
    """
    dropped = req.kv.kv_committed_len - (req.seqlen - 1)
    rebuildable = req.input_embeds is None and not req.return_logprob
    if not req.output_ids or not rebuildable or dropped < 0:
        return None
    req.offload_kv_cache(scheduler.req_to_token_pool, scheduler.token_to_kv_pool_allocator)
    backup = req.kv.retraction_backup
    release_for_recompute(scheduler, req)
    req.kv.retraction_backup = backup
    return dropped


def restore(scheduler: "Scheduler", req: Req) -> None:
    """Bring a request's KV back; it can join a decode batch.

    Args:
        scheduler: the scheduler that owns the pools.
        req: an offloaded request; a request row and its slots are free or evictable.
    """
    tokens = req.seqlen - 1
    slots = alloc_token_slots(scheduler.tree_cache, tokens)
    scheduler.req_to_token_pool.alloc([req])
    row = req.kv.req_pool_idx
    scheduler.req_to_token_pool.write((row, slice(0, tokens)), slots.to(torch.int32))
    req.kv.kv_committed_len = req.kv.kv_allocated_len = tokens
    req.is_retracted = False
    if scheduler.enable_overlap:
        # The forward pass in flight may still write to slots that were given back.
        scheduler.schedule_stream.wait_stream(scheduler.forward_stream)
    req.load_kv_cache(scheduler.req_to_token_pool, scheduler.token_to_kv_pool_allocator)
    scheduler.future_map.output_tokens_buf[row] = req.output_ids[-1]


def discard(req: Req) -> None:
    """Drop the copy in host memory.

    Args:
        req: the request.
    """
    req.kv.retraction_backup = None
