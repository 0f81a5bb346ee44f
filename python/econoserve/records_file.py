"""The file with what came of each request of one or more runs.

Owns its columns.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from econoserve.core.types import Slo
from econoserve.runs import Run
from econoserve.sim.records import RequestRecord


def row(run: Run, record: RequestRecord) -> dict[str, Any]:
    """A line of the file.

    Args:
        run: of which run.
        record: what came of a request.

    Returns:
        Values by column; ``None`` for what there is not, such as the JCT of a request that was
        refused, or ``met`` without an objective.
    """
    return {
        "policy": run.spec.policy,
        "rate_rps": run.spec.workload.rate_rps,
        "rid": record.rid,
        "arrival_s": record.arrival_s,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "demand_token_iterations": record.demand_token_iterations,
        "outcome": record.outcome.value if record.outcome else None,
        "first_token_s": record.first_token_s,
        "end_s": record.end_s,
        "ttft_s": _finite(record.ttft_s),
        "tpot_s": _finite(record.tpot_s),
        "jct_s": _finite(record.jct_s),
        "met": None if record.slo == Slo() else record.met,
        "preemptions": record.preemptions,
        "recomputed_tokens": record.recomputed_tokens,
        "cached_tokens": record.cached_tokens,
    }


@contextmanager
def records_file(path: Path | None) -> Iterator[Callable[[Run], None]]:
    """Open the file, as its name ends: ``.csv``, or else a JSON object in each line.

    Args:
        path: where to; ``None`` for nowhere.

    Yields:
        What adds the requests of a run.

    Raises:
        OSError: it cannot be written.
    """
    if path is None:
        yield lambda run: None
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        table: csv.DictWriter | None = None

        def add_csv(run: Run) -> None:
            nonlocal table
            for record in run.records:
                fields = row(run, record)
                if table is None:
                    table = csv.DictWriter(file, list(fields))
                    table.writeheader()
                table.writerow(fields)

        def add_lines(run: Run) -> None:
            for record in run.records:
                file.write(json.dumps(row(run, record)) + "\n")

        yield add_csv if path.suffix == ".csv" else add_lines


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else value
