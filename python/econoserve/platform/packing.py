"""Weights in oneDNN's own layout, beside the plain ones.

torch gives oneDNN a plain bfloat16 weight, which it brings into blocks anew at each multiplication.
A packed copy saves that.

The plain weight stays where SGLang expects it: lookups, updates and checks use it. A copy follows
an update when SGLang calls ``process_weights_after_loading``, which it does after loading from disk
and when a weight-update session ends; until then batches see partly old weights. The copy is
written in place, so recordings (see ``recording``) use the new weights, too.
"""

import logging

import torch
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_loader.loader import QuantizedRLModelLoader

logger = logging.getLogger(__name__)

MOST_BYTES = 2 << 30
"""Memory for all copies of a model in a process; a model that needs more is not packed."""

# oneDNN's layout hardly depends on it: it is the number of rows that a copy is made for.
_TYPICAL_ROWS = 16


def supported() -> bool:
    """Whether this machine's oneDNN multiplies bfloat16 with packed weights.

    Returns:
        False on machines or builds of torch without it.
    """
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(model: torch.nn.Module) -> None:
    """Pack the weights that are multiplied with, if all copies together are small enough.

    Args:
        model: a loaded model; layers whose method is a :class:`MayBePacked` are changed in place.
    """
    # That loader updates weights without telling the layers' methods.
    if not supported() or QuantizedRLModelLoader.is_reload_scenario(model):
        return
    # Without an output layer of its own a model multiplies with its embedding.
    own_output_layer = any(isinstance(module, ParallelLMHead) for module in model.modules())
    layers = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "quant_method", None), MayBePacked)
        and _packable(module.weight)
        and not (own_output_layer and _only_looks_up(module))
    ]
    needed = sum(module.weight.nbytes for module in layers)
    if needed > MOST_BYTES:
        logger.info(
            "weights are not packed: the copies would need %.1f GiB, more than %.1f",
            needed / 2**30,
            MOST_BYTES / 2**30,
        )
        return
    for module in layers:
        module.quant_method.packed = PackedWeight(module.weight)


def _only_looks_up(module: torch.nn.Module) -> bool:
    return isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)


def _packable(weight: torch.Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and weight.dim() == 2
        and weight.device.type == "cpu"
        and weight.layout is torch.strided
        and weight.is_contiguous()
        and weight.numel() > 0
    )


class PackedWeight:
    """A packed copy of one weight.

    Args:
        weight: bfloat16 [outputs, inputs], contiguous.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._packed: torch.Tensor | None
        self._plain: torch.Tensor | None
        # The original is kept so that no other weight takes its address.
        self._plain = weight.detach()
        with torch.inference_mode(False), torch.no_grad():
            self._packed = _packed(self._plain)

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether this is the copy of a weight; else it is never used again and freed.

        Args:
            weight: what the layer multiplies with now.

        Returns:
            False after the layer was given another tensor.
        """
        if self._plain is not None and not weight.is_set_to(self._plain):
            self._plain = self._packed = None
        return self._plain is not None

    def pack_again(self) -> None:
        """Take over the weight's new contents, in place."""
        if self._plain is not None and self._packed is not None:
            with torch.no_grad():
                self._packed.copy_(_packed(self._plain))

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight.T + bias``.

        Args:
            x: contiguous bfloat16 [rows, inputs].
            bias: bfloat16 [outputs], or None.

        Returns:
            bfloat16 [rows, outputs].
        """
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")


class MayBePacked(QuantizeMethodBase):
    """What a layer's method needs to keep a packed copy up to date.

    Attributes:
        packed: a packed copy of the layer's weight, if there is one; not for lookups.
    """

    packed: PackedWeight | None = None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """SGLang calls this when it has changed the weights; see the base class.

        Args:
            layer: whose weights have changed.
        """
        super().process_weights_after_loading(layer)
        if self.packed is not None:
            self.packed.pack_again()


def _packed(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
