"""``econoserve report``: one HTML page of runs that it is given, does itself, or both."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from econoserve.arguments import file_of, whole_number
from econoserve.report.page import page
from econoserve.report.plots import ReportError, check_matplotlib
from econoserve.runs import RunError, run_all
from econoserve.simulate import SERIES_POINTS, add_run_arguments, run_specs

NEEDED = {"policy": str, "rate_rps": (int, float), "hardware": str, "trace": str}
"""What a result has at least."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments.

    Args:
        parser: of the subcommand.
    """
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="what econoserve simulate --output json printed",
    )
    parser.add_argument(
        "--out",
        type=file_of(".html"),
        default=Path("report.html"),
        metavar="PAGE",
        help="the page to write. Default: %(default)s",
    )
    parser.add_argument("--title", default="EconoServe: simulated runs", help="of the page")
    parser.add_argument(
        "--series",
        type=whole_number(2),
        default=SERIES_POINTS,
        metavar="POINTS",
        help="most points over time of runs that it does itself. Default: %(default)s",
    )
    runs = parser.add_argument_group("runs to do", "as in econoserve simulate")
    add_run_arguments(runs, required=False)


def main(options: argparse.Namespace) -> int:
    """Run the command.

    Args:
        options: as ``add_arguments`` describes them.

    Returns:
        The exit status: 0, or 2 after an error, which is printed.
    """
    try:
        check_matplotlib()
        results = [result for path in options.results for result in read_results(path)]
        if _runs_wanted(options):
            specs = run_specs(options, options.series)
            results.extend(run.result for run in run_all(specs, options.jobs))
        options.out.write_text(page(results, options.title) + "\n", encoding="utf-8")
    except (ReportError, RunError, ValueError, OSError) as error:
        print(f"econoserve report: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read what ``econoserve simulate --output json`` printed.

    Args:
        path: an object, or a list of them.

    Returns:
        Settings and figures of each run.

    Raises:
        ReportError: it is something else.
        OSError: it cannot be read.
    """
    hint = "give what econoserve simulate --output json printed"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path}: {error}; {hint}") from None
    results = found if isinstance(found, list) else [found]
    if not results:
        raise ReportError(f"{path}: no results; {hint}")
    for number, result in enumerate(results, 1):
        for name, kind in NEEDED.items():
            value = result.get(name) if isinstance(result, dict) else None
            if not isinstance(value, kind):
                raise ReportError(f"{path}: {name} of result {number} is {value!r}; {hint}")
    return results


def _runs_wanted(options: argparse.Namespace) -> bool:
    """Whether there are runs to do; all that they need is given then."""
    flags = {
        "--policy": options.policy,
        "--rate": options.rate,
        "--hardware": options.hardware,
    }
    missing = [flag for flag, value in flags.items() if value is None]
    if len(missing) == len(flags) and options.results:
        return False
    if missing:
        given = next((flag for flag, value in flags.items() if value is not None), None)
        begun = f"{given} starts runs, which need more" if given else "nothing to report"
        what = "" if options.results else "files with results, or "
        raise ReportError(f"{begun}: give {what}{', '.join(missing)}")
    return True
