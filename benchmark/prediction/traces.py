"""Requests with their response lengths, and of each what a server would see when it arrives.

Owns the reading of trace files. Where a file lacks something that is needed to replay it (arrival
times, single requests), it is drawn with a fixed seed, and the docstring says so.
"""

import ast
import csv
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np

from benchmark.prediction.synthetic import synthetic
from benchmark.prediction.trace import CAP_TOKENS, TraceError, TraceRequest
from econoserve.prediction.request import CUTS, RequestFeatures, fingerprint, mixed

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
    path = folder / "AzureLLMInferenceTrace_conv.csv"
    requests: list[TraceRequest] = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            # The seventh digit of the seconds is more than Python reads.
            at_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            features = RequestFeatures(int(row["ContextTokens"]), CAP_TOKENS)
            requests.append(TraceRequest(at_s, features, int(row["GeneratedTokens"])))
            if len(requests) == limit:
                break
    return _from_zero(requests)


def mooncake_conversation(folder: Path, limit: int) -> list[TraceRequest]:
    """Mooncake's conversations, with the hashes of their prompts' blocks of 512 tokens.

    Arrivals are recorded in ticks of 3 s; they are spread evenly within their tick.

    Args:
        folder: of the trace.
        limit: most requests, the first ones.

    Returns:
        The requests by arrival.
    """
    path = folder / "conversation_trace.jsonl"
    draw = np.random.default_rng(7)
    requests = []
    with path.open() as file:
        for line in file:
            row = json.loads(line)
            hashes = _block_hashes(row["hash_ids"], row["input_length"])
            features = RequestFeatures(row["input_length"], CAP_TOKENS, hashes)
            at_s = row["timestamp"] / 1e3 + draw.uniform(0.0, 3.0)
            requests.append(TraceRequest(at_s, features, row["output_length"]))
            if len(requests) == limit:
                break
    return _from_zero(requests)


def _block_hashes(blocks: list[int], prompt_tokens: int) -> tuple[int, ...]:
    """Hashes at those of our cut points that are ends of blocks."""
    chain, ends = 0, {}
    for number, block in enumerate(blocks, start=1):
        chain = mixed(block + 1, chain + number)
        ends[512 * number] = chain
    return tuple(ends[cut] for cut in CUTS if cut in ends and cut <= prompt_tokens)


def servegen_deepseek(folder: Path, limit: int) -> list[TraceRequest]:
    """DeepSeek-R1 at Alibaba: a day of 73 clients.

    The file has rates and length distributions per client. Requests are drawn from them: a client's
    arrivals as a renewal process in each window of 10 minutes (gamma distributed, with the window's
    rate and variation), lengths independently from its distributions of that quarter of the day.
    All rates are scaled by one factor so that about ``limit`` requests come.

    Args:
        folder: of the trace.
        limit: about how many requests.

    Returns:
        The requests by arrival.
    """
    rates, lengths = _read_servegen(folder / "deepseek-r1.tar.xz")
    expected = sum(rate * 600 for windows in rates.values() for _, rate, _ in windows)
    scale = limit / expected
    requests = []
    for client in sorted(rates):
        draw = np.random.default_rng((11, client))
        user = fingerprint(f"client {client}")
        for start_s, rate, variation in rates[client]:
            tables = lengths[client].get(int(start_s) // 21_600)
            if rate <= 0 or tables is None:
                continue
            for at_s in _renewals(draw, start_s, rate * scale, max(variation, 0.1)):
                prompt, output = (int(draw.choice(*table)) for table in tables)
                features = RequestFeatures(max(prompt, 1), CAP_TOKENS, user=user)
                context = (client, int(start_s) // 21_600)
                requests.append(TraceRequest(at_s, features, max(output, 1), context))
    return _from_zero(requests)


def _renewals(
    draw: np.random.Generator, start_s: float, rate_per_s: float, variation: float
) -> list[float]:
    shape = 1.0 / variation**2
    times_s, at_s = [], start_s + draw.uniform(0.0, 1.0) * draw.gamma(shape, 1 / shape) / rate_per_s
    while at_s < start_s + 600:
        times_s.append(at_s)
        at_s += draw.gamma(shape, 1 / shape) / rate_per_s
    return times_s


def _read_servegen(path: Path) -> tuple[dict, dict]:
    rates: dict[int, list[tuple[float, float, float]]] = {}
    lengths: dict[int, dict[int, list]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            name = Path(member.name).name
            if file is None or not name.startswith("chunk-"):
                continue
            client, text = int(name.split("-")[1]), file.read().decode()
            if name.endswith("trace.csv"):
                rows = (line.split(",") for line in text.splitlines())
                rates[client] = [(float(row[0]), float(row[1]), float(row[2] or 0)) for row in rows]
            else:
                spans = json.loads(text)
                lengths[client] = {
                    int(start) // 21_600: [
                        _table(span["input_tokens"]),
                        _table(span["output_tokens"]),
                    ]
                    for start, span in spans.items()
                    if ast.literal_eval(span["output_tokens"])
                }
    return rates, lengths


def _table(text: str) -> tuple[np.ndarray, None, bool, np.ndarray]:
    """Arguments of ``Generator.choice``."""
    table = ast.literal_eval(text)
    shares = np.array(list(table.values()), float)
    return np.array(list(table), int), None, True, shares / shares.sum()


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
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            at_s += draw.exponential(1 / RATE_PER_S)
            features = RequestFeatures(int(row["num_prefill_tokens"]), CAP_TOKENS)
            requests.append(TraceRequest(at_s, features, int(row["num_decode_tokens"])))
            if len(requests) == limit:
                break
    return requests


def _from_zero(requests: list[TraceRequest]) -> list[TraceRequest]:
    if not requests:
        raise TraceError("the trace has no requests")
    requests = sorted(requests, key=lambda request: request.arrival_s)
    first_s = requests[0].arrival_s
    return [replace(request, arrival_s=request.arrival_s - first_s) for request in requests]


TRACES: dict[str, tuple[str | None, Callable[[Path, int], list[TraceRequest]]]] = {
    "azure": ("azure_llm_2023", azure_conversation),
    "mooncake": ("mooncake_conversation", mooncake_conversation),
    "servegen": ("servegen_deepseek_r1", servegen_deepseek),
    "sharegpt": ("sharegpt_val10k_lengths", sharegpt_lengths),
    "arxiv": ("vidur_arxiv", arxiv_lengths),
    "synthetic": (None, lambda folder, limit: synthetic(limit)),
}
"""Folder, and what reads it, by a trace's name."""
