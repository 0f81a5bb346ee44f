"""What is sent: lengths of known traces, scaled to a small model's context, and their objectives.

Owns everything that is random here: the same arguments give the same requests on every machine.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmark.scheduler_comparison.workload import Vocabulary
from econoserve.core.types import Slo
from econoserve.workload.synthetic import draw_lengths
from econoserve.workload.trace import TraceRequest
from econoserve.workload.workload import arrival_process

ROOT = Path(__file__).resolve().parents[2]
MOONCAKE = ROOT.parent / "shared/data/traces/mooncake_conversation/conversation_trace.jsonl"

CONTEXT_TOKENS = 2_048
MAX_TOKENS = 1_024
"""The limit on output tokens that every request states."""

LONGEST_PROMPT_TOKENS = 896
LONGEST_OUTPUT_TOKENS = 896

UNIT_TOKENS_PER_S = {"ample": 2_500.0, "tight": 1_600.0, "very-tight": 1_000.0}
PROMPT_WEIGHT = 0.2
"""Load 1 asks for so many output tokens per second at a size of the KVC, prompt tokens counting a
fifth. Our choice: somewhat less than two cores do with the demo model."""

LENGTHS_FOR_MEAN = 4_000
BLOCK_TOKENS = 512
"""Of a trace with shared prefixes, before scaling."""

DOCUMENTS = 16
DOCUMENT_SHARE = 0.6
ZIPF = 1.1
"""Shared prefixes without a trace: so many documents, by Zipf's law, each the first share of the
prompts that begin with it. Our choice."""

_CLASSES, _TOKENS, _DOCUMENTS = range(3)


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        prompt_ids: token ids of its prompt.
        output_tokens: length of its response, EOS included; hidden from the schedulers.
        arrival_s: when it is sent, from the first one on.
        slo: its objectives.
        service_class: name of its class.
    """

    prompt_ids: tuple[int, ...]
    output_tokens: int
    arrival_s: float
    slo: Slo
    service_class: str


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """Requests of one kind.

    Attributes:
        name: of the class.
        lengths: key of ``econoserve.workload.synthetic``'s lengths.
        prompt_scale: factor on prompts.
        output_scale: factor on responses.
        slo: objectives; none depends on the true length of a response.
        share: of all requests.
    """

    name: str
    lengths: str
    prompt_scale: float
    output_scale: float
    slo: Slo
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload.

    Attributes:
        name: key in the results.
        title: for readers.
        classes: its requests.
        has_shared_prefixes: prompts begin with blocks that others begin with.
        span: factor on the time of arrivals. Where responses may take long, a scheduler could
            put work off until nothing arrives any more; a longer run leaves less of that.
    """

    name: str
    title: str
    classes: tuple[ServiceClass, ...]
    has_shared_prefixes: bool = False
    span: float = 1.0


CHAT = Slo(ttft_s=0.5, tpot_s=0.02)
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "sharegpt", "ShareGPT lengths", (ServiceClass("chat", "sharegpt", 0.5, 0.5, CHAT),)
        ),
        Workload(
            "azure", "Azure conversation", (ServiceClass("chat", "azure-conv", 0.2, 0.5, CHAT),)
        ),
        Workload(
            "mooncake",
            "Mooncake conversation, shared prefixes",
            (
                ServiceClass(
                    "chat", "mooncake-conversation", 1 / 32, 0.5, Slo(ttft_s=1.0, tpot_s=0.02)
                ),
            ),
            has_shared_prefixes=True,
        ),
        Workload(
            "classes",
            "interactive and batch",
            (
                ServiceClass(
                    "interactive", "azure-conv", 0.1, 0.25, Slo(ttft_s=0.25, tpot_s=0.015), 0.7
                ),
                ServiceClass("batch", "sharegpt", 1.0, 1.0, Slo(e2e_s=10.0), 0.3),
            ),
            span=2.0,
        ),
        Workload(
            "long-output",
            "long outputs",
            (ServiceClass("long", "sharegpt", 0.25, 1.25, Slo(e2e_s=10.0)),),
            span=2.0,
        ),
    )
}


def rate_rps(workload: Workload, load: float, kvc: str) -> float:
    """Arrivals per second of a load.

    Args:
        workload: what arrives.
        load: in units of ``UNIT_TOKENS_PER_S``.
        kvc: size of the KVC, by its name.

    Returns:
        Requests per second, to three digits.
    """
    cost = 0.0
    for one in workload.classes:
        lengths = _lengths(one, LENGTHS_FOR_MEAN, 0)
        cost += one.share * float(
            np.mean([out + PROMPT_WEIGHT * prompt for prompt, out in lengths])
        )
    return float(f"{load * UNIT_TOKENS_PER_S[kvc] / cost:.3g}")


def generate(
    workload: Workload,
    count: int,
    rate: float,
    seed: int,
    vocabulary: Vocabulary,
    *,
    arrivals: str = "poisson",
    slo_scale: float = 1.0,
    trace: Path | None = MOONCAKE,
) -> list[Request]:
    """Draw requests.

    Args:
        workload: of what kind.
        count: how many, at least 1.
        rate: arrivals per second.
        seed: of lengths, tokens and times.
        vocabulary: what prompts are made of.
        arrivals: ``poisson`` or ``gamma:CV``.
        slo_scale: factor on all objectives.
        trace: Mooncake's, for shared prefixes; where there is no such file, they are drawn.

    Returns:
        The requests by arrival, the first at 0 s.
    """
    rng = np.random.default_rng((seed, _CLASSES))
    shares = [one.share for one in workload.classes]
    chosen = rng.choice(len(shares), count, p=np.array(shares) / sum(shares)).tolist()
    if workload.has_shared_prefixes and trace is not None and trace.is_file():
        kind = workload.classes[0]
        drawn = list(_from_trace(trace, kind, count, seed, vocabulary))
    elif workload.has_shared_prefixes:
        drawn = list(_with_documents(_lengths(workload.classes[0], count, seed), seed, vocabulary))
    else:
        pools = [iter(_lengths(one, count, seed + i)) for i, one in enumerate(workload.classes)]
        picks = [next(pools[index]) for index in chosen]
        tokens = np.random.default_rng((seed, _TOKENS))
        drawn = [(_draw(tokens, prompt, vocabulary), output) for prompt, output in picks]
    times_s = _times_s(count, rate, seed, arrivals)
    return [
        Request(
            prompt_ids,
            output_tokens,
            arrival_s,
            _scaled_slo(workload.classes[index].slo, slo_scale),
            workload.classes[index].name,
        )
        for (prompt_ids, output_tokens), arrival_s, index in zip(
            drawn, times_s, chosen, strict=True
        )
    ]


def source(workload: Workload) -> str:
    """Where a workload's prompts and lengths come from on this machine.

    Args:
        workload: the workload.

    Returns:
        In words.
    """
    if workload.has_shared_prefixes and MOONCAKE.is_file():
        return "conversations drawn from the trace, with its lengths and blocks, in its order"
    drawn = "lengths drawn from published quantiles"
    return f"{drawn}, synthetic shared prefixes" if workload.has_shared_prefixes else drawn


def _scaled_slo(slo: Slo, factor: float) -> Slo:
    stated = {name: getattr(slo, name) for name in ("ttft_s", "tpot_s", "e2e_s")}
    changes = {name: value * factor for name, value in stated.items() if value is not None}
    return replace(slo, **changes)


def _lengths(one: ServiceClass, count: int, seed: int) -> list[tuple[int, int]]:
    return [
        (
            _scaled(request.features.prompt_tokens, one.prompt_scale, LONGEST_PROMPT_TOKENS),
            _scaled(request.output_tokens, one.output_scale, LONGEST_OUTPUT_TOKENS),
        )
        for request in draw_lengths(one.lengths, count, seed)
    ]


def _scaled(tokens: int, factor: float, longest: int) -> int:
    return min(max(round(tokens * factor), 1), longest)


def _draw(rng: np.random.Generator, count: int, vocabulary: Vocabulary) -> tuple[int, ...]:
    ids = vocabulary.prompt_ids
    return tuple(ids[index] for index in rng.integers(len(ids), size=count).tolist())


def _with_documents(
    lengths: Sequence[tuple[int, int]], seed: int, vocabulary: Vocabulary
) -> Iterator[tuple[tuple[int, ...], int]]:
    rng = np.random.default_rng((seed, _DOCUMENTS))
    documents = [_draw(rng, LONGEST_PROMPT_TOKENS, vocabulary) for _ in range(DOCUMENTS)]
    weights = 1.0 / np.arange(1, DOCUMENTS + 1) ** ZIPF
    picks = rng.choice(DOCUMENTS, len(lengths), p=weights / weights.sum()).tolist()
    for (prompt, output), pick in zip(lengths, picks, strict=True):
        shared = round(prompt * DOCUMENT_SHARE)
        yield (*documents[pick][:shared], *_draw(rng, prompt - shared, vocabulary)), output


def _from_trace(
    path: Path, one: ServiceClass, count: int, seed: int, vocabulary: Vocabulary
) -> Iterator[tuple[tuple[int, ...], int]]:
    """Some conversations of a trace, in its order; blocks become random tokens.

    Whole conversations, because a stretch of the trace as short as a run has hardly two requests of
    the same one.
    """
    rows = _trace_rows(path)
    rng = np.random.default_rng((seed, _TOKENS))
    block_tokens = max(round(BLOCK_TOKENS * one.prompt_scale), 1)
    picked = _conversations(rows, count, rng)
    for number in range(count):
        prompt, output, blocks = rows[picked[number % len(picked)]]
        prompt = _scaled(prompt, one.prompt_scale, LONGEST_PROMPT_TOKENS)
        ids: list[int] = []
        for block in blocks[: -(-prompt // block_tokens)]:
            block_rng = np.random.default_rng((seed, _DOCUMENTS, block))
            ids.extend(_draw(block_rng, block_tokens, vocabulary))
        ids.extend(_draw(rng, max(prompt - len(ids), 0), vocabulary))
        yield tuple(ids[:prompt]), _scaled(output, one.output_scale, LONGEST_OUTPUT_TOKENS)


def _conversations(
    rows: Sequence[tuple[int, int, list[int]]], count: int, rng: np.random.Generator
) -> list[int]:
    """Indices of the rows of so many conversations that there are ``count``, or all, in order."""
    conversations: dict[tuple[int, ...], list[int]] = {}
    for index, (_, _, blocks) in enumerate(rows):
        # All requests of the trace begin with one block, which is no conversation yet.
        conversations.setdefault(tuple(blocks[:2]), []).append(index)
    found: list[int] = []
    every = list(conversations.values())
    for pick in rng.permutation(len(every)).tolist():
        if len(found) >= count:
            break
        found += every[pick]
    return sorted(found)[:count]


@functools.cache
def _trace_rows(path: Path) -> list[tuple[int, int, list[int]]]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            rows.append((row["input_length"], row["output_length"], row.get("hash_ids", [])))
    return rows


def _times_s(count: int, rate: float, seed: int, arrivals: str) -> list[float]:
    template = draw_lengths("sharegpt", 1, 0)[0]
    requests: list[TraceRequest] = [template] * count
    times_s = [request.arrival_s for request in arrival_process(arrivals)(requests, rate, seed)]
    return [at_s - times_s[0] for at_s in times_s]
