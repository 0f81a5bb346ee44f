"""Requests with their response lengths, and of each what a server would see when it arrives.

Owns which traces are measured. Where a file lacks arrival times, they are drawn with a fixed seed.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmark.prediction.synthetic import synthetic
from econoserve.workload.readers import read_csv, read_jsonl
from econoserve.workload.servegen import read_servegen
from econoserve.workload.trace import TraceRequest

RATE_PER_S = 5.0
"""Arrivals where a file has no times."""


def azure_conversation(folder: Path, limit: int) -> list[TraceRequest]:
    """Azure's conversations of 2023: times and lengths, nothing else.

    Args:
        folder: of the trace.
        limit: most requests, the first ones.

    Returns:
        The requests by arrival.
    """
    return read_csv(folder / "AzureLLMInferenceTrace_conv.csv", limit)


def mooncake_conversation(folder: Path, limit: int) -> list[TraceRequest]:
    """Mooncake's conversations, with the hashes of their prompts' blocks of 512 tokens.

    Args:
        folder: of the trace.
        limit: most requests, the first ones.

    Returns:
        The requests by arrival.
    """
    return read_jsonl(folder / "conversation_trace.jsonl", limit)


def servegen_deepseek(folder: Path, limit: int) -> list[TraceRequest]:
    """DeepSeek-R1 at Alibaba: a day of 73 clients, drawn from their rates and distributions.

    Args:
        folder: of the trace.
        limit: about how many requests.

    Returns:
        The requests by arrival.
    """
    return read_servegen(folder / "deepseek-r1.tar.xz", limit)


def sharegpt_lengths(folder: Path, limit: int) -> list[TraceRequest]:
    """ShareGPT's prompt and response lengths; arrivals are drawn at a constant rate.

    Args:
        folder: of the trace.
        limit: most requests, the first ones.

    Returns:
        The requests by arrival.
    """
    return _lengths(folder / "sharegpt_val_10k_llama2.csv", limit)


def arxiv_lengths(folder: Path, limit: int) -> list[TraceRequest]:
    """Lengths of papers and their summaries; arrivals are drawn at a constant rate.

    Args:
        folder: of the trace.
        limit: most requests, the first ones.

    Returns:
        The requests by arrival.
    """
    return _lengths(folder / "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv", limit)


def _lengths(path: Path, limit: int) -> list[TraceRequest]:
    draw = np.random.default_rng(13)
    requests, at_s = [], 0.0
    for request in read_csv(path, limit):
        at_s += draw.exponential(1 / RATE_PER_S)
        requests.append(replace(request, arrival_s=at_s))
    return requests


TRACES: dict[str, tuple[str | None, Callable[[Path, int], list[TraceRequest]]]] = {
    "azure": ("azure_llm_2023", azure_conversation),
    "mooncake": ("mooncake_conversation", mooncake_conversation),
    "servegen": ("servegen_deepseek_r1", servegen_deepseek),
    "sharegpt": ("sharegpt_val10k_lengths", sharegpt_lengths),
    "arxiv": ("vidur_arxiv", arxiv_lengths),
    "synthetic": (None, lambda folder, limit: synthetic(limit)),
}
"""Folder, and what reads it, by a trace's name."""
