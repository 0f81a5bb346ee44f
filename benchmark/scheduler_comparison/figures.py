"""From the answers of a run to its figures, and from repeats to medians, ranges and ratios.

Owns the definition of every metric. It works on plain values and must not know how they came.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from benchmark.scheduler_comparison.worker import ECONOSERVE, STOCK


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the result.

    Attributes:
        key: its name in a run's figures.
        title: its name for readers, with the unit.
        digits: decimals to print.
    """

    key: str
    title: str
    digits: int


METRICS = (
    Metric("output_tokens_per_s", "output tokens/s", 0),
    Metric("mean_jct_s", "mean JCT (s)", 2),
    Metric("p99_jct_s", "p99 JCT (s)", 2),
    Metric("mean_ttft_s", "mean TTFT (s)", 2),
    Metric("p99_ttft_s", "p99 TTFT (s)", 2),
    Metric("mean_tpot_ms", "mean TPOT (ms)", 1),
    Metric("preemptions", "preemptions", 0),
    Metric("slo_met", "share of SLOs met", 3),
)


def figures(answers: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The figures of one run, by the client's clock.

    Args:
        answers: one dict per request, as ``worker.measure`` returns them.

    Returns:
        A value for the key of each metric: throughput over the time from the first arrival to the
        last token, JCT and TTFT from a request's arrival, TPOT the mean over requests of the time
        per token after the first, preemptions the sum over requests. ``None`` where nothing was
        measured: no answer, or no request with an SLO. A request that failed misses its SLO and
        counts in nothing else.
    """
    answered = [a for a in answers if a["error"] is None]
    limited = [a for a in answers if a["slo_ms"] is not None]
    met = [a for a in limited if a["error"] is None and a["jct_s"] * 1e3 <= a["slo_ms"]]
    tokens = sum(a["output_tokens"] for a in answered)
    jct = [a["jct_s"] for a in answered]
    ttft = [a["ttft_s"] for a in answered]
    tpot = [
        (a["jct_s"] - a["ttft_s"]) * 1e3 / (a["output_tokens"] - 1)
        for a in answered
        if a["output_tokens"] > 1
    ]
    first_s = min((a["arrival_s"] for a in answers), default=0.0)
    last_s = max((a["arrival_s"] + a["jct_s"] for a in answered), default=first_s)
    return {
        "output_tokens_per_s": tokens / (last_s - first_s) if last_s > first_s else None,
        "mean_jct_s": _mean(jct),
        "p99_jct_s": _p99(jct),
        "mean_ttft_s": _mean(ttft),
        "p99_ttft_s": _p99(ttft),
        "mean_tpot_ms": _mean(tpot),
        "preemptions": float(sum(a["retractions"] for a in answers)),
        "slo_met": len(met) / len(limited) if limited else None,
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _p99(values: Sequence[float]) -> float | None:
    return float(np.percentile(values, 99)) if values else None


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the repeats.

    Attributes:
        median: the median.
        lowest: the smallest value.
        highest: the largest value.
    """

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        """Summarise a figure.

        Args:
            values: one per repeat; ``None`` where it was not measured.

        Returns:
            Its spread, or ``None`` if it was never measured.
        """
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(float(np.median(known)), min(known), max(known))


@dataclass(frozen=True, slots=True)
class Run:
    """A measured run.

    Attributes:
        system: ``stock`` or ``econoserve``.
        kvc_tokens: size of the KV cache in tokens.
        repeat: its number, from 0.
        busy_before: share of all CPUs that other programs used just before, if known.
        start_s: time the engine took to start.
        figures: see ``figures``.
        counters: EconoServe's counters over the run; empty for stock.
        answers: one dict per request.
    """

    system: str
    kvc_tokens: int
    repeat: int
    busy_before: float | None
    start_s: float
    figures: dict[str, float | None]
    counters: dict[str, int]
    answers: list[dict[str, Any]]

    @property
    def failures(self) -> list[str]:
        """What went wrong: errors, and responses of another length than intended."""
        where = f"{self.system}, {self.kvc_tokens} tokens of KVC, repeat {self.repeat + 1}"
        found = []
        for number, answer in enumerate(self.answers):
            if answer["error"] is not None:
                found.append(f"{where}, request {number}: {answer['error']}")
            elif answer["output_tokens"] != answer["wanted_tokens"]:
                found.append(
                    f"{where}, request {number}: {answer['output_tokens']} output tokens instead "
                    f"of {answer['wanted_tokens']}"
                )
        if self.counters.get("planning_errors"):
            found.append(f"{where}: {self.counters['planning_errors']} plans raised an error")
        return found


@dataclass(frozen=True, slots=True)
class Difference:
    """Where the two systems' greedy outputs to one request part.

    Attributes:
        kvc_tokens: size of the KV cache in tokens.
        repeat: the pair's number, from 0.
        request: the request's number, from 0.
        position: the first output token that differs, from 0.
        stock_id: SGLang's token there; ``None`` if its output ended before.
        econoserve_id: EconoServe's token there; ``None`` if its output ended before.
    """

    kvc_tokens: int
    repeat: int
    request: int
    position: int
    stock_id: int | None
    econoserve_id: int | None


def compare_outputs(runs: Sequence[Run]) -> tuple[int, list[Difference]]:
    """Compare greedy outputs, request by request, between the two systems of a pair.

    Args:
        runs: all runs.

    Returns:
        How many outputs were compared, and those that differ.
    """
    by_key = {(run.system, run.kvc_tokens, run.repeat): run for run in runs}
    compared, differences = 0, []
    for (system, kvc_tokens, repeat), run in by_key.items():
        other = by_key.get((ECONOSERVE, kvc_tokens, repeat))
        if system != STOCK or other is None:
            continue
        for request, pair in enumerate(zip(run.answers, other.answers, strict=True)):
            compared += 1
            outputs = [answer["output_ids"] for answer in pair]
            for position, ids in enumerate(zip_longest(*outputs)):
                if ids[0] != ids[1]:
                    differences.append(Difference(kvc_tokens, repeat, request, position, *ids))
                    break
    return compared, differences


@dataclass(frozen=True, slots=True)
class Row:
    """A metric at one size of the KVC.

    Attributes:
        kvc_tokens: the size.
        metric: the metric.
        stock: SGLang's figure over the repeats.
        econoserve: EconoServe's figure over the repeats.
        ratio: EconoServe's divided by SGLang's, repeat by repeat; ``None`` where SGLang's is 0.
    """

    kvc_tokens: int
    metric: Metric
    stock: Spread
    econoserve: Spread
    ratio: Spread | None


def compare(runs: Sequence[Run]) -> list[Row]:
    """Put the two systems side by side.

    Args:
        runs: all runs; a repeat that one system lacks counts for the other alone.

    Returns:
        A row per size of the KVC and metric, without metrics that one system never measured.
    """
    rows = []
    for kvc_tokens in sorted({run.kvc_tokens for run in runs}):
        for metric in METRICS:
            values: dict[str, dict[int, float | None]] = {STOCK: {}, ECONOSERVE: {}}
            for run in runs:
                if run.kvc_tokens == kvc_tokens:
                    values[run.system][run.repeat] = run.figures[metric.key]
            ours, theirs = values[ECONOSERVE], values[STOCK]
            stock, econoserve = Spread.of([*theirs.values()]), Spread.of([*ours.values()])
            if stock is None or econoserve is None:
                continue
            ratios = [
                value / theirs[repeat]
                for repeat, value in ours.items()
                if value is not None and theirs.get(repeat)
            ]
            rows.append(Row(kvc_tokens, metric, stock, econoserve, Spread.of(ratios)))
    return rows
