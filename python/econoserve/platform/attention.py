"""SGLang's attention backend of the CPU platform: every request of a batch in one kernel call.

Owns the translation from SGLang's ``ForwardBatch`` to the kernel's arrays, once per forward pass.
Layers that the kernel does not cover (cross attention, encoders, unusual head sizes or element
types) go to ``torch_native``, whose loops over requests cover everything.
"""

import gc
import logging
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.model_executor.runner import EagerRunner
from sglang.srt.runtime_context import get_parallel

from econoserve.platform import operators
from econoserve.platform.cpu import ATTENTION_BACKEND
from econoserve.platform.decode import DecodeRecordings
from econoserve.platform.kernels import ELEMENTS
from econoserve.platform.kernels.attention import attend
from econoserve.platform.kernels.attention import kernel as compile_attention
from econoserve.platform.kernels.batch import Batch, Pool, Shape
from econoserve.platform.prompts import PromptRecordings

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class CpuAttentionBackend(TorchNativeAttnBackend):
    """Batched causal attention over the token-level KV pool, for MHA and GQA.

    Args:
        model_runner: SGLang's model runner, its memory pools made.

    Raises:
        ValueError: if the model has sliding-window attention.
    """

    def __init__(self, model_runner: "ModelRunner") -> None:
        super().__init__(model_runner)
        window = getattr(model_runner, "sliding_window_size", None)
        if self.use_sliding_window_kv_pool or (window is not None and window > -1):
            raise ValueError(
                f"attention_backend={ATTENTION_BACKEND}: sliding-window attention "
                f"(window {window}) is not supported; use --attention-backend torch_native"
            )
        self._model_runner = model_runner
        self._batch: Batch | None = None
        self._pools: dict[int, Pool | None] = {}
        self._reasons: set[str] = set()
        self._table = self.req_to_token_pool.req_to_token
        self._started = False
        self._compile(model_runner)

    def _compile(self, model_runner: "ModelRunner") -> None:
        """Compile the kernels before the first request needs them."""
        model = model_runner.model_config
        if model.dtype not in ELEMENTS:
            return
        start_s = time.perf_counter()
        operators.compile_all(model.dtype)
        if self.token_to_kv_pool.dtype not in ELEMENTS:
            return
        ranks = get_parallel().attn_tp_size
        heads = model.num_attention_heads // ranks
        compile_attention(
            Shape(
                model.head_dim,
                heads // model.get_num_kv_heads(ranks),
                ELEMENTS[model.dtype],
                ELEMENTS[self.token_to_kv_pool.dtype],
            )
        )
        took_s = time.perf_counter() - start_s
        if took_s > 2:
            logger.info("compiled the CPU kernels in %.0f s; the next start finds them", took_s)

    def _complete(self) -> None:
        """What can only be done when the model runner is complete: at the first forward pass."""
        runner = self._model_runner
        if runner.decode_cuda_graph_runner is None and runner.attn_backend is self:
            # Upstream builds graph runners on a CPU only with --enable-torch-compile.
            runner.decode_cuda_graph_runner = DecodeRecordings(runner, self)
            if isinstance(runner.prefill_cuda_graph_runner, EagerRunner | None):
                runner.prefill_cuda_graph_runner = PromptRecordings(runner, self)
        if self._started:
            return
        self._started = True
        # Modules and classes stay: without this a full garbage collection walks over all of them
        # and stops the server for half a second now and then.
        gc.collect()
        gc.freeze()

    def init_forward_metadata(self, forward_batch: "ForwardBatch") -> None:
        """Cut the batch into work items, for all layers.

        Args:
            forward_batch: what this forward pass computes.
        """
        super().init_forward_metadata(forward_batch)
        if operators.enabled():
            self._complete()
        if forward_batch.forward_mode.is_idle():
            self._batch = None
            return
        queries = None
        if not forward_batch.forward_mode.is_decode():
            queries = _int64(forward_batch.extend_seq_lens)
        self._batch = Batch.of(
            _int64(forward_batch.req_pool_indices), _int64(forward_batch.seq_lens), queries
        )

    def use(self, batch: Batch) -> None:
        """Attend to a batch whose work items are known.

        Args:
            batch: stands for all layers until the next batch.
        """
        self._batch = batch

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: "RadixAttention",
        forward_batch: "ForwardBatch",
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attention of prompts and, in mixed batches, of decodes; see the base class."""
        out = self._forward(q, k, v, layer, forward_batch, save_kv_cache)
        if out is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return out

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: "RadixAttention",
        forward_batch: "ForwardBatch",
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attention of one query token per request; see the base class."""
        out = self._forward(q, k, v, layer, forward_batch, save_kv_cache)
        if out is None:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return out

    def _forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: "RadixAttention",
        forward_batch: "ForwardBatch",
        save_kv_cache: bool,
    ) -> torch.Tensor | None:
        """The layer's attention, or None if ``torch_native`` has to compute it."""
        pool = self._pool(layer)
        batch = self._batch
        if pool is None or batch is None or q.dtype not in ELEMENTS:
            return None
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(
                layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v
            )
        width = layer.tp_q_head_num * layer.qk_head_dim
        q = q.reshape(-1, width)
        if q.stride(1) != 1:
            q = q.contiguous()
        if q.shape[0] < batch.offsets[-1]:
            raise ValueError(
                f"q has {q.shape[0]} tokens, the batch {batch.offsets[-1]}: its metadata are of "
                "another forward pass"
            )
        if q.shape[0] == batch.offsets[-1]:
            out = torch.empty(q.shape, dtype=q.dtype)
        else:  # padding tokens belong to no request
            out = torch.zeros(q.shape, dtype=q.dtype)
        shape = Shape(
            layer.qk_head_dim,
            layer.tp_q_head_num // layer.tp_k_head_num,
            ELEMENTS[q.dtype],
            ELEMENTS[self.token_to_kv_pool.dtype],
        )
        few = batch.least_items < 2 * torch.get_num_threads()
        attend(
            shape,
            pool,
            batch,
            q.data_ptr(),
            q.stride(0),
            out.data_ptr(),
            layer.scaling,
            pool.kv_heads if few and torch.get_num_threads() > 1 else 1,
        )
        return out

    def _pool(self, layer: "RadixAttention") -> Pool | None:
        """Where the layer's KV cache lies, or None if the kernel cannot serve the layer."""
        if layer.layer_id not in self._pools:
            self._pools[layer.layer_id] = self._find_pool(layer)
        return self._pools[layer.layer_id]

    def _find_pool(self, layer: "RadixAttention") -> Pool | None:
        reason = self._unsupported(layer)
        if reason is None:
            keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
            values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
            if keys.is_contiguous() and values.is_contiguous() and self._table.is_contiguous():
                return Pool(
                    keys=keys.data_ptr(),
                    values=values.data_ptr(),
                    slots=keys.shape[0],
                    kv_heads=layer.tp_k_head_num,
                    table=self._table.data_ptr(),
                    table_stride=self._table.shape[1],
                    table_rows=self._table.shape[0],
                )
            reason = "its KV cache is not contiguous"
        if reason not in self._reasons:
            self._reasons.add(reason)
            logger.warning(
                "layer %d and others like it: %s; torch_native computes them",
                layer.layer_id,
                reason,
            )
        return None

    def _unsupported(self, layer: "RadixAttention") -> str | None:
        """Why the kernel cannot serve a layer, or None."""
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
            return "its attention is not causal self-attention"
        if layer.sliding_window_size is not None and layer.sliding_window_size > -1:
            return f"sliding_window_size={layer.sliding_window_size}"
        if layer.qk_head_dim != layer.v_head_dim:
            return f"head sizes of keys and values differ ({layer.qk_head_dim}, {layer.v_head_dim})"
        if layer.qk_head_dim % 8 or layer.qk_head_dim > 256:
            return f"head size {layer.qk_head_dim} is not a multiple of 8 up to 256"
        if type(self.token_to_kv_pool) is not MHATokenToKVPool:
            return f"KV pool {type(self.token_to_kv_pool).__name__}"
        if self.token_to_kv_pool.dtype not in ELEMENTS:
            return f"KV cache of {self.token_to_kv_pool.dtype}"
        if self._table.dtype != torch.int32:
            return f"table of slots of {self._table.dtype}"
        return None


def _int64(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy(), dtype=np.int64)


@register_attention_backend(ATTENTION_BACKEND)
def _create(model_runner: "ModelRunner") -> CpuAttentionBackend:
    return CpuAttentionBackend(model_runner)
