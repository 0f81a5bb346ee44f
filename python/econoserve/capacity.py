"""``econoserve capacity``: the highest rate that policies sustain, or the replicas a rate needs.

Owns the command's arguments and its output. Several policies or seeds are searched side by side.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from econoserve.sim.capacity import (
    ATTAIN,
    MIN_DURATION_S,
    TOLERANCE,
    capacity,
    fewest_instances,
)
from econoserve.sim.pool import SimulationError
from econoserve.sim.run import RunSpec
from econoserve.simulate import SEED_HELP, add_run_arguments, settings_of, spec_of

COLUMNS = {
    "policy": "policy",
    "seed": "seed",
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


@dataclass(frozen=True, slots=True)
class Search:
    """What to search for.

    Attributes:
        spec: the run, with a guess of the rate, or the rate that is given.
        attain: share of requests that has to meet its SLO.
        min_duration_s: least time of arrivals in a run.
        tolerance: how close to come to the capacity.
        most_instances: look for the fewest replicas, up to so many; ``None`` to look for a rate.
    """

    spec: RunSpec
    attain: float
    min_duration_s: float
    tolerance: float
    most_instances: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments.

    Args:
        parser: of the subcommand.
    """
    add_run_arguments(parser)
    add = parser.add_argument
    add(
        "--attain",
        type=float,
        default=ATTAIN,
        metavar="A",
        help="share of requests that has to meet all of --slo. Default: %(default)s",
    )
    add(
        "--min-duration-s",
        type=float,
        default=MIN_DURATION_S,
        metavar="S",
        help="least time of arrivals in a run: it has the larger one of --num-requests and rate "
        "times this. Default: %(default)s",
    )
    add(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="T",
        help="how close to come, as a share of the rate. Default: %(default)s",
    )
    add(
        "--start-rate",
        type=float,
        default=1.0,
        metavar="R",
        help="where to begin the search; a good guess saves runs. Default: %(default)s",
    )
    add(
        "--gpus-for",
        type=float,
        metavar="R",
        help="find the fewest replicas for this rate instead; --instances is not used then",
    )
    add(
        "--max-instances",
        type=int,
        default=64,
        metavar="N",
        help="most replicas that --gpus-for tries. Default: %(default)s",
    )
    add("--seed", type=int, nargs="+", default=[0], metavar="S", help=SEED_HELP)


def main(options: argparse.Namespace) -> int:
    """Run the command.

    Args:
        options: as ``add_arguments`` describes them.

    Returns:
        The exit status: 0, or 2 after an error, which is printed.
    """
    try:
        results = list(_results(list(_searches(options)), options.jobs))
    except (ValueError, TypeError, OSError, SimulationError) as error:
        print(f"econoserve capacity: {error}", file=sys.stderr)
        return 2
    if options.output == "json":
        print(json.dumps(results[0] if len(results) == 1 else results, indent=2))
        return 0
    from tabulate import tabulate

    rows = [[_cell(result.get(name, "-")) for name in COLUMNS] for result in results]
    align = ("left", *("right",) * (len(COLUMNS) - 1))
    print(
        tabulate(
            rows, list(COLUMNS.values()), tablefmt="github", colalign=align, disable_numparse=True
        )
    )
    return 0


def search_one(search: Search) -> dict[str, Any]:
    """One search, with what it was for and how long it took.

    Args:
        search: what to search for.

    Returns:
        Settings, what was found, the figures of the run there, and all trials; all but ``wall_s``,
        the last one, are the same for equal ``search``. Where nothing was found there are no
        figures of a run, and ``rate_rps`` or ``instances`` is 0.
    """
    begin_s = time.perf_counter()
    spec = search.spec
    if search.most_instances is None:
        found = capacity(
            spec,
            search.attain,
            min_duration_s=search.min_duration_s,
            tolerance=search.tolerance,
        )
        # JSON has no infinity.
        above_rps = found.above_rps if found.above_rps < float("inf") else None
        answer = {"rate_rps": found.rate_rps, "above_rps": above_rps}
    else:
        found = fewest_instances(
            spec, search.attain, min_duration_s=search.min_duration_s, most=search.most_instances
        )
        answer = {"instances": found.instances}
    trials = [
        {
            "rate_rps": trial.rate_rps,
            "instances": trial.instances,
            "requests": trial.requests,
            "attained": trial.attained,
            "ssr": trial.figures.get("ssr"),
        }
        for trial in found.trials
    ]
    return {
        **settings_of(spec),
        "attain": search.attain,
        **found.figures,
        **answer,
        "runs": len(trials),
        "trials": trials,
        "wall_s": round(time.perf_counter() - begin_s, 3),
    }


def _searches(options: argparse.Namespace) -> Iterator[Search]:
    most = None if options.gpus_for is None else options.max_instances
    rate_rps = options.start_rate if options.gpus_for is None else options.gpus_for
    for policy in options.policy:
        for seed in options.seed:
            spec = spec_of(options, policy, rate_rps, seed)
            yield Search(spec, options.attain, options.min_duration_s, options.tolerance, most)


def _results(searches: Sequence[Search], jobs: int) -> Iterator[dict[str, Any]]:
    """The searches in their order; with more than one, in processes of their own."""
    if jobs < 0:
        raise ValueError(f"jobs={jobs}: give 1 or more, or 0 for one for each core")
    if len(searches) == 1:
        yield search_one(searches[0])
        return
    from tqdm import tqdm

    workers = min(jobs or os.cpu_count() or 1, len(searches))
    with ProcessPoolExecutor(workers) as pool:
        found = pool.map(search_one, searches)
        yield from tqdm(found, total=len(searches), unit="search", file=sys.stderr, leave=False)


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
