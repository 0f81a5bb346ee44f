"""What a process on a CUDA machine would import: torch is told that it has such a GPU.

Nothing is computed. Modules that do not load here are named and passed over; what they tried to
import was written down all the same.
"""

import importlib
import sys
from types import SimpleNamespace

MODULES = (
    "sgl_kernel",
    "flashinfer",
    "flashinfer.jit",
    "flashinfer.sampling",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.tokenizer_manager",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.model_executor.runner",
    "sglang.srt.model_executor.runner_backend",
    "sglang.srt.layers.attention.attention_registry",
    "sglang.srt.layers.attention.flashinfer_backend",
    "sglang.srt.layers.attention.triton_backend",
    "sglang.srt.layers.sampler",
    "sglang.srt.layers.quantization",
    "sglang.srt.models.llama",
    "sglang.srt.entrypoints.http_server",
    "sglang.bench_serving",
    "econoserve.runtime.scheduler",
    "econoserve.launch_server",
)

GPU = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 << 30,
    L2_cache_size=60 << 20,
    shared_memory_per_block_optin=232_448,
    warp_size=32,
)


def main() -> int:
    """Import everything.

    Returns:
        How many modules do not load.
    """
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_name = lambda *_: GPU.name
    torch.cuda.get_device_capability = lambda *_: (GPU.major, GPU.minor)
    torch.cuda.get_device_properties = lambda *_: GPU
    failed = 0
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed += 1
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 100))
