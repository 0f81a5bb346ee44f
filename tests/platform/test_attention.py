"""Our attention backend computes what ``torch_native`` computes, and writes where it may."""

import numpy as np
import pytest
import torch
from attention_batches import (
    LAYER,
    Batch,
    Lengths,
    Shape,
    assert_close,
    assert_equal_to_torch_native,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from econoserve.platform.attention import CpuAttentionBackend

FLOAT, BFLOAT = torch.float32, torch.bfloat16
# Each is compiled, in some seconds; the demo model's is the second.
SHAPES = (
    Shape(32, 4, FLOAT, FLOAT),
    Shape(64, 2, FLOAT, FLOAT),
    Shape(96, 1, FLOAT, FLOAT),
    Shape(128, 8, FLOAT, FLOAT),
    Shape(64, 4, BFLOAT, BFLOAT),
    Shape(32, 2, FLOAT, BFLOAT),
)
DEMO = SHAPES[1]
CHUNKS = (1, 2, 3, 4, 5, 8, 31, 32, 33, 63, 64, 65, 96, 100, 129)
"""Query tokens of a request: around the kernel's tiles of 32 queries and 64 keys."""
MOST_TOKENS = 6000
"""Context tokens of a random batch, about."""


def decode(total):
    total = np.asarray(total, np.int64)
    return Lengths(total, np.ones_like(total), ForwardMode.DECODE)


def extend(cached, new, mode=ForwardMode.EXTEND):
    new = np.asarray(new, np.int64)
    return Lengths(np.asarray(cached, np.int64) + new, new, mode)


@st.composite
def lengths(draw):
    count = draw(st.sampled_from((1, 2, 3, 5, 8, 17, 40, 128, 256)) | st.integers(1, 256))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    longest = max(1, min(300, 2 * MOST_TOKENS // count))
    context = rng.integers(1, longest + 1, count)
    kind = draw(st.sampled_from(("decode", "prompts", "chunks", "mixed")))
    if kind == "decode":
        return decode(context)
    if kind == "prompts":
        return extend(np.zeros(count), context)
    chunks = np.minimum(rng.choice(CHUNKS, count), longest)
    if kind == "chunks":
        return extend(np.where(rng.random(count) < 0.3, 0, context), chunks)
    return extend(context, np.where(rng.random(count) < 0.7, 1, chunks), ForwardMode.MIXED)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=15)
@given(
    lengths=lengths(),
    kv_heads=st.sampled_from((1, 2, 3)),
    spread=st.sampled_from((0.2, 1.0, 3.0)),
    strided=st.booleans(),
    threads=st.sampled_from((1, 2)),
    seed=st.integers(0, 1 << 32),
)
def test_any_batch_equals_torch_native(shape, lengths, kv_heads, spread, strided, threads, seed):
    torch.set_num_threads(threads)
    batch = Batch(lengths, shape, kv_heads, np.random.default_rng(seed), spread, strided)
    assert_equal_to_torch_native(batch)


def batch_of(lengths, shape=DEMO, **keywords):
    return Batch(lengths, shape, 2, np.random.default_rng(5), **keywords)


@pytest.mark.parametrize("new", CHUNKS)
def test_every_chunk_size_after_every_kind_of_prefix(new):
    cached = [0, 1, 31, 32, 63, 64, 65, 127]
    assert_equal_to_torch_native(batch_of(extend(cached, [new] * len(cached))))


@pytest.mark.parametrize("count", (1, 3, 4, 5, 64, 65, 255, 256))
def test_every_context_length_in_a_decode_batch(count):
    assert_equal_to_torch_native(batch_of(decode(np.arange(count) + 1)))


@pytest.mark.parametrize("spread", (0.0, 60.0))
def test_flat_and_very_sharp_attention(spread):
    for lengths in (decode([1, 7, 130, 200]), extend([0, 10, 100], [70, 33, 1])):
        batch = batch_of(lengths, spread=spread)
        output, _ = batch.run(CpuAttentionBackend)
        expected, _ = batch.run(TorchNativeAttnBackend)
        # Logits in the hundreds: their float32 rounding alone moves a weight by some 1e-4.
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_only_the_batch_own_slots_are_read_and_written(shape):
    for lengths in (decode([1, 5, 64, 201]), extend([0, 70, 3, 128], [65, 1, 33, 4])):
        batch = batch_of(lengths, shape)
        before = batch.pool()
        assert before.k_buffer[LAYER].isnan().any(dim=(1, 2)).sum() > len(batch.written)
        output, pool = batch.run(CpuAttentionBackend)
        assert output.isfinite().all()
        others = torch.ones(batch.slots + 1, dtype=torch.bool)
        others[batch.written] = False
        for old, new, given_ in (
            (before.k_buffer, pool.k_buffer, batch.k),
            (before.v_buffer, pool.v_buffer, batch.v),
        ):
            assert torch.equal(new[LAYER][batch.written], given_.to(shape.pool))
            for number, (left, right) in enumerate(zip(old, new, strict=True)):
                kept = others if number == LAYER else slice(None)
                assert torch.equal(left[kept].view(torch.int16), right[kept].view(torch.int16))


@pytest.mark.parametrize("mode", ("decode", "extend"))
def test_padding_tokens_yield_zeros_and_disturb_nothing(mode):
    lengths = decode([5, 40, 3]) if mode == "decode" else extend([0, 30], [40, 1])
    output = assert_equal_to_torch_native(batch_of(lengths, padding=5))
    assert len(output) == lengths.new.sum() + 5


def test_one_backend_serves_batch_after_batch_from_the_same_pool():
    batch = batch_of(extend([0, 50, 9], [40, 33, 1]))
    pool = batch.pool()
    backend = batch.backend(CpuAttentionBackend, pool)
    layer, forward_batch = batch.layer(), batch.forward_batch()
    expected, _ = batch.run(TorchNativeAttnBackend)
    backend.init_forward_metadata(forward_batch)
    first = backend.forward_extend(batch.q, batch.k, batch.v, layer, forward_batch)
    assert_close(first, expected)

    # The last token of each request again, as a decode step that finds its keys in the pool.
    forward_batch.forward_mode = ForwardMode.DECODE
    forward_batch.extend_seq_lens = None
    last = torch.tensor([39, 72, 73])
    backend.init_forward_metadata(forward_batch)
    again = backend.forward_decode(batch.q[last], None, None, layer, forward_batch)
    assert_close(again, expected[last])


FALLBACKS = {
    "a window": {"sliding_window_size": 16},
    "cross attention, by name": {"attn_type": AttentionType.DECODER_BIDIRECTIONAL},
    "float16": {},
}


@pytest.mark.parametrize("reason", FALLBACKS)
@pytest.mark.parametrize("mode", ("decode", "extend"))
def test_what_the_kernel_does_not_cover_is_torch_natives(reason, mode):
    lengths = decode([5, 40, 3]) if mode == "decode" else extend([0, 30], [40, 1])
    shape = Shape(64, 2, torch.float16, torch.float16) if reason == "float16" else DEMO
    batch = batch_of(lengths, shape)
    layer = batch.layer(**FALLBACKS[reason])
    output, pool = batch.run(CpuAttentionBackend, layer)
    expected, expected_pool = batch.run(TorchNativeAttnBackend, layer)
    assert torch.equal(output, expected)
    assert torch.equal(pool.k_buffer[LAYER][batch.written], batch.k)
    assert torch.equal(expected_pool.k_buffer[LAYER][batch.written], batch.k)


def test_a_head_size_that_is_no_multiple_of_8_is_torch_natives():
    batch = batch_of(decode([5, 40, 3]), Shape(20, 2, FLOAT, FLOAT))
    assert torch.equal(batch.run(CpuAttentionBackend)[0], batch.run(TorchNativeAttnBackend)[0])


def test_a_model_with_a_sliding_window_is_refused():
    batch = batch_of(decode([5]))
    with pytest.raises(ValueError, match=r"window 128\b.*--attention-backend torch_native"):
        batch.backend(CpuAttentionBackend, batch.pool(), sliding_window_size=128)
