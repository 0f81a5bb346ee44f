"""Passes with prompts recorded, repeated and computed without recordings, for ``test_prompts``.

Run as a program in a process of its own, since SGLang's model runner is global:
``prompt_worker.py OUTPUT.json MOST_TOKENS``, the most to record.
"""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from decode_worker import model_runner, prompts
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)

from econoserve.platform import prompts as recordings
from econoserve.platform import recorded

PASSES = ((3, 0), (1, 0), (2, 5), (4, 3), (1, 6), (7, 1), (1, 0), (12, 0), (0, 12), (1, 11), (6, 6))
"""Requests with the end of their prompt, beside requests with a single token (decodes)."""
SAME_SIZE = ([1] * 11 + [5], [13], [2, 3, 1, 4, 4], [15], [1] * 14)
"""Tokens of each request in passes that share a recording: with more and fewer tokens and requests
than the one before."""
NO_ROOM = ([40, 30, 20], [40, 29, 20], [7])


def main():
    recordings.MOST_TOKENS = int(sys.argv[2])
    wrapper = model_runner()
    runner = wrapper.torch_runner
    rng = random.Random(3)
    rows = []

    def run(case, counts, changed=lambda batch: batch):
        wrapper.clear()
        batch = changed(ends(extended(wrapper, runner, len(counts), rng), counts))
        rows.append({"case": case, **compare(runner, batch)})

    def drawn(chunks, decodes):
        counts = [rng.randrange(2, 40) for _ in range(chunks)] + [1] * decodes
        return rng.sample(counts, len(counts))

    for chunks, decodes in PASSES:
        run("usual", drawn(chunks, decodes))
    for counts in SAME_SIZE:
        run("same size", counts)
    run(
        "hidden",
        drawn(2, 3),
        lambda one: replace(one, capture_hidden_mode=CaptureHiddenMode.LAST),
    )
    graphs = runner.prefill_cuda_graph_runner
    graphs._recorded.clear()
    recorded.MEMORY_BYTES = 0
    for counts in NO_ROOM:
        run("no room", counts)
    recorded.MEMORY_BYTES = 1 << 30
    graphs._least_refused = float("inf")
    runner.model.forward = with_a_step_behind(runner.model.forward)
    run("not recordable", drawn(2, 3))
    Path(sys.argv[1]).write_text(json.dumps(rows))


def with_a_step_behind(forward):
    """A model that does something after its logits processor."""
    return lambda *arguments, **keywords: replace(forward(*arguments, **keywords))


def extended(wrapper, runner, count, rng) -> ForwardBatch:
    """A pass with whole prompts, computed, so that their KV is there."""
    passes = []
    forward = runner.forward
    runner.forward = lambda batch: (passes.append(replace(batch)), forward(batch))[1]
    wrapper.extend(prompts(count, rng, 45))
    del runner.forward
    return passes[0]


def ends(whole: ForwardBatch, most: list[int]) -> ForwardBatch:
    """A pass that computes the last tokens of each prompt again, and at most so many."""
    lengths = whole.seq_lens.tolist()
    tokens = [min(pair) for pair in zip(lengths, most, strict=True)]
    starts = [length - count for length, count in zip(lengths, tokens, strict=True)]
    end = torch.cumsum(whole.seq_lens, 0).tolist()
    picked = torch.cat([torch.arange(e - count, e) for e, count in zip(end, tokens, strict=True)])
    return replace(
        whole,
        forward_mode=ForwardMode.MIXED if 1 in tokens else ForwardMode.EXTEND,
        input_ids=whole.input_ids[picked],
        positions=whole.positions[picked],
        out_cache_loc=whole.out_cache_loc[picked],
        extend_num_tokens=sum(tokens),
        extend_seq_lens=torch.tensor(tokens, dtype=torch.int32),
        extend_prefix_lens=torch.tensor(starts, dtype=torch.int32),
        extend_seq_lens_cpu=tokens,
        extend_prefix_lens_cpu=starts,
        extend_start_loc=torch.cumsum(torch.tensor([0, *tokens[:-1]]), 0).to(torch.int32),
    )


@torch.no_grad()
def compare(runner, batch: ForwardBatch):
    """One pass, computed in every way."""
    graphs = runner.prefill_cuda_graph_runner
    buffers = [*runner.token_to_kv_pool.k_buffer, *runner.token_to_kv_pool.v_buffer]
    own = batch.out_cache_loc
    for buffer in buffers:
        buffer[own] = torch.nan
    before = [buffer.clone() for buffer in buffers]

    def logits():
        output = runner.forward(replace(batch))
        return output.logits_output.next_token_logits.clone(), output.can_run_graph

    known = set(graphs._recorded)
    first, was_recorded = logits()
    written = {
        int(slot)
        for old, new in zip(before, buffers, strict=True)
        for slot in (old.view(torch.int32) != new.view(torch.int32)).any(dim=(1, 2)).nonzero()
    }
    again, _ = logits()
    enabled, graphs._enabled = graphs._enabled, False
    eager, eager_recorded = logits()
    ours = runner.attn_backend
    runner.attn_backend = TorchNativeAttnBackend(runner)
    native, _ = logits()
    runner.attn_backend, graphs._enabled = ours, enabled
    return {
        "tokens": len(batch.input_ids),
        "recorded": was_recorded,
        "new": sorted(set(graphs._recorded) - known),
        "enabled": enabled,
        "refused": str(graphs._least_refused),
        "eager_recorded": eager_recorded,
        "requests": [len(first), batch.batch_size],
        "finite": bool(first.isfinite().all()),
        "spread": float(first.std()),
        "repeated": float((again - first).abs().max()),
        "without": float((eager - first).abs().max()),
        "native": float((native - first).abs().max()),
        "foreign_slots": sorted(written - {0, *own.tolist()}),
        "unwritten": sorted(set(own.tolist()) - written),
    }


if __name__ == "__main__":
    main()
