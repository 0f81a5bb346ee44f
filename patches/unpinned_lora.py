"""Seam: LoRA layers keep small tables in pinned host memory.

Upstream: the layers, the weights and the ``torch_native`` backend pin memory wherever they run.
Changed: on a machine without an accelerator nothing is pinned. Why no public seam serves: the calls
are literal. ``pin_memory=is_pin_memory_available()`` upstream would make this module unnecessary.
"""

from typing import Any

import torch

TARGETS: dict[str, dict[str, str]] = {
    "sglang.srt.lora.layers": {
        "ColumnParallelLinearWithLoRA": "85d16f0c7e01dd09fd08c38b45fc28ca22dfbb1945c2cfdb2062147d9318cbb4",
        "QKVParallelLinearWithLoRA": "a8843fe05707299721a8dd6189d26c9ef2189f1ec1374cde0aa2eae0ab65a379",
    },
    "sglang.srt.lora.lora.LoRAAdapter": {
        "pin_weights_in_cpu": "ffac918b0b1e859aa2655fbf2a35f72e323b3db8303e2b4e168e714963059f07"
    },
    "sglang.srt.lora.backend.torch_backend.TorchNativeLoRABackend": {
        "prepare_lora_batch": "6edc13176598b063442f963ac668e9b60e95927f7647e1e5da7d93562c31cf57"
    },
}

CREATORS = ("empty", "tensor", "zeros")
"""Functions of torch that are called with ``pin_memory`` there."""


class UnpinnedTorch:
    """The module ``torch`` with functions that create tensors in ordinary memory."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in CREATORS:
            return value

        def create(*args: Any, pin_memory: bool = False, **keywords: Any) -> torch.Tensor:
            return value(*args, **keywords)

        return create


def install() -> None:
    """Let LoRA run without an accelerator, in a process that has none."""
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend

    layers.torch = torch_backend.torch = UnpinnedTorch()
    torch.Tensor.pin_memory = lambda self, device=None: self
