"""Keeps what stages found, so that a check can go on where it stopped, and prints it as a table.

Owns the folder of results and how they look.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

DONE, FAILED = "done", "failed"
HEADERS = ("stage", "measured", "stock SGLang", "EconoServe", "ratio", "target", "")

LEAST_THROUGHPUT = 1.0
LEAST_GOODPUT = 1.5
MOST_OVERHEAD = 0.05


@dataclass(frozen=True, slots=True)
class Results:
    """Results by stage, one JSON file each.

    Attributes:
        folder: where they are.
    """

    folder: Path

    def keep(
        self, stage: str, status: str, seconds: float, value: dict[str, Any] | None, error: str = ""
    ) -> None:
        """Write a stage's result.

        Args:
            stage: its name.
            status: ``DONE`` or ``FAILED``.
            seconds: how long it took.
            value: what it found.
            error: what went wrong.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {
            "stage": stage,
            "status": status,
            "seconds": round(seconds, 1),
            "error": error,
            "value": value,
        }
        path = self._path(stage)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.rename(path)

    def read(self, stage: str) -> dict[str, Any] | None:
        """A stage's record.

        Args:
            stage: its name.

        Returns:
            What ``keep`` wrote; ``None`` if there is none.
        """
        path = self._path(stage)
        return json.loads(path.read_text()) if path.exists() else None

    def value(self, stage: str) -> dict[str, Any] | None:
        """What a stage found.

        Args:
            stage: its name.

        Returns:
            Its value; ``None`` unless it is done.
        """
        record = self.read(stage)
        return record["value"] if record is not None and record["status"] == DONE else None

    def forget(self, stage: str) -> None:
        """Remove a stage's result.

        Args:
            stage: its name.
        """
        self._path(stage).unlink(missing_ok=True)

    def _path(self, stage: str) -> Path:
        return self.folder / f"{stage}.json"


def table(results: Results, stages: Iterable[str]) -> str:
    """Lay the results out.

    Args:
        results: all.
        stages: names, in the order of the rows.

    Returns:
        A table; stages without a result are named in it.
    """
    rows = []
    for stage in stages:
        record = results.read(stage)
        if record is None:
            rows.append((stage, "not run", *[""] * 5))
            continue
        seconds = f"{record['seconds']:.0f} s"
        if record["status"] != DONE:
            first = record["error"].strip().splitlines()[-1:] or [""]
            rows.append((stage, f"FAILED: {first[0][:60]}", "", "", "", "", seconds))
            continue
        for number, row in enumerate(_rows(stage, record["value"])):
            rows.append((stage if number == 0 else "", *row, seconds if number == 0 else ""))
    return tabulate(rows, HEADERS, disable_numparse=True)


def _rows(stage: str, value: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    kind = stage.split("-")[0]
    return {
        "imports": _imports,
        "kernels": _kernels,
        "correctness": _correctness,
        "iterations": _iterations,
        "throughput": _throughput,
        "goodput": _goodput,
        "profile": _profile,
    }[kind](value)


def _imports(value: dict[str, Any]) -> list[tuple]:
    versions = ", ".join(f"{name} {value['versions'][name]}" for name in ("sglang", "torch"))
    return [(f"doctor content; {value['device']}", versions, "", "", "")]


def _kernels(value: dict[str, Any]) -> list[tuple]:
    compiled = f"{len(value['compiled'])} modules"
    return [("first start, kernels compiled (s)", compiled, f"{value['start_s']:.1f}", "", "")]


def _correctness(value: dict[str, Any]) -> list[tuple]:
    equal = f"{value['equal_requests']} of {value['requests']}"
    disturbed = f"{value['disturbed']} parked or preempted"
    return [("equal greedy outputs", disturbed, equal, f"{value['equal_tokens']:.3f}", "")]


def _iterations(value: dict[str, Any]) -> list[tuple]:
    rows = []
    for theirs, mine in zip(value["decode"]["stock"], value["decode"]["econoserve"], strict=True):
        title = f"decode ms, batch {mine['running']}, context {mine['context_tokens']}"
        times = theirs["iteration_ms"], mine["iteration_ms"]
        ratio = f"{times[1] / times[0]:.2f}" if times[0] > 0 else "-"
        rows.append((title, *(f"{one:.2f}" for one in times), ratio, ""))
    for one in value["mixed"]:
        if one["iteration_ms"] is not None:
            context = one["context_tokens"] / one["running"]
            title = (
                f"mixed ms, batch {one['running']} of {context:.0f} and {one['tokens']:.0f} of "
                f"{one['prompt_tokens']} prompt tokens"
            )
            rows.append((title, "", f"{one['iteration_ms']:.2f}", "", ""))
    overhead = value["overhead"]
    share = overhead["scheduling"]
    target = f"< {MOST_OVERHEAD:.0%}: {'kept' if share < MOST_OVERHEAD else 'missed'}"
    title = f"planning and bookkeeping ms, batch {overhead['running']}"
    rows.append((title, "", f"{overhead['scheduling_ms']:.3f}", f"{share:.1%}", target))
    title = f"added to a decode iteration, batch {overhead['running']}"
    rows.append((title, "", _percent(overhead["added"]), "", ""))
    return rows


def _percent(spread: list[float] | None) -> str:
    if spread is None:
        return "-"
    median, low, high = (f"{one:+.1%}" for one in spread)
    return median if low == high else f"{median} [{low}, {high}]"


def _throughput(value: dict[str, Any]) -> list[tuple]:
    return [_compared("output tokens/s", value["throughput"], 0, LEAST_THROUGHPUT)]


def _goodput(value: dict[str, Any]) -> list[tuple]:
    title = f"goodput (requests/s), SLO {value['slo_ms'] / 1e3:.1f} s"
    return [
        _compared(title, value["goodput"], 2, LEAST_GOODPUT),
        _compared("share of SLOs met", value["slo_met"], 3, None),
        _compared("output tokens/s", value["throughput"], 0, None),
    ]


def _profile(value: dict[str, Any]) -> list[tuple]:
    rows = []
    for model, regimes in value.items():
        for regime in ("decode", "mixed"):
            fitted = regimes[regime]
            numbers = " ".join(f"{one:.2e}" for one in fitted["coefficients_s"])
            error = f"error {fitted['mean_relative_error']:.1%}"
            rows.append((f"{model}, {regime}: c0 to c4 (s)", error, numbers, "", ""))
    return rows


def _compared(title: str, value: dict[str, Any], digits: int, least: float | None) -> tuple:
    ratio = value["ratio"]
    target = ""
    if least is not None and ratio is not None:
        target = f">= {least:g}: {'kept' if ratio[0] >= least else 'missed'}"
    texts = [_spread_text(value[name], digits) for name in ("stock", "econoserve")]
    return (title, *texts, _spread_text(ratio, 2), target)


def _spread_text(spread: list[float] | None, digits: int) -> str:
    if spread is None:
        return "-"
    median, low, high = (f"{one:,.{digits}f}" for one in spread)
    return median if low == high else f"{median} [{low}, {high}]"
