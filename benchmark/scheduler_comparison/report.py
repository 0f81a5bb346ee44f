"""Prints a comparison: as a table, as a Markdown page and as JSON.

Owns how results look. It must never write a host's name or a path into them.
"""

import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmark.scheduler_comparison.figures import Row, Run, Spread, compare, compare_outputs

HEADERS = ("KVC tokens", "metric", "stock SGLang", "EconoServe", "EconoServe / stock")
PACKAGES = ("econoserve", "sglang", "torch", "transformers")
OUTPUT_FLAGS = ("--json", "--markdown")

EXPLANATION = """\
Every request states the same `max_new_tokens`; a logit processor, the same for both systems, ends \
each response at its length. No scheduler sees that length. Each run starts an engine, warms it up \
with other requests from the same distribution, empties its prefix cache, and sends the measured \
requests. EconoServe predicts lengths from the responses that have ended before, those of the \
warm-up among them. Runs alternate between the systems, one at a time, in an order that is \
reversed from one repeat to the next.

Times are the client's, from a request's arrival: TTFT to its first token, JCT to its last, TPOT \
per token after the first. Preemptions are requests that lost their KV cache and were computed \
again. Figures are medians over the repeats, with the lowest and the highest in brackets; ratios \
are taken repeat by repeat. Absolute figures depend on the machine: compare within a row.

Greedy outputs can differ between runs of one system, too: which requests share a forward pass \
changes the rounding of float32, and two tokens may be closer than that."""


def spread_text(spread: Spread | None, digits: int) -> str:
    """Write a figure.

    Args:
        spread: the figure over the repeats.
        digits: decimals.

    Returns:
        The median, and the range in brackets unless all repeats agree.
    """
    if spread is None:
        return "-"
    median, lowest, highest = (
        f"{value:,.{digits}f}" for value in (spread.median, spread.lowest, spread.highest)
    )
    return median if lowest == highest else f"{median} [{lowest}, {highest}]"


def table(rows: Sequence[Row], table_format: str = "simple") -> str:
    """Lay out the result.

    Args:
        rows: what to show.
        table_format: a format of ``tabulate``.

    Returns:
        The table.
    """
    cells, shown = [], None
    for row in rows:
        digits = row.metric.digits
        cells.append(
            (
                f"{row.kvc_tokens:,}" if row.kvc_tokens != shown else "",
                row.metric.title,
                spread_text(row.stock, digits),
                spread_text(row.econoserve, digits),
                spread_text(row.ratio, 2),
            )
        )
        shown = row.kvc_tokens
    alignment = ("right", "left", "right", "right", "right")
    return tabulate(
        cells, HEADERS, tablefmt=table_format, disable_numparse=True, colalign=alignment
    )


def machine() -> dict[str, Any]:
    """What the figures were measured on, without its name.

    Returns:
        The processor's model, the number of CPUs this process may use, and the architecture.
    """
    model = platform.processor() or "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu_model": model, "cpus": cpus, "architecture": platform.machine()}


def versions() -> dict[str, str]:
    """The software that was measured.

    Returns:
        Versions by package, and Python's.
    """
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def command(arguments: Sequence[str]) -> str:
    """The command that repeats a measurement.

    Args:
        arguments: those of this run.

    Returns:
        A command line without output files and without folders.
    """
    kept: list[str] = []
    skip = False
    for argument in arguments:
        flag = argument.split("=")[0]
        if skip or flag in OUTPUT_FLAGS:
            skip = not skip and "=" not in argument
            continue
        kept.append(Path(argument).name if os.sep in argument else argument)
    return shlex.join(["python", "-m", "benchmark.scheduler_comparison.run", *kept])


def checks(runs: Sequence[Run]) -> dict[str, Any]:
    """What was verified.

    Args:
        runs: all runs.

    Returns:
        Counts: responses, failures, equal and compared outputs; and where outputs differ.
    """
    compared, differences = compare_outputs(runs)
    return {
        "responses": sum(len(run.answers) for run in runs),
        "failures": sum(len(run.failures) for run in runs),
        "equal_outputs": compared - len(differences),
        "compared_outputs": compared,
        "differences": [asdict(difference) for difference in differences],
    }


def checks_text(runs: Sequence[Run]) -> str:
    """What was verified, in words.

    Args:
        runs: all runs.

    Returns:
        One line.
    """
    found = checks(runs)
    lengths = (
        f"all {found['responses']:,} responses have exactly the intended length"
        if found["failures"] == 0
        else f"{found['failures']:,} failures in {found['responses']:,} responses"
    )
    return (
        f"{lengths}; {found['equal_outputs']:,} of {found['compared_outputs']:,} greedy outputs "
        "are equal between the systems"
    )


def as_json(
    runs: Sequence[Run], settings: dict[str, Any], arguments: Sequence[str]
) -> dict[str, Any]:
    """Everything that was measured.

    Args:
        runs: all runs.
        settings: what was run.
        arguments: the command line.

    Returns:
        Plain values; token ids are left out.
    """
    return {
        "command": command(arguments),
        "settings": settings,
        "versions": versions(),
        "machine": machine(),
        "checks": checks(runs),
        "failures": [failure for run in runs for failure in run.failures],
        "summary": [asdict(row) for row in compare(runs)],
        "runs": [
            {
                **asdict(run),
                "answers": [
                    {key: value for key, value in answer.items() if key != "output_ids"}
                    for answer in run.answers
                ],
            }
            for run in runs
        ],
    }


def as_markdown(runs: Sequence[Run], settings: dict[str, Any], arguments: Sequence[str]) -> str:
    """A page with the result.

    Args:
        runs: all runs.
        settings: what was run.
        arguments: the command line.

    Returns:
        Markdown.
    """
    host, packages = machine(), versions()
    facts = [
        *((name.replace("_", " "), _value_text(value)) for name, value in settings.items()),
        ("machine", f"{host['cpu_model']}, {host['cpus']} CPUs, {host['architecture']}"),
        ("software", ", ".join(f"{name} {number}" for name, number in packages.items())),
    ]
    return (
        "\n\n".join(
            (
                "# Stock SGLang and EconoServe side by side",
                f"```\n{command(arguments)}\n```",
                table(compare(runs), "github"),
                f"Checked: {checks_text(runs)}.",
                "## How it was measured",
                EXPLANATION,
                tabulate(facts, ("setting", "value"), tablefmt="github", disable_numparse=True),
            )
        )
        + "\n"
    )


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value_text(inner)}" for name, inner in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value_text(inner) for inner in value) or "-"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
