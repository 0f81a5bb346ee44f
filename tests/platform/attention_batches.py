"""Random batches over a KV pool of SGLang's own, and the two attention backends that compute them.

A batch's requests share a prefix here and there, and lie scattered over the pool. Everything that
belongs to no request is NaN, in the pool, and a wrong slot, in the table.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_parallel

from econoserve.platform.attention import CpuAttentionBackend

LAYER = 1
LAYERS = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """What the kernel is compiled for."""

    head_dim: int
    group: int
    query: torch.dtype
    pool: torch.dtype


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of each request: all of its context, and those computed in this batch at its end."""

    total: np.ndarray
    new: np.ndarray
    mode: ForwardMode


class Batch:
    """One forward pass of one layer.

    Args:
        lengths: of the requests.
        shape: of the layer.
        kv_heads: heads of keys and values.
        rng: numpy generator that everything else is drawn from.
        spread: standard deviation of the logits, about.
        strided: whether queries, keys and values are columns of one matrix.
        padding: query tokens after those of the requests.
    """

    def __init__(self, lengths, shape, kv_heads, rng, spread=1.0, strided=False, padding=0):
        self.lengths, self.shape, self.kv_heads = lengths, shape, kv_heads
        total, new = lengths.total, lengths.new
        cached = total - new
        common = rng.integers(0, cached.max() + 1) if len(total) > 1 else 0
        # How much of the common prefix each request has; only cached tokens can be shared.
        shared = np.where(rng.random(len(total)) < 0.5, np.minimum(cached, common), 0)
        used = int(common + (total - shared).sum())
        self.slots = used + int(rng.integers(1, 40))
        free = rng.permutation(np.arange(1, self.slots + 1))
        prefix, free = free[:common], free[common:]

        rows = len(total) + int(rng.integers(1, 5))
        self.rows = rng.permutation(np.arange(1, rows))[: len(total)]
        self.table = np.full((rows, int(total.max()) + 3), free[-1], np.int32)
        written, taken = [], 0
        for row, length, fresh, hit in zip(self.rows, total, new, shared, strict=True):
            own = free[taken : taken + length - hit]
            taken += length - hit
            self.table[row, :length] = np.concatenate((prefix[:hit], own))
            written.append(own[length - hit - fresh :])
        self.written = torch.from_numpy(np.concatenate(written)).long()

        generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
        known = np.concatenate(
            [self.table[row, :n] for row, n in zip(self.rows, cached, strict=True)]
        )
        self.known = torch.from_numpy(np.unique(known)).long()
        shape_of_one = (kv_heads, shape.head_dim)
        self.contents = [
            torch.randn((len(self.known), *shape_of_one), generator=generator) for _ in range(2)
        ]

        heads = kv_heads * shape.group
        widths = [heads * shape.head_dim, kv_heads * shape.head_dim, kv_heads * shape.head_dim]
        qkv = torch.randn((int(new.sum()) + padding, sum(widths)), generator=generator)
        qkv[:, : widths[0]] *= spread
        parts = qkv.to(shape.query).split(widths, dim=1)
        if not strided:
            parts = [part.contiguous() for part in parts]
        self.q = parts[0]
        self.k, self.v = (part[: int(new.sum())].unflatten(1, shape_of_one) for part in parts[1:])

    def forward_batch(self):
        """What SGLang's ``ForwardBatch`` says of the batch."""
        new = torch.from_numpy(self.lengths.new)
        return SimpleNamespace(
            forward_mode=self.lengths.mode,
            batch_size=len(self.lengths.total),
            req_pool_indices=torch.from_numpy(self.rows),
            seq_lens=torch.from_numpy(self.lengths.total),
            extend_seq_lens=None if self.lengths.mode.is_decode() else new.int(),
            extend_prefix_lens=torch.from_numpy(self.lengths.total - self.lengths.new).int(),
            out_cache_loc=self.written,
            encoder_lens=None,
        )

    def pool(self):
        """A pool that holds the cached tokens, and NaN in every other slot."""
        pool = MHATokenToKVPool(
            self.slots,
            1,
            self.shape.pool,
            self.kv_heads,
            self.shape.head_dim,
            LAYERS,
            "cpu",
            False,
        )
        for buffers, contents in zip((pool.k_buffer, pool.v_buffer), self.contents, strict=True):
            for buffer in buffers:
                buffer.fill_(torch.nan)
            buffers[LAYER][self.known] = contents.to(self.shape.pool)
        return pool

    def model_runner(self, pool):
        """What an attention backend reads of SGLang's model runner."""
        return SimpleNamespace(
            device="cpu",
            req_to_token_pool=SimpleNamespace(req_to_token=torch.from_numpy(self.table)),
            token_to_kv_pool=pool,
            sliding_window_size=None,
            decode_cuda_graph_runner="none of ours",
            model_config=SimpleNamespace(
                dtype=self.shape.query,
                head_dim=self.shape.head_dim,
                num_attention_heads=self.kv_heads * self.shape.group,
                get_num_kv_heads=lambda ranks: self.kv_heads,
            ),
        )

    def backend(self, backend_class, pool, **keywords):
        """A backend that serves this batch's layer from a pool, on one rank."""
        model_runner = self.model_runner(pool)
        vars(model_runner).update(keywords)
        with get_parallel().override(attn_tp_size=1):
            return backend_class(model_runner)

    def layer(self, **keywords):
        """SGLang's layer."""
        return RadixAttention(
            self.kv_heads * self.shape.group,
            self.shape.head_dim,
            self.shape.head_dim**-0.5,
            self.kv_heads,
            LAYER,
            **keywords,
        )

    def run(self, backend_class, layer=None, q=None):
        """Compute the layer with a backend on a pool of its own.

        Returns:
            The output, and the pool afterwards.
        """
        pool = self.pool()
        backend = self.backend(backend_class, pool)
        forward_batch = self.forward_batch()
        backend.init_forward_metadata(forward_batch)
        decode = self.lengths.mode.is_decode()
        forward = backend.forward_decode if decode else backend.forward_extend
        output = forward(
            self.q if q is None else q, self.k, self.v, layer or self.layer(), forward_batch
        )
        return output, pool


def assert_equal_to_torch_native(batch):
    """Our output is torch_native's, and nothing but the batch's own slots was written."""
    output, pool = batch.run(CpuAttentionBackend)
    tokens = int(batch.lengths.new.sum())
    # The same stored keys and values, multiplied in float32.
    expected, expected_pool = batch.run(TorchNativeAttnBackend, q=batch.q[:tokens].float())
    assert output.dtype == batch.shape.query
    assert output[:tokens].isfinite().all()
    assert_close(output[:tokens], expected)
    assert not output[tokens:].any()
    assert_same_bits(pool, expected_pool)
    return output


def assert_close(output, expected):
    """Equal up to float32 sums, rounded once to the output's element type."""
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}[output.dtype]
    most = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(
        output.float().flatten(), expected.float().flatten(), rtol=rounding, atol=most
    )


def assert_same_bits(pool, other):
    """Two pools hold the same, NaN where the other has the same NaN."""
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[pool.dtype]
    for ours, theirs in ((pool.k_buffer, other.k_buffer), (pool.v_buffer, other.v_buffer)):
        for left, right in zip(ours, theirs, strict=True):
            assert torch.equal(left.view(integers), right.view(integers))
