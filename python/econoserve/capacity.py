"""``econoserve capacity``: the highest rate that policies sustain, or the replicas a rate needs.

Owns the command's arguments and its output. Several policies or seeds are searched side by side.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from econoserve.arguments import number, whole_number
from econoserve.report.table import cell
from econoserve.runs import RunError, settings_of, workers
from econoserve.sim.capacity import (
    ATTAIN,
    MIN_DURATION_S,
    TOLERANCE,
    Trial,
    capacity,
    fewest_instances,
)
from econoserve.sim.placement_search import Each, Limits, best_placement, fewest_gpus
from econoserve.sim.pool import SimulationError
from econoserve.sim.run import DISTSERVE, RunSpec
from econoserve.simulate import RATE, add_system_arguments, check_used, spec_of

COLUMNS = {
    "policy": "policy",
    "seed": "seed",
    "placement": "placement",
    "instances": "instances",
    "gpus": "GPUs",
    "rate_rps": "rate",
    "goodput_rps_per_gpu": "goodput/s a GPU",
    "ssr": "SSR",
    "mean_jct_s": "mean JCT s",
    "p99_jct_s": "p99 JCT s",
    "mean_ttft_s": "mean TTFT s",
    "mean_tpot_s": "mean TPOT s",
    "requests": "requests",
    "runs": "runs",
    "wall_s": "wall s",
}
"""Figures of the table, and their headings."""

INSTANCE_GPUS = 8
"""Most GPUs of an instance: those of a node."""

ANY_PLACEMENT = "prefill=1x1x1,decode=1x1x1"
"""Stands in a run whose placement is searched for."""


@dataclass(frozen=True, slots=True)
class Search:
    """What to search for.

    Attributes:
        spec: the run, with a guess of the rate, or the rate that is given.
        attain: share of requests that has to meet its SLO.
        min_duration_s: least time of arrivals in a run.
        tolerance: how close to come to the capacity.
        most_instances: look for the fewest replicas, up to so many; ``None`` to look for a rate.
        limits: look for a placement within them; ``None`` if the run states where it computes.
    """

    spec: RunSpec
    attain: float
    min_duration_s: float
    tolerance: float
    most_instances: int | None
    limits: Limits | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments.

    Args:
        parser: of the subcommand.
    """
    add_system_arguments(parser, required=True)
    add = parser.add_argument
    add(
        "--attain",
        type=number("a share above 0, and 1 or less", lambda share: 0 < share <= 1),
        default=ATTAIN,
        metavar="A",
        help="share of requests that has to meet all of --slo. Default: %(default)s",
    )
    add(
        "--min-duration-s",
        type=number("seconds, 0 or more", lambda seconds: seconds >= 0),
        default=MIN_DURATION_S,
        metavar="S",
        help="least time of arrivals in a run: it has the larger one of --num-requests and rate "
        "times this. Default: %(default)s",
    )
    add(
        "--tolerance",
        type=number("a share above 0, such as 0.02", lambda share: share > 0),
        default=TOLERANCE,
        metavar="T",
        help="how close to come, as a share of the rate. Default: %(default)s",
    )
    add(
        "--start-rate",
        type=RATE,
        default=1.0,
        metavar="R",
        help="where to begin the search; a good guess saves runs. Default: %(default)s",
    )
    add(
        "--gpus-for",
        type=RATE,
        metavar="R",
        help="find the fewest replicas for this rate instead; --instances is not used then",
    )
    add(
        "--max-instances",
        type=whole_number(1),
        default=64,
        metavar="N",
        help="most replicas that --gpus-for tries. Default: %(default)s",
    )
    add(
        "--max-gpus",
        type=whole_number(2),
        default=8,
        metavar="G",
        help=f"{DISTSERVE} without --disaggregate: most GPUs of a placement. Default: %(default)s",
    )
    add(
        "--evaluate",
        type=whole_number(1),
        default=8,
        metavar="K",
        help=f"{DISTSERVE} without --disaggregate: placements that are measured as a whole; with "
        "--gpus-for, of each number of GPUs. Default: %(default)s",
    )
    add(
        "--seed",
        type=whole_number(0),
        nargs="+",
        default=[0],
        metavar="S",
        help="of all that is drawn, one or more. Default: 0",
    )
    add("--output", choices=("table", "json"), default="table", help="default: %(default)s")


def main(options: argparse.Namespace) -> int:
    """Run the command.

    Args:
        options: as ``add_arguments`` describes them.

    Returns:
        The exit status: 0, or 2 after an error, which is printed.
    """
    try:
        results = list(_results(list(_searches(options)), options.jobs))
    except (RunError, ValueError, TypeError, OSError, SimulationError) as error:
        print(f"econoserve capacity: {error}", file=sys.stderr)
        return 2
    if options.output == "json":
        print(json.dumps(results[0] if len(results) == 1 else results, indent=2))
        return 0
    from tabulate import tabulate

    rows = [cells(result) for result in results]
    align = ("left", *("right",) * (len(COLUMNS) - 1))
    print(
        tabulate(
            rows, list(COLUMNS.values()), tablefmt="github", colalign=align, disable_numparse=True
        )
    )
    return 0


def cells(result: dict[str, Any]) -> list[str]:
    """A search's line in the table.

    Args:
        result: of ``search_one``.

    Returns:
        A cell for each of ``COLUMNS``; a rate above which none was found too high is marked, and
        so is where nothing was found.
    """
    row = {name: cell(result.get(name)) for name in COLUMNS}
    if result.get("above_rps", 0.0) is None:
        row["rate_rps"] = f"at least {row['rate_rps']}"
    if result["rate_rps"] == 0:
        row["rate_rps"] = "none"
    if result.get("instances") == 0:
        row["instances"] = f"over {max(trial['instances'] for trial in result['trials'])}"
    return list(row.values())


def search_one(search: Search, each: Each = map) -> dict[str, Any]:
    """One search, with what it was for and how long it took.

    Args:
        search: what to search for.
        each: runs the parts of a placement search side by side.

    Returns:
        Settings, what was found, the figures of the run there, and all trials; all but ``wall_s``,
        the last one, are the same for equal ``search``. Where nothing was found there are no
        figures of a run, and ``rate_rps`` or ``instances`` is 0.
    """
    begin_s = time.perf_counter()
    if search.limits is not None:
        found = _placement(search, search.limits, each)
    elif search.most_instances is None:
        found = _rate(search)
    else:
        found = _instances(search, search.most_instances)
    wall_s = round(time.perf_counter() - begin_s, 3)
    return {**settings_of(search.spec), "attain": search.attain, **found, "wall_s": wall_s}


def _rate(search: Search) -> dict[str, Any]:
    found = capacity(
        search.spec,
        search.attain,
        min_duration_s=search.min_duration_s,
        tolerance=search.tolerance,
    )
    # JSON has no infinity.
    above_rps = found.above_rps if found.above_rps < float("inf") else None
    answer = {"rate_rps": found.rate_rps, "above_rps": above_rps}
    return {**found.figures, **answer, **_trials(found.trials)}


def _instances(search: Search, most: int) -> dict[str, Any]:
    found = fewest_instances(
        search.spec, search.attain, min_duration_s=search.min_duration_s, most=most
    )
    return {**found.figures, "instances": found.instances, **_trials(found.trials)}


def _trials(trials: Sequence[Trial]) -> dict[str, Any]:
    shown = [
        {
            "rate_rps": trial.rate_rps,
            "instances": trial.instances,
            "requests": trial.requests,
            "attained": trial.attained,
            "ssr": trial.figures.get("ssr"),
        }
        for trial in trials
    ]
    return {"runs": len(shown), "trials": shown}


def _placement(search: Search, limits: Limits, each: Each) -> dict[str, Any]:
    if search.most_instances is None:
        found = best_placement(
            search.spec,
            search.attain,
            limits=limits,
            min_duration_s=search.min_duration_s,
            tolerance=search.tolerance,
            each=each,
        )
    else:
        found = fewest_gpus(
            search.spec,
            search.attain,
            limits=limits,
            min_duration_s=search.min_duration_s,
            each=each,
        )
    return {
        **found.figures,
        "placement": str(found.placement) if found.placement else None,
        "rate_rps": found.rate_rps,
        "phases": [
            {
                "phase": phase.stage.value,
                "tensor": phase.parallelism.tensor,
                "pipeline": phase.parallelism.pipeline,
                "rate_rps": phase.rate_rps,
            }
            for phase in found.phases
        ],
        "placements": [
            {"placement": str(placement), "gpus": placement.gpus, "rate_rps": rate_rps}
            for placement, rate_rps in found.tried
        ],
    }


def _searches(options: argparse.Namespace) -> Iterator[Search]:
    check_used(options)
    most = None if options.gpus_for is None else options.max_instances
    rate_rps = options.start_rate if options.gpus_for is None else options.gpus_for
    for policy in options.policy:
        limits = None
        if policy == DISTSERVE and not options.disaggregate:
            if options.instances > 1 and options.gpus_for is None:
                raise ValueError(
                    f"--instances {options.instances}: without --disaggregate a search finds the "
                    f"instances of {DISTSERVE} itself: leave it out, and give --max-gpus"
                )
            limits = Limits(
                options.max_gpus, min(INSTANCE_GPUS, options.max_gpus), options.evaluate
            )
        for seed in options.seed:
            told = options
            if limits is not None:
                told = argparse.Namespace(
                    **{**vars(options), "disaggregate": ANY_PLACEMENT, "instances": 1}
                )
            spec = spec_of(told, policy, rate_rps, seed)
            yield Search(
                spec, options.attain, options.min_duration_s, options.tolerance, most, limits
            )


def _results(searches: Sequence[Search], jobs: int | None) -> Iterator[dict[str, Any]]:
    """The searches in their order, side by side; so are the parts of a placement search."""
    from tqdm import tqdm

    with (
        workers(jobs or os.cpu_count() or 1) as side_by_side,
        tqdm(total=len(searches), unit="search", file=sys.stderr, leave=False) as bar,
    ):

        def each(search: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            """Do parts of a search side by side, and count them, too."""
            parts = list(items)
            bar.total += len(parts)
            for part in side_by_side(search, parts):
                bar.update()
                yield part

        others = side_by_side(search_one, [s for s in searches if s.limits is None])
        for search in searches:
            yield next(others) if search.limits is None else search_one(search, each)
            bar.update()
