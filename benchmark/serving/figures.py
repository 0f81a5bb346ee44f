"""Figures of a run from what came of its requests.

Owns no definition of a figure that ``econoserve.sim.records`` has: SSR, goodput, JCT, TTFT and TPOT
mean the same as in the simulator.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmark.serving.workloads import Request
from econoserve.core.types import Outcome
from econoserve.sim.records import KvcUse, RequestRecord, summarise

SIMULATED_ONLY = (
    "cached_tokens",
    "preemptions",
    "recomputed_tokens",
    "kvc_utilisation",
    "kvc_useful_utilisation",
    "kvc_useful_utilisation_backlog",
    "iterations",
    "mean_forward_tokens",
)
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
        found["p50_tpot_s"] = float(np.median(tpot_s)) if tpot_s else None
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
) -> dict[str, dict[str, float | None]]:
    """SSR and completion time of each class of requests.

    Args:
        requests: as they were sent.
        records: what came of them.

    Returns:
        By class; a time is ``None`` if none of it was served.
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
            "mean_jct_s": round(statistics.fmean(served), 4) if served else None,
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
