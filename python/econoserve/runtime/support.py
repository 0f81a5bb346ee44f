"""Which SGLang options our scheduler works with: checked before a process is spawned.

Owns the list of combinations that are refused. Each refusal is one sentence that says what to
drop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from econoserve.patches import TESTED_SGLANG, check
from econoserve.policies.econoserve import VARIANTS


@dataclass(frozen=True, slots=True)
class Rule:
    """One combination that is refused.

    Attributes:
        unsupported: whether resolved server arguments have it.
        sentence: what to tell the user.
    """

    unsupported: Callable[[Any], bool]
    sentence: str


RULES = (
    Rule(
        lambda args: args.speculative_algorithm is not None,
        "speculative decoding is not supported: drop --speculative-algorithm",
    ),
    Rule(
        lambda args: args.pp_size > 1,
        "pipeline parallelism is not supported: drop --pp-size (use --tp-size)",
    ),
    Rule(
        lambda args: args.disaggregation_mode != "null",
        "prefill/decode disaggregation is not supported: drop --disaggregation-mode",
    ),
    Rule(
        lambda args: args.enable_dp_attention,
        "DP attention is not supported: drop --enable-dp-attention",
    ),
    Rule(
        lambda args: args.enable_hierarchical_cache or args.enable_lmcache,
        "host-memory prefix caches are not supported: drop --enable-hierarchical-cache and "
        "--enable-lmcache",
    ),
    Rule(
        lambda args: args.enable_priority_scheduling,
        "priorities are not supported, EconoServe orders by SLO: drop "
        "--enable-priority-scheduling and give requests an SLO",
    ),
    Rule(
        lambda args: args.schedule_policy != "fcfs",
        "EconoServe orders the queue itself: drop --schedule-policy",
    ),
    Rule(
        lambda args: (args.chunked_prefill_size or 0) <= 0,
        "EconoServe needs chunked prefill: give --chunked-prefill-size a positive number",
    ),
    Rule(
        lambda args: args.page_size != 1,
        "EconoServe uses SGLang's token-level KV pool: set --page-size 1",
    ),
    Rule(
        lambda args: bool(args.dllm_algorithm),
        "diffusion language models are not supported: drop --dllm-algorithm",
    ),
    Rule(
        lambda args: args.is_embedding,
        "embedding models are not supported: drop --is-embedding and serve them with SGLang",
    ),
    Rule(
        lambda args: args.tokenizer_worker_num > 1,
        "several tokenizer workers are not supported: drop --tokenizer-worker-num",
    ),
    Rule(
        lambda args: args.enable_lora and args.enable_lora_overlap_loading,
        "an adapter's place must not depend on when its copy ends, which differs between ranks: "
        "drop --enable-lora-overlap-loading",
    ),
    Rule(
        lambda args: args.lora_drain_wait_threshold > 0,
        "draining LoRA adapters goes by each rank's own clock: drop --lora-drain-wait-threshold",
    ),
    Rule(
        lambda args: args.enable_hisparse,
        "HiSparse is not supported: drop --enable-hisparse",
    ),
    Rule(
        lambda args: args.enable_flexkv or args.enable_unified_cache_external_linker,
        "external KV caches are not supported: drop --enable-flexkv and "
        "--enable-unified-cache-external-linker",
    ),
    Rule(
        lambda args: args.prefill_max_requests is not None,
        "EconoServe decides how many prompts share a pass: drop --prefill-max-requests",
    ),
    Rule(
        lambda args: args.smg_grpc_mode or args.grpc_mode or args.use_ray or args.encoder_only,
        "only the HTTP server is supported: drop --smg-grpc-mode, --grpc-mode, --use-ray and "
        "--encoder-only",
    ),
    Rule(
        lambda args: args.enable_prefill_delayer,
        "EconoServe decides when to prefill: drop --enable-prefill-delayer",
    ),
    Rule(
        lambda args: bool(args.prefill_decode_interval),
        "EconoServe decides when to prefill: drop --prefill-decode-interval",
    ),
)


class Unsupported(ValueError):
    """An option combination, a model or an SGLang release that EconoServe does not serve."""


def check_arguments(arguments: Any) -> None:
    """Refuse option combinations that our scheduler does not support.

    Args:
        arguments: SGLang's server arguments, resolved.

    Raises:
        Unsupported: the first rule that is broken, in one sentence.
    """
    for rule in RULES:
        if rule.unsupported(arguments):
            raise Unsupported(rule.sentence)


def check_policy(arguments: Any, policy: str) -> None:
    """Refuse policies that do not know whether a prompt's LoRA adapter has a place.

    Args:
        arguments: SGLang's server arguments, resolved.
        policy: its name.

    Raises:
        Unsupported: in one sentence that says what to choose.
    """
    if arguments.enable_lora and policy not in VARIANTS:
        raise Unsupported(
            f"LoRA adapters need a policy that knows their places: set --econoserve-policy to one "
            f"of {', '.join(VARIANTS)}"
        )


def check_pools(is_hybrid_swa: bool, is_hybrid_ssm: bool, is_generation: bool) -> None:
    """Refuse models whose KV cache is not one token-level pool.

    Args:
        is_hybrid_swa: the model mixes sliding-window and full attention.
        is_hybrid_ssm: the model has state-space layers.
        is_generation: the model generates text.

    Raises:
        Unsupported: in one sentence.
    """
    if not is_generation:
        raise Unsupported("embedding models are not supported: serve --model-path with SGLang")
    if is_hybrid_swa or is_hybrid_ssm:
        kind = "sliding-window" if is_hybrid_swa else "state-space (Mamba)"
        raise Unsupported(
            f"models with {kind} layers are not supported: choose another --model-path or serve "
            "this one with SGLang"
        )


def check_release(allow_untested: bool) -> list[str]:
    """Compare SGLang's patched symbols with the tested release.

    Args:
        allow_untested: report differences instead of refusing them.

    Returns:
        One sentence per difference.

    Raises:
        Unsupported: there is one, and ``allow_untested`` is false.
    """
    sentences = [f"{finding.symbol}: {finding.problem}" for finding in check()]
    if sentences and not allow_untested:
        raise Unsupported(
            f"this SGLang is not the tested {TESTED_SGLANG}: {'; '.join(sentences)}. Install "
            f"sglang=={TESTED_SGLANG} or give --econoserve-allow-untested"
        )
    return sentences
