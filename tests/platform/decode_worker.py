"""Decode iterations recorded, repeated and computed without recordings, for ``test_decode``.

Run as a program in a process of its own, since SGLang's model runner is global:
``decode_worker.py OUTPUT.json MOST_REQUESTS``, the most to record.
"""

import json
import random
import sys
from array import array
from pathlib import Path

import torch
from sglang.benchmark.one_batch import load_model
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs

from econoserve import demo_model
from econoserve.platform import decode, recorded
from econoserve.platform.recording import NotRecordable

SIZES = (3, 1, 2, 5, 7, 8, 4, 37, 33, 40, 64, 65)
"""Numbers of requests; between two that are recorded alike lies another."""
STEPS = 3


def model_runner():
    """SGLang's, on the demo model."""
    load_plugins()
    server_args = ServerArgs(
        model_path=str(demo_model.ensure()),
        device="cpu",
        dtype="float32",
        max_total_tokens=6000,
        max_running_requests=70,
        log_level="warning",
    )
    ranks = SpawnRanks(world_rank=spawn_world_rank(server_args, tp_rank=0, pp_rank=0), gpu_id=0)
    publish(server_args, role="scheduler", ranks=ranks)
    runner, _ = load_model(server_args, PortArgs.init_new(server_args), 0, 0)
    return runner


def prompts(count, rng, least=1):
    requests = []
    for number in range(count):
        ids = array("q", [rng.randrange(5, 4000) for _ in range(rng.randrange(least, 80))])
        request = Req(str(number), "", ids, SamplingParams(temperature=0, max_new_tokens=9))
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len = -1
        request.extend_end = len(ids)
        requests.append(request)
    return requests


def main():
    decode.MOST_REQUESTS = int(sys.argv[2])
    wrapper = model_runner()
    runner = wrapper.torch_runner
    pool = runner.token_to_kv_pool
    buffers = [*pool.k_buffer, *pool.v_buffer]
    rng = random.Random(2)
    rows = []

    def run(case, size):
        wrapper.clear()
        for buffer in buffers:
            buffer.fill_(torch.nan)
        ids, _, batch = wrapper.extend(prompts(size, rng))
        for _ in range(STEPS):
            row, ids = compare(runner, batch, ids, buffers)
            rows.append({"case": case, "size": size, **row})

    for size in SIZES:
        run("usual", size)
    only_logits = decode._only_logits
    decode._only_logits = refuse
    run("not recordable", 12)
    decode._only_logits = only_logits
    recorded.MEMORY_BYTES = 0
    run("no memory", 16)
    run("no memory", 7)
    Path(sys.argv[1]).write_text(json.dumps(rows))


def refuse(output):
    raise NotRecordable("for the test")


@torch.no_grad()
def compare(runner, batch: ScheduleBatch, ids, buffers):
    """One decode iteration, computed in every way."""
    batch.input_ids = ids.to(torch.int64)
    batch.prepare_for_decode()
    forward_batch = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
    before = [buffer.clone() for buffer in buffers]

    def logits():
        output = runner.forward(forward_batch)
        return output.logits_output.next_token_logits.clone(), output.can_run_graph

    recordings = runner.decode_cuda_graph_runner
    known = len(recordings._recorded) if recordings else 0
    first, recorded = logits()
    again, _ = logits()
    written = {
        int(slot)
        for old, new in zip(before, buffers, strict=True)
        for slot in (old.view(torch.int32) != new.view(torch.int32)).any(dim=(1, 2)).nonzero()
    }
    runner.decode_cuda_graph_runner._enabled = False
    eager, eager_recorded = logits()
    ours = runner.attn_backend
    runner.attn_backend = TorchNativeAttnBackend(runner)
    native, _ = logits()
    runner.attn_backend = ours
    runner.decode_cuda_graph_runner._enabled = True
    row = {
        "recorded": recorded,
        "new": len(runner.decode_cuda_graph_runner._recorded) > known,
        "eager_recorded": eager_recorded,
        "requests": len(first),
        "finite": bool(first.isfinite().all()),
        "spread": float(first.std()),
        "repeated": float((again - first).abs().max()),
        "without": float((eager - first).abs().max()),
        "native": float((native - first).abs().max()),
        "foreign_slots": sorted(written - {0, *forward_batch.out_cache_loc.tolist()}),
        "unwritten": sorted(set(forward_batch.out_cache_loc.tolist()) - written),
    }
    return row, first.argmax(dim=1)


if __name__ == "__main__":
    main()
