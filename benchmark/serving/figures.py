"""Figures of a run from what came of its requests, and of all runs from their records.

Owns no definition of a figure that ``econoserve.sim.records`` has: SSR, goodput, JCT, TTFT and TPOT
mean the same as in the simulator.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from benchmark.serving.workloads import Request
from econoserve.core.types import Outcome
from econoserve.sim.records import KvcUse, RequestRecord, summarise

SIMULATED_ONLY = (
    "preemptions",
    "recomputed_tokens",
    "kvc_utilisation",
    "kvc_useful_utilisation",
    "kvc_useful_utilisation_backlog",
    "iterations",
    "mean_forward_tokens",
)
ATTAINMENT = 0.9
KEPT_PERCENTILES = tuple(range(0, 101, 2))

Record = Mapping[str, Any]


def request_records(
    requests: Sequence[Request], answers: Sequence[Mapping[str, Any]]
) -> list[RequestRecord]:
    """What came of each request, in the simulator's terms.

    Args:
        requests: as they were sent.
        answers: the client's, in the same order.

    Returns:
        A record for each; one without an answer in time has no outcome.
    """
    records = []
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        record = RequestRecord(
            str(number),
            request.arrival_s,
            len(request.prompt_ids),
            request.output_tokens,
            request.slo,
        )
        if answer["ttft_s"] is not None:
            record.first_token_s = request.arrival_s + answer["ttft_s"]
        if answer["jct_s"] is not None:
            record.end_s = request.arrival_s + answer["jct_s"]
        if answer["error"] is None:
            record.outcome = Outcome.FINISHED
        records.append(record)
    return records


def figures(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """The figures of a run.

    Args:
        records: of its requests.

    Returns:
        By name; see ``econoserve.sim.records.summarise``.
    """
    found = summarise(records, KvcUse(0.0, 0.0, 0.0))
    for name in SIMULATED_ONLY:
        del found[name]
    served = [record for record in records if record.outcome is Outcome.FINISHED]
    if served:
        found["p50_ttft_s"] = float(np.median([record.ttft_s for record in served]))
        tpot_s = [record.tpot_s for record in served if record.tpot_s is not None]
        found["p50_tpot_s"] = float(np.median(tpot_s)) if tpot_s else 0.0
        jct_s = np.percentile([record.jct_s for record in served], KEPT_PERCENTILES).tolist()
        found["jct_percentiles_s"] = [
            [percent, round(value, 4)]
            for percent, value in zip(KEPT_PERCENTILES, jct_s, strict=True)
        ]
    return {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in found.items()
    }


def by_class(
    requests: Sequence[Request], records: Sequence[RequestRecord]
) -> dict[str, dict[str, float]]:
    """SSR and completion time of each class of requests.

    Args:
        requests: as they were sent.
        records: what came of them.

    Returns:
        By class.
    """
    found = {}
    for name in sorted({request.service_class for request in requests}):
        own = [
            record
            for request, record in zip(requests, records, strict=True)
            if request.service_class == name
        ]
        served = [record.jct_s for record in own if record.outcome is Outcome.FINISHED]
        found[name] = {
            "requests": len(own),
            "ssr": round(sum(record.met for record in own) / len(own), 4),
            "mean_jct_s": round(statistics.fmean(served), 4) if served else 0.0,
        }
    return found


def wrong_lengths(requests: Sequence[Request], answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Responses that do not have their length: then the systems did not do the same work.

    Args:
        requests: as they were sent.
        answers: the client's, in the same order.

    Returns:
        What is wrong, a line for each finished response that is.
    """
    return [
        f"request {number}: {answer['tokens']} output tokens, {request.output_tokens} are right"
        for number, (request, answer) in enumerate(zip(requests, answers, strict=True))
        if answer["error"] is None and answer["tokens"] != request.output_tokens
    ]


def median(values: Iterable[float | None]) -> float | None:
    """The median of what was measured.

    Args:
        values: of the repeats.

    Returns:
        The median; ``None`` if nothing was measured.
    """
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def grouped(records: Sequence[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by some of their fields, in the order of their first ones.

    Args:
        records: any.
        names: of the fields.

    Returns:
        By the fields' values.
    """
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[name] for name in names), []).append(record)
    return found


def attained_rate_rps(
    points: Sequence[tuple[float, float]], attainment: float = ATTAINMENT
) -> float:
    """The highest rate at which enough requests meet their objectives.

    Args:
        points: rates in requests per second and the SSR there, any order, at least one.
        attainment: the share that is enough.

    Returns:
        Where the SSR first falls to the share, interpolated between the rates around it; the
        highest rate if it never does. Below the lowest rate the SSR is taken as 1 at rate 0.
    """
    ordered = [(0.0, 1.0), *sorted(points)]
    for (low, above), (high, below) in pairwise(ordered):
        if below < attainment:
            return low + (high - low) * (above - attainment) / (above - below)
    return ordered[-1][0]


@dataclass(frozen=True, slots=True)
class Goodput:
    """Goodput at 90 % attainment on one workload and size of the KVC.

    Attributes:
        workload: its name.
        kvc: its name.
        by_system: the rates, per second.
        ratio: EconoServe's to the better peer's; ``None`` without both.
        jct_ratio: mean JCT, EconoServe's to the better peer's, at the lowest rate at which every
            peer misses the attainment; ``None`` if there is none.
    """

    workload: str
    kvc: str
    by_system: Mapping[str, float]
    ratio: float | None
    jct_ratio: float | None


def goodputs(records: Sequence[Record], ours: str, peers: Sequence[str]) -> list[Goodput]:
    """Compare the systems' goodput.

    Args:
        records: of all runs.
        ours: name of our system.
        peers: names of the systems that it is compared with.

    Returns:
        A comparison for each workload and size of the KVC.
    """
    found = []
    for (workload, kvc), own in grouped(records, "workload", "kvc").items():
        ssr: dict[str, dict[float, float]] = {}
        jct_s: dict[str, dict[float, float]] = {}
        for (system, rate), runs in grouped(own, "system", "rate_rps").items():
            ssr.setdefault(system, {})[rate] = median(run["ssr"] for run in runs)
            jct_s.setdefault(system, {})[rate] = median(run["mean_jct_s"] for run in runs)
        rates = {system: attained_rate_rps(list(at.items())) for system, at in ssr.items()}
        best = max((rates[peer] for peer in peers if peer in rates), default=None)
        ratio = rates[ours] / best if best and ours in rates else None
        found.append(Goodput(workload, kvc, rates, ratio, _jct_ratio(ssr, jct_s, ours, peers)))
    return found


def _jct_ratio(
    ssr: Mapping[str, Mapping[float, float]],
    jct_s: Mapping[str, Mapping[float, float]],
    ours: str,
    peers: Sequence[str],
) -> float | None:
    known = [peer for peer in peers if peer in ssr]
    if ours not in ssr or not known:
        return None
    common = sorted(set(ssr[ours]).intersection(*(ssr[peer] for peer in known)))
    for rate in common:
        if all(ssr[peer][rate] < ATTAINMENT for peer in known):
            least = min(jct_s[peer][rate] for peer in known)
            return jct_s[ours][rate] / least if least > 0 else None
    return None


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean of what is known.

    Args:
        values: more than 0, or ``None``.

    Returns:
        The mean; ``None`` without values.
    """
    logs = [math.log(value) for value in values if value]
    return math.exp(statistics.fmean(logs)) if logs else None
