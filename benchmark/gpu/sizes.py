"""How much is measured, by device: everything that a run's duration depends on.

Owns the numbers. On a GPU the whole check is to end within 15 minutes.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Device(Enum):
    """Where engines run."""

    CUDA = "cuda"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Load:
    """A model, and the memory and requests it is measured with.

    Attributes:
        model: of ``models.SHAPES``, or ``demo``.
        dtype: of its weights.
        free_kvc_tokens: KVC that all requests fit in.
        bound_kvc_tokens: KVC that is short.
        free_requests: of a burst with free KVC.
        bound_requests: of a run with short KVC.
        scale: factor on the lengths.
        batches: sizes of the decode batches that are timed.
    """

    model: str
    dtype: str
    free_kvc_tokens: int
    bound_kvc_tokens: int
    free_requests: int
    bound_requests: int
    scale: float
    batches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Everything else.

    Attributes:
        engine: SGLang's arguments for all engines.
        loads: what is timed.
        correctness_model: whose tokens are compared.
        correctness_kvc_tokens: KVC that makes requests be parked and preempted.
        correctness_requests: how many.
        correctness_scale: factor on their lengths.
        float32_engine: SGLang's arguments for the comparison in float32.
        float32_environment: environment variables of both systems for it.
        contexts: context tokens of the decode batches that are timed.
        decode_tokens: iterations of each.
        mixed_batches: decoding requests of the mixed iterations that are timed.
        mixed_contexts: prompt tokens of each of those.
        mixed_prompts: tokens of the prompts that are computed beside them.
        mixed_count: prompts of each.
        overhead_batch: decoding requests at which the scheduler's overhead is told.
        repeats: of iteration times.
        run_repeats: of throughput and goodput.
        max_running: most requests in a batch.
        limit_s: time for one answer of an engine.
    """

    engine: dict[str, Any]
    loads: tuple[Load, ...]
    correctness_model: str
    correctness_kvc_tokens: int
    correctness_requests: int
    correctness_scale: float
    float32_engine: dict[str, Any] = field(default_factory=dict)
    float32_environment: dict[str, str] = field(default_factory=dict)
    contexts: tuple[int, ...] = (128, 1024)
    decode_tokens: int = 48
    mixed_batches: tuple[int, ...] = (1, 32, 128)
    mixed_contexts: tuple[int, ...] = (64, 768)
    mixed_prompts: tuple[int, ...] = (128, 1024, 4096)
    mixed_count: int = 8
    overhead_batch: int = 128
    repeats: int = 3
    run_repeats: int = 2
    max_running: int = 256
    limit_s: float = 300.0


CPU_ENGINE = {"device": "cpu", "attention_backend": "econoserve_cpu", "page_size": 1}
CUDA_ENGINE = {
    "device": "cuda",
    "attention_backend": "flashinfer",
    "page_size": 1,
    "mem_fraction_static": 0.85,
    # Fewer graphs to capture: an engine starts sooner.
    "cuda_graph_max_bs_decode": 256,
    "cuda_graph_bs_decode": [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256],
    "chunked_prefill_size": 2048,
    # The client sees the first token and then every eighth: a token of each of 256 requests every
    # 2 ms is more than one Python process reads.
    "stream_interval": 8,
    # Two engines share the machine, and the one that is not asked must not spin. Both models at 8B
    # shape with their KVC take 61 GB.
    "sleep_on_idle": True,
}
# FlashInfer has no kernels for float32.
CUDA_FLOAT32 = {"attention_backend": "torch_native", "disable_cuda_graph": True}
# Nor have SGLang's for norms, activations and rotary embeddings: this makes each of its fused
# operators run what it is defined by, in torch.
FLOAT32_ENVIRONMENT = {"SGLANG_FORCE_FUSED_OP_BACKEND": "torch"}

GPU_BATCHES = (1, 8, 32, 64, 128, 256)

CUDA_FULL = Sizes(
    engine=CUDA_ENGINE,
    loads=(
        Load("1b", "bfloat16", 260_000, 12_000, 384, 240, 1.0, GPU_BATCHES),
        Load("8b", "bfloat16", 110_000, 12_000, 256, 200, 1.0, GPU_BATCHES),
    ),
    correctness_model="small",
    correctness_kvc_tokens=3000,
    correctness_requests=48,
    correctness_scale=0.4,
    float32_engine=CUDA_FLOAT32,
    float32_environment=FLOAT32_ENVIRONMENT,
)

CUDA_QUICK = Sizes(
    engine=CUDA_ENGINE,
    loads=(Load("1b", "bfloat16", 130_000, 12_000, 128, 160, 1.0, (1, 32, 128)),),
    correctness_model="small",
    correctness_kvc_tokens=2000,
    correctness_requests=24,
    correctness_scale=0.3,
    float32_engine=CUDA_FLOAT32,
    float32_environment=FLOAT32_ENVIRONMENT,
    contexts=(128, 512),
    decode_tokens=24,
    mixed_batches=(1, 32),
    mixed_count=6,
    repeats=1,
    run_repeats=1,
)

CPU_FULL = Sizes(
    engine=CPU_ENGINE,
    loads=(Load("demo", "float32", 30_000, 1200, 64, 120, 0.2, (1, 8, 32, 64)),),
    correctness_model="demo",
    correctness_kvc_tokens=1200,
    correctness_requests=24,
    correctness_scale=0.2,
    contexts=(32, 256),
    decode_tokens=24,
    mixed_batches=(1, 16),
    mixed_contexts=(16, 128),
    mixed_prompts=(64, 256, 768),
    mixed_count=6,
    overhead_batch=64,
    repeats=3,
    max_running=64,
)

CPU_QUICK = Sizes(
    engine=CPU_ENGINE,
    loads=(Load("demo", "float32", 8192, 300, 16, 32, 0.1, (1, 8)),),
    correctness_model="demo",
    correctness_kvc_tokens=240,
    correctness_requests=24,
    correctness_scale=0.1,
    contexts=(16, 64),
    decode_tokens=12,
    mixed_batches=(1, 4),
    mixed_contexts=(16, 64),
    mixed_prompts=(32, 128),
    mixed_count=4,
    overhead_batch=8,
    repeats=1,
    run_repeats=1,
    max_running=16,
    limit_s=120.0,
)
