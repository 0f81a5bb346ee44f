"""``econoserve simulate``: runs policies in the simulator and prints what came of them.

Owns the command's arguments and its output. Several policies or rates are run side by side.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from econoserve.policies import POLICIES
from econoserve.prediction.registry import PREDICTORS, REPLAY_PREDICTORS
from econoserve.sim.instance import Results
from econoserve.sim.pool import SimulationError
from econoserve.sim.prefix import PrefixCaching
from econoserve.sim.profile import profile_names
from econoserve.sim.run import RunSpec, simulate
from econoserve.workload.objectives import parse_slo
from econoserve.workload.synthetic import synthetic_workloads
from econoserve.workload.workload import SYNTHETIC, WorkloadSpec

COLUMNS = {
    "policy": "policy",
    "rate_rps": "rate",
    "throughput_rps": "served/s",
    "goodput_rps": "goodput/s",
    "ssr": "SSR",
    "mean_jct_s": "mean JCT s",
    "p99_jct_s": "p99 JCT s",
    "mean_ttft_s": "mean TTFT s",
    "mean_tpot_s": "mean TPOT s",
    "preemptions": "preempted",
    "kvc_utilisation": "KVC held",
    "kvc_useful_utilisation": "useful",
    "wall_s": "wall s",
}
"""Figures of the table, and their headings."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments.

    Args:
        parser: of the subcommand.
    """
    names = ", ".join(SYNTHETIC + name for name in synthetic_workloads())
    predictors = ", ".join((*PREDICTORS, *REPLAY_PREDICTORS))
    add = parser.add_argument
    add(
        "--policy",
        required=True,
        nargs="+",
        choices=list(POLICIES),
        metavar="P",
        help=f"one or more of {', '.join(POLICIES)}",
    )
    add(
        "--trace",
        default="synthetic:sharegpt",
        metavar="T",
        help=f"a file (.csv, .jsonl, .tar.xz), or one of {names}. Default: %(default)s",
    )
    add(
        "--rate",
        required=True,
        nargs="+",
        type=float,
        metavar="R",
        help="mean arrivals per second, one or more",
    )
    add("--num-requests", type=int, default=500, metavar="N", help="default: %(default)s")
    add(
        "--arrivals",
        default="poisson",
        metavar="A",
        help="poisson, gamma:CV, or trace for the trace's times, scaled. Default: %(default)s",
    )
    add(
        "--hardware",
        required=True,
        metavar="H",
        help=f"with --model one of {', '.join(profile_names())}; or a profile's path",
    )
    add("--model", default="", metavar="M", help="the profile's model")
    add(
        "--slo",
        default="",
        metavar="SLO",
        help="objectives in seconds, such as ttft=0.25,tpot=0.1 or e2e=30. Default: none",
    )
    add(
        "--predictor",
        default="quantile",
        metavar="PRED",
        help=f"{predictors}; the last two know the true lengths. Default: %(default)s",
    )
    add("--kvc-tokens", type=int, metavar="K", help="size of the KVC, if not the profile's")
    add(
        "--max-running",
        type=int,
        default=256,
        metavar="B",
        help="most requests in a batch. Default: %(default)s",
    )
    add(
        "--overhead-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="time that scheduling adds to each iteration. Default: %(default)s",
    )
    add(
        "--prefix-caching",
        choices=[one.value for one in PrefixCaching],
        default=PrefixCaching.OFF.value,
        help="what the prefix cache keeps, where the trace names its blocks. Default: %(default)s",
    )
    add(
        "--results",
        choices=[one.value for one in Results],
        default=Results.AT_ONCE.value,
        help="when the scheduler knows of an iteration's results. Default: %(default)s",
    )
    add("--seed", type=int, default=0, metavar="S", help="of all that is drawn. Default: 0")
    add(
        "--jobs",
        type=int,
        default=0,
        metavar="J",
        help="runs at a time. Default: one for each core",
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
        results = list(_results(list(_specs(options)), options.jobs))
    except (ValueError, TypeError, OSError, SimulationError) as error:
        print(f"econoserve simulate: {error}", file=sys.stderr)
        return 2
    if options.output == "json":
        print(json.dumps(results[0] if len(results) == 1 else results, indent=2))
        return 0
    from tabulate import tabulate

    rows = [[_cell(result[name]) for name in COLUMNS] for result in results]
    align = ("left", *("right",) * (len(COLUMNS) - 1))
    print(
        tabulate(
            rows, list(COLUMNS.values()), tablefmt="github", colalign=align, disable_numparse=True
        )
    )
    return 0


def run_one(spec: RunSpec) -> dict[str, Any]:
    """One run, with what it was of and how long it took.

    Args:
        spec: what to run.

    Returns:
        Settings and figures; all but ``wall_s``, the last one, are the same for equal ``spec``.
    """
    begin_s = time.perf_counter()
    figures = simulate(spec).figures
    workload = spec.workload
    return {
        "policy": spec.policy,
        "trace": workload.trace,
        "rate_rps": workload.rate_rps,
        "arrivals": workload.arrivals,
        "hardware": spec.hardware,
        "model": spec.model,
        "predictor": spec.predictor,
        "seed": workload.seed,
        **figures,
        "wall_s": round(time.perf_counter() - begin_s, 3),
    }


def _specs(options: argparse.Namespace) -> Iterator[RunSpec]:
    slo = parse_slo(options.slo)
    for policy in options.policy:
        for rate_rps in options.rate:
            workload = WorkloadSpec(
                options.trace,
                rate_rps,
                options.num_requests,
                options.arrivals,
                slo,
                options.seed,
            )
            yield RunSpec(
                policy,
                workload,
                options.hardware,
                options.model,
                options.predictor,
                capacity_tokens=options.kvc_tokens,
                max_running=options.max_running,
                overhead_s=options.overhead_ms / 1e3,
                caching=PrefixCaching(options.prefix_caching),
                results=Results(options.results),
            )


def _results(specs: Sequence[RunSpec], jobs: int) -> Iterator[dict[str, Any]]:
    """The runs in their order; with more than one, in processes of their own."""
    if jobs < 0:
        raise ValueError(f"jobs={jobs}: give 1 or more, or 0 for one for each core")
    if len(specs) == 1:
        yield run_one(specs[0])
        return
    from tqdm import tqdm

    workers = min(jobs or os.cpu_count() or 1, len(specs))
    with ProcessPoolExecutor(workers) as pool:
        runs = pool.map(run_one, specs)
        yield from tqdm(runs, total=len(specs), unit="run", file=sys.stderr, leave=False)


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
