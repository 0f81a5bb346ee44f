"""What came of each request, and of a run as a whole.

Owns the definitions of the figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from econoserve.core.types import Outcome, Slo

DECILES = 10


@dataclass(slots=True)
class RequestRecord:
    """What came of a request; times in seconds on the simulation's clock.

    Attributes:
        rid: request id.
        arrival_s: when it arrived.
        prompt_tokens: its prompt.
        output_tokens: its response.
        slo: its objectives.
        outcome: how it ended; ``None`` while it lives.
        first_token_s: when its first token was out.
        end_s: when its last token was out, or it was refused.
        preemptions: how often it gave up its KVC or moved it to host memory.
        recomputed_tokens: KVC that it threw away and computed again.
        cached_tokens: what of its prompt it found in the prefix cache at first.
    """

    rid: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    slo: Slo = field(default_factory=Slo)
    outcome: Outcome | None = None
    first_token_s: float | None = None
    end_s: float | None = None
    preemptions: int = 0
    recomputed_tokens: int = 0
    cached_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """Arrival to first token; infinity without one."""
        return float("inf") if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def jct_s(self) -> float:
        """Arrival to last token; infinity if it was not served."""
        served = self.outcome is Outcome.FINISHED and self.end_s is not None
        return self.end_s - self.arrival_s if served else float("inf")

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; ``None`` for responses of one token."""
        if self.output_tokens < 2:
            return None
        return (self.jct_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def demand_token_iterations(self) -> int:
        """KVC-time that it needs: the tokens that it holds, summed over its iterations.

        Counted as if it ran from its prompt to its end: its prompt in the iteration that computes
        it, and a token more in each one after.
        """
        after = self.output_tokens - 1
        return self.prompt_tokens * self.output_tokens + after * (after + 1) // 2

    @property
    def met(self) -> bool:
        """Whether it was served within all of its objectives."""
        if self.outcome is not Outcome.FINISHED:
            return False
        limits = (
            (self.ttft_s, self.slo.ttft_s),
            (self.tpot_s, self.slo.tpot_s),
            (self.jct_s, self.slo.e2e_s),
        )
        return all(limit is None or value is None or value <= limit for value, limit in limits)


@dataclass(frozen=True, slots=True)
class KvcUse:
    """The use of a machine over a run; of its KVC in tokens times seconds.

    What instances of one phase do not count is ``None``: the backlog and the forward passes.

    Attributes:
        held: KVC that was held.
        useful: what of it requests in the forward pass had computed, if it was not thrown away
            later: neither parked, nor computed in vain. What was found in the prefix cache counts
            for who computed it.
        offered: the whole KVC.
        useful_in_backlog: as ``useful``, over the iterations during which requests waited that
            held no KVC.
        offered_in_backlog: the whole KVC over these.
        iterations: forward passes.
        forward_tokens: tokens that they computed.
    """

    held: float
    useful: float
    offered: float
    useful_in_backlog: float | None = None
    offered_in_backlog: float | None = None
    iterations: int | None = None
    forward_tokens: int | None = None


def summarise(records: Sequence[RequestRecord], use: KvcUse) -> dict[str, Any]:
    """The figures of a run.

    Args:
        records: of all its requests, at least one.
        use: how the machine was used.

    Returns:
        By name. Rates are over the time from the first arrival to the last end; means and
        percentiles over the requests that were served, ``None`` if none was, and those of TPOT if
        none had two tokens; ``ssr`` is the share of all requests that were served within all of
        their objectives. ``ssr``, ``goodput_rps`` and
        ``ssr_by_demand`` are ``None`` where no request has an objective, as
        ``kvc_useful_utilisation_backlog`` is where none waited; and so is what was not counted.
    """
    stated = any(record.slo != Slo() for record in records)
    served = [record for record in records if record.outcome is Outcome.FINISHED]
    met = sum(record.met for record in records)
    ends = [record.end_s for record in records if record.end_s is not None]
    span_s = max(ends, default=0.0) - min(record.arrival_s for record in records)
    jct_s = [record.jct_s for record in served]
    ttft_s = [record.ttft_s for record in served]
    tpot_s = [record.tpot_s for record in served if record.tpot_s is not None]
    per_token_s = [record.jct_s / record.output_tokens for record in served]
    return {
        "requests": len(records),
        "served": len(served),
        "rejected": sum(record.outcome is Outcome.REJECTED for record in records),
        "span_s": span_s,
        "throughput_rps": _share(len(served), span_s),
        "throughput_tokens_per_s": _share(sum(r.output_tokens for r in served), span_s),
        "goodput_rps": _share(met, span_s) if stated else None,
        "ssr": met / len(records) if stated else None,
        "ssr_by_demand": _ssr_by_demand(records) if stated else None,
        "mean_jct_s": _mean(jct_s),
        "p50_jct_s": _percentile(jct_s, 50),
        "p90_jct_s": _percentile(jct_s, 90),
        "p99_jct_s": _percentile(jct_s, 99),
        "mean_ttft_s": _mean(ttft_s),
        "p90_ttft_s": _percentile(ttft_s, 90),
        "p99_ttft_s": _percentile(ttft_s, 99),
        "mean_tpot_s": _mean(tpot_s),
        "p90_tpot_s": _percentile(tpot_s, 90),
        "p99_tpot_s": _percentile(tpot_s, 99),
        "mean_normalised_latency_s": _mean(per_token_s),
        "preemptions": sum(record.preemptions for record in records),
        "recomputed_tokens": sum(record.recomputed_tokens for record in records),
        "cached_tokens": sum(record.cached_tokens for record in records),
        "kvc_utilisation": _share(use.held, use.offered),
        "kvc_useful_utilisation": _share(use.useful, use.offered),
        "kvc_useful_utilisation_backlog": (
            use.useful_in_backlog / use.offered_in_backlog if use.offered_in_backlog else None
        ),
        "backlog_share": (
            None if use.offered_in_backlog is None else _share(use.offered_in_backlog, use.offered)
        ),
        "iterations": use.iterations,
        "mean_forward_tokens": (
            None if use.iterations is None else _share(use.forward_tokens, use.iterations)
        ),
    }


def _ssr_by_demand(records: Sequence[RequestRecord]) -> list[float | None]:
    """SSR of each tenth of the requests by KVC-time demand, least demand first."""
    ordered = sorted(records, key=lambda record: record.demand_token_iterations)
    cuts = [part * len(ordered) // DECILES for part in range(DECILES + 1)]
    return [
        sum(record.met for record in ordered[low:high]) / (high - low) if high > low else None
        for low, high in pairwise(cuts)
    ]


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _percentile(values: Sequence[float], percent: int) -> float | None:
    return float(np.percentile(values, percent)) if values else None
