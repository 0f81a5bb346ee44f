"""The systems of the comparison as servers, on equal terms, and how a request looks to each.

Owns what differs between them beyond ``benchmark.cpu_engine.systems``: how a length is hidden, and
what their metrics are called.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmark.cpu_engine.systems import (
    ECONOSERVE,
    ROOT,
    SGLANG,
    SYSTEMS,
    VLLM,
    System,
)
from benchmark.scheduler_comparison.lengths import custom_params
from benchmark.serving.workloads import CONTEXT_TOKENS, MAX_TOKENS, Request
from econoserve.slo import HEADERS

NAMES = (ECONOSERVE, SGLANG, VLLM)
MAX_RUNNING = 256
KVC_TOKENS = {"ample": 49_152, "tight": 8_192, "very-tight": 4_096}
"""Whole blocks of vLLM's."""

VLLM_BLOCK_TOKENS = 32
"""The smallest blocks for which vLLM's CPU kernels have a fast path: larger ones waste KVC where it
is scarce."""

POLICY = ":"
"""``econoserve:NAME`` is EconoServe with that policy: the same engine, another scheduler."""

SLO_FIELDS = {"ttft_ms": "ttft_s", "tpot_ms": "tpot_s", "e2e_ms": "e2e_s"}


@dataclass(frozen=True, slots=True)
class Metrics:
    """Where a system's metrics say what we ask.

    Attributes:
        kvc_use: gauge, share of the KVC in use.
        preemptions: counters that are added up.
        cached_tokens: prompt tokens found in the prefix cache.
        computed_tokens: prompt tokens computed, those computed again included; empty if it does
            not say.
        first_tokens: prompt tokens computed for the first time; likewise.
    """

    kvc_use: str
    preemptions: tuple[str, ...]
    cached_tokens: str
    computed_tokens: tuple[str, ...] = ()
    first_tokens: tuple[str, ...] = ()


COMPUTED = ("sglang:realtime_tokens_total[prefill_compute]",)
CACHED = "sglang:cached_tokens_total"
FIRST = ("sglang:prefill_effective_tokens_total[input]",)
METRICS = {
    SGLANG: Metrics(
        "sglang:token_usage", ("sglang:num_retracted_requests_total",), CACHED, COMPUTED, FIRST
    ),
    ECONOSERVE: Metrics(
        "sglang:token_usage",
        (
            "econoserve:preemptions_total[recompute]",
            "econoserve:preemptions_total[offload]",
            "econoserve:allocation_failures_total",
        ),
        CACHED,
        COMPUTED,
        FIRST,
    ),
    VLLM: Metrics(
        "vllm:kv_cache_usage_perc",
        ("vllm:num_preemptions_total",),
        "vllm:prefix_cache_hits_total",
    ),
}


def family(name: str) -> str:
    """Which system a name stands for.

    Args:
        name: one of ``NAMES``, or ``econoserve:POLICY``.

    Returns:
        One of ``NAMES``.
    """
    return name.split(POLICY)[0]


def system(name: str) -> System:
    """A system as a server of this comparison.

    Args:
        name: one of ``NAMES``, or ``econoserve:POLICY``.

    Returns:
        What ``benchmark.cpu_engine.serving.Server`` starts.

    Raises:
        ValueError: there is no such system.
    """
    kind, _, policy = name.partition(POLICY)
    if kind not in NAMES or (policy and kind != ECONOSERVE):
        raise ValueError(f"system {name!r}: give one of {', '.join(NAMES)}, or econoserve:POLICY")
    base = SYSTEMS[kind]
    if kind == VLLM:
        arguments: dict[str, Any] = {
            "block_size": VLLM_BLOCK_TOKENS,
            "max_model_len": CONTEXT_TOKENS,
            "max_num_seqs": MAX_RUNNING,
            "logits_processors": "benchmark.serving.vllm_lengths:EndOnTime",
        }
        path = str(ROOT)
    else:
        arguments = {
            "context_length": CONTEXT_TOKENS,
            "max_running_requests": MAX_RUNNING,
            "enable_custom_logit_processor": True,
            "enable_metrics": True,
        }
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if policy:
        arguments["econoserve_policy"] = policy
    return replace(
        base,
        arguments={**dict(base.arguments), **arguments},
        environment={**dict(base.environment), "PYTHONPATH": path},
    )


def request_body(name: str, request: Request, eos_ids: Sequence[int]) -> dict[str, Any]:
    """The fields by which a request's length reaches the logit processor, and nobody else.

    Args:
        name: the system.
        request: what is sent.
        eos_ids: the model's EOS tokens; the first one is forced.

    Returns:
        Fields of OpenAI's completions.
    """
    if family(name) == VLLM:
        xargs = {"benchmark_length": request.output_tokens, "benchmark_eos": eos_ids[0]}
        return {"vllm_xargs": xargs}
    return {"custom_params": custom_params(request.output_tokens, eos_ids)}


def request_headers(request: Request) -> dict[str, str]:
    """The objectives of a request; all systems get them, and peers do not read them.

    Args:
        request: what is sent.

    Returns:
        HTTP headers.
    """
    stated = {field: getattr(request.slo, name) for field, name in SLO_FIELDS.items()}
    return {
        HEADERS[field]: f"{seconds * 1e3:g}"
        for field, seconds in stated.items()
        if seconds is not None
    }


def common_body(name: str, model: str, processor: str) -> dict[str, Any]:
    """The fields that all requests share.

    Args:
        name: the system.
        model: what the server calls its model.
        processor: SGLang's text for the logit processor.

    Returns:
        Fields of OpenAI's completions.
    """
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": MAX_TOKENS,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if family(name) != VLLM:
        body["custom_logit_processor"] = processor
    return body


def preemptions(name: str, counters: Mapping[str, float]) -> float:
    """How often requests were preempted.

    Args:
        name: the system.
        counters: by how much each rose; those that did not are missing.

    Returns:
        The sum of the system's counters of it.
    """
    return sum(counters.get(one, 0.0) for one in METRICS[family(name)].preemptions)


def cached_tokens(name: str, counters: Mapping[str, float]) -> float:
    """Prompt tokens that were found in the prefix cache.

    Args:
        name: the system.
        counters: by how much each rose; those that did not are missing.

    Returns:
        The rise of the system's counter of it.
    """
    return counters.get(METRICS[family(name)].cached_tokens, 0.0)


def recomputed_tokens(name: str, counters: Mapping[str, float]) -> float | None:
    """Tokens that were computed again after a preemption.

    Args:
        name: the system.
        counters: by how much each rose; those that did not are missing.

    Returns:
        Computed less first computed; ``None`` if the system does not say.
    """
    metrics = METRICS[family(name)]
    if not metrics.computed_tokens:
        return None
    computed, first = (
        sum(counters.get(one, 0.0) for one in names)
        for names in (metrics.computed_tokens, metrics.first_tokens)
    )
    return max(computed - first, 0.0)


def check_kvc() -> None:
    """See that all systems can be given the same KVC.

    Raises:
        ValueError: a size is no whole number of vLLM's blocks.
    """
    for size, tokens in KVC_TOKENS.items():
        if tokens % VLLM_BLOCK_TOKENS:
            raise ValueError(f"KVC {size}={tokens}: give a multiple of {VLLM_BLOCK_TOKENS} tokens")
