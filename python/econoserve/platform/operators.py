"""Puts the CPU kernels in the place of SGLang's small operators, on our platform only.

``BaseFusedOp.register_oot_forward`` is SGLang's seam for this. An operator that is configured in a
way that a kernel does not cover runs SGLang's own plain-torch version.
"""

import os

import torch
import torch.nn.functional as F
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.layers.rotary_embedding.base import (
    LinearScalingRotaryEmbedding,
    RotaryEmbedding,
)
from sglang.srt.layers.rotary_embedding.rope_variant import (
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
)
from sglang.srt.layers.rotary_embedding.yarn import YaRNScalingRotaryEmbedding

from econoserve.platform import packing
from econoserve.platform.kernels import ELEMENTS, elementwise
from econoserve.platform.kernels import linear as few_rows

ENVIRONMENT_VARIABLE = "ECONOSERVE_CPU_OPS"
"""``0`` leaves SGLang's own operators in place."""

_SMALL_WEIGHT = 1 << 20
"""Elements of a weight up to which its multiplications are compiled at start."""
_FEW_MULTIPLICATIONS = 1 << 20
"""Rows times weights up to which our kernel of a few rows beats oneDNN with a packed weight."""
_MOST_PROMPT_TOKENS = 512
_MOST_LAST_TOKENS = 64

_ROTARY_CLASSES = (
    RotaryEmbedding,
    LinearScalingRotaryEmbedding,
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)


def install(platform_key: str) -> None:
    """Register the operators for a platform, unless the environment says not to.

    Args:
        platform_key: the platform's dispatch key.
    """
    if not enabled():
        return
    BaseFusedOp.register_oot_forward(RMSNorm, _rms_norm, platform_key)
    BaseFusedOp.register_oot_forward(SiluAndMul, _silu_and_mul, platform_key)
    for rotary in _ROTARY_CLASSES:
        if rotary.forward_native is RotaryEmbedding.forward_native:
            BaseFusedOp.register_oot_forward(rotary, _rotate, platform_key)


def enabled() -> bool:
    """Whether this process runs our operators rather than SGLang's own plain-torch ones.

    Returns:
        False if the environment says ``ECONOSERVE_CPU_OPS=0``.
    """
    return os.environ.get(ENVIRONMENT_VARIABLE, "1") != "0"


def install_in(model: torch.nn.Module) -> None:
    """Give a loaded model's unquantised linear layers and output layer our kernel.

    Args:
        model: the model, its weights loaded; changed in place.
    """
    if not enabled():
        return
    plain_logits = _plain_logits(model)
    for module in model.modules():
        method = type(getattr(module, "quant_method", None))
        if method is UnquantizedLinearMethod:
            module.quant_method = CpuLinearMethod()
        elif method is UnquantizedEmbeddingMethod and plain_logits:
            module.quant_method = CpuEmbeddingMethod()
    packing.pack(model)


def meet_row_counts(model: torch.nn.Module) -> None:
    """Let oneDNN compile a small bfloat16 model's multiplications before requests wait for it.

    Larger weights are left out: there the compilation is short beside the multiplication.

    Args:
        model: the model after ``install_in``.
    """
    met = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if not isinstance(method, packing.MayBePacked):
            continue
        weight = module.weight
        if weight.dtype != torch.bfloat16 or weight.numel() > _SMALL_WEIGHT:
            continue
        bias = None if getattr(module, "skip_bias_add", False) else getattr(module, "bias", None)
        only_last_tokens = isinstance(method, CpuEmbeddingMethod)
        kind = (weight.shape, bias is not None, method.packed is not None, only_last_tokens)
        if kind in met:
            continue
        met.add(kind)
        most = _MOST_LAST_TOKENS if only_last_tokens else _MOST_PROMPT_TOKENS
        for rows in sorted({round_up(rows) for rows in range(1, most + 1)}):
            zeros = torch.zeros((rows, weight.shape[1]), dtype=weight.dtype)
            _linear_of_many(zeros, weight, bias, method.packed)


def compile_all(dtype: torch.dtype) -> None:
    """Compile our operators, or find them in Numba's cache on disk.

    Args:
        dtype: element type of the activations.
    """
    if not enabled():
        return
    source, target = torch.ones(64, dtype=dtype), torch.ones(64, dtype=dtype)
    position = torch.zeros(1, dtype=torch.int64)
    element, at, to = ELEMENTS[dtype], source.data_ptr(), target.data_ptr()
    few_rows.linear(element, 1, 8, 4, at, at, to)
    elementwise.rms_norm(element, 1, 8, at, 0, at, to, 1e-6)
    elementwise.silu_and_mul(element, 1, 8, at, to)
    elementwise.rotate(element, False, 1, position.data_ptr(), at, 1, 8, 8, ((to, 8, 1),))


def _plain_logits(model: torch.nn.Module) -> bool:
    """Whether SGLang computes logits in the weights' element type, as our output layer does."""
    return not any(
        processor.use_fp32_lm_head or processor.rl_on_policy_target is not None
        for processor in model.modules()
        if isinstance(processor, LogitsProcessor)
    )


class CpuLinearMethod(packing.MayBePacked, UnquantizedLinearMethod):
    """A linear layer that has its own kernel for a few input vectors."""

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x @ layer.weight.T + bias``; see the base class."""
        return _linear(x, layer.weight, bias, self.packed)


class CpuEmbeddingMethod(packing.MayBePacked, UnquantizedEmbeddingMethod):
    """An embedding or output layer that has its own kernel for a few input vectors."""

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The logits of ``x``; see the base class."""
        return _linear(x.to(layer.weight.dtype), layer.weight, bias, self.packed)


def _linear_of_many(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    packed: packing.PackedWeight | None,
) -> torch.Tensor:
    """oneDNN's linear layer; in bfloat16 with a number of rows that it has likely met before.

    oneDNN compiles a bfloat16 multiplication anew for every number of rows, in about 2 ms per
    weight shape, and prompts have all lengths.
    """
    if x.dtype != torch.bfloat16 or x.dim() != 2:
        return F.linear(x, weight, bias)
    count = x.shape[0]
    rows = round_up(count)
    if rows > count:
        padded = x.new_empty((rows, x.shape[1]))
        padded[:count] = x
        padded[count:] = 0
        x = padded
    out = F.linear(x, weight, bias) if packed is None else packed.linear(x, bias)
    return out[:count] if rows > count else out


def round_up(rows: int) -> int:
    """The next of a few dozen sizes, at most an eighth larger beyond 32.

    Args:
        rows: number of rows.

    Returns:
        ``rows`` up to 4, then multiples of 4, 8, 32 and 128.
    """
    if rows <= few_rows.MOST_ROWS:
        return rows
    step = 4 if rows <= 32 else 8 if rows <= 128 else 32 if rows <= 512 else 128
    return -(-rows // step) * step


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    packed: packing.PackedWeight | None,
) -> torch.Tensor:
    usual = x.dim() == 2 and x.is_contiguous() and x.dtype == weight.dtype and len(x) > 0
    if packed is not None and not (
        packed.is_of(weight) and usual and (bias is None or bias.dtype == x.dtype)
    ):
        packed = None
    covered = (
        usual
        and x.shape[0] <= few_rows.MOST_ROWS
        and bias is None
        and x.dtype in ELEMENTS
        and weight.is_contiguous()
        and (packed is None or x.shape[0] * weight.numel() <= _FEW_MULTIPLICATIONS)
    )
    if not covered:
        return _linear_of_many(x, weight, bias, packed)
    outputs, inputs = weight.shape
    rows = x.shape[0]
    out = torch.empty((rows, outputs), dtype=x.dtype)
    few_rows.linear(
        ELEMENTS[x.dtype], rows, inputs, outputs, x.data_ptr(), weight.data_ptr(), out.data_ptr()
    )
    return out


def _rms_norm(
    self: RMSNorm,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: torch.nn.Module | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As ``RMSNorm.forward_cuda``: with a residual, both tensors are overwritten."""
    weight = self.weight
    covered = (
        x.dtype in ELEMENTS
        and weight.dtype == x.dtype
        and x.is_contiguous()
        and x.shape[-1] == self.hidden_size
        and self.variance_size_override is None
        and not self.cast_x_before_out_mul
        and not self.fp32_residual
        and self.override_orig_dtype is None
        and post_residual_addition is None
        and (residual is None or (residual.dtype == x.dtype and residual.is_contiguous()))
    )
    if not covered:
        return self.forward_native(x, residual, post_residual_addition, quant_linear)
    out = torch.empty_like(x) if residual is None else x
    elementwise.rms_norm(
        ELEMENTS[x.dtype],
        x.numel() // self.hidden_size,
        self.hidden_size,
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        self.variance_epsilon,
    )
    return out if residual is None else (out, residual)


def _silu_and_mul(self: SiluAndMul, x: torch.Tensor) -> torch.Tensor:
    if x.dtype not in ELEMENTS or not x.is_contiguous():
        return self.forward_native(x)
    width = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype)
    elementwise.silu_and_mul(
        ELEMENTS[x.dtype], out.numel() // width, width, x.data_ptr(), out.data_ptr()
    )
    return out


def _rotate(
    self: RotaryEmbedding,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: object | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``RotaryEmbedding.forward_cuda``: in place."""
    table = self.cos_sin_cache
    covered = (
        query.dtype in ELEMENTS
        and query.dtype == key.dtype == table.dtype
        and query.dim() == key.dim() == 2
        and query.stride(1) == key.stride(1) == 1
        and positions.dim() == 1
        and positions.dtype == torch.int64
        and positions.shape[0] == query.shape[0]
        and positions.is_contiguous()
        and table.is_contiguous()
        and offsets is None
        and fused_set_kv_buffer_arg is None
        and not hasattr(self, "sin_cos_cache")
    )
    if not covered:
        return self.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)
    elementwise.rotate(
        ELEMENTS[query.dtype],
        not self.is_neox_style,
        query.shape[0],
        positions.data_ptr(),
        table.data_ptr(),
        table.shape[0],
        self.rotary_dim,
        self.head_size,
        (
            (query.data_ptr(), query.stride(0), query.shape[1] // self.head_size),
            (key.data_ptr(), key.stride(0), key.shape[1] // self.head_size),
        ),
    )
    return query, key
