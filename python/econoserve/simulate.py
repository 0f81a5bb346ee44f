"""``econoserve simulate``: runs policies in the simulator and prints what came of them.

Owns the arguments that say what to run, and the command's output.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from econoserve.arguments import checked, file_of, number, whole_number
from econoserve.policies import POLICIES
from econoserve.prediction.registry import PREDICTORS, REPLAY_PREDICTORS, make_replay_predictor
from econoserve.records_file import records_file
from econoserve.report.page import page
from econoserve.report.plots import ReportError, check_matplotlib
from econoserve.report.table import COLUMNS, cells
from econoserve.runs import RunError, run_all, shortfall
from econoserve.sim.machine import Results
from econoserve.sim.placement import parse_placement
from econoserve.sim.prefix import PrefixCaching
from econoserve.sim.profile import load_profile, profile_names
from econoserve.sim.routing import ROUTERS
from econoserve.sim.run import DISTSERVE, LEVEL, RunSpec
from econoserve.workload.objectives import parse_slo
from econoserve.workload.synthetic import synthetic_workloads
from econoserve.workload.workload import SYNTHETIC, WorkloadSpec, arrival_process

RATE = number("requests per second, more than 0", lambda rate: rate > 0)

SERIES_POINTS = 300
"""Points of the series on a page. Ours."""


def add_run_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Describe the arguments that say what to run.

    Args:
        parser: of a subcommand.
        required: whether there is nothing to do without them.
    """
    add_system_arguments(parser, required)
    parser.add_argument(
        "--rate",
        required=required,
        nargs="+",
        type=RATE,
        metavar="R",
        help="mean arrivals per second, one or more",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="S",
        help="of all that is drawn. Default: %(default)s",
    )


def add_system_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Describe the arguments that say what to run, whatever its rate and seed.

    Args:
        parser: of a subcommand.
        required: whether there is nothing to do without them.
    """
    names = ", ".join(SYNTHETIC + name for name in synthetic_workloads())
    predictors = ", ".join((*PREDICTORS, *REPLAY_PREDICTORS))
    add = parser.add_argument
    add(
        "--policy",
        required=required,
        nargs="+",
        choices=[*POLICIES, DISTSERVE],
        metavar="P",
        help=f"one or more of {', '.join(POLICIES)}; or {DISTSERVE}",
    )
    add(
        "--trace",
        default="synthetic:sharegpt",
        metavar="T",
        help=f"a file (.csv, .jsonl, .tar.xz), or one of {names}. Default: %(default)s",
    )
    add(
        "--trace-window",
        type=_window,
        metavar="FROM-TO",
        help="only these hours of a trace with times, such as 9-12. Default: all",
    )
    add(
        "--num-requests",
        type=whole_number(1),
        default=500,
        metavar="N",
        help="default: %(default)s",
    )
    add(
        "--arrivals",
        type=checked(arrival_process),
        default="poisson",
        metavar="A",
        help="poisson, gamma:CV, or trace for the trace's times, scaled. Default: %(default)s",
    )
    add(
        "--hardware",
        required=required,
        metavar="H",
        help=f"with --model one of {', '.join(profile_names())}; or a profile's path",
    )
    add("--model", default="", metavar="M", help="the profile's model")
    add(
        "--slo",
        type=checked(parse_slo),
        default="",
        metavar="SLO",
        help="objectives in seconds, such as ttft=0.25,tpot=0.1 or e2e=30. Default: none",
    )
    add(
        "--predictor",
        type=checked(_check_predictor),
        default="quantile",
        metavar="PRED",
        help=f"{predictors}; the last two know the true lengths. Default: %(default)s",
    )
    add(
        "--kvc-tokens",
        type=whole_number(2),
        metavar="K",
        help="size of the KVC, if not the profile's",
    )
    add(
        "--max-running",
        type=whole_number(1),
        default=256,
        metavar="B",
        help="most requests in a batch. Default: %(default)s",
    )
    add(
        "--overhead-ms",
        type=number("milliseconds, 0 or more", lambda overhead: overhead >= 0),
        default=0.0,
        metavar="MS",
        help="time that scheduling adds to each iteration. Default: %(default)s",
    )
    add(
        "--instances",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="replicas, each on hardware of its own. Default: %(default)s",
    )
    add(
        "--router",
        default="round-robin",
        choices=ROUTERS,
        help=f"gives requests to the replicas; not used by {DISTSERVE}. Default: %(default)s",
    )
    add(
        "--tensor",
        type=whole_number(1),
        metavar="TP",
        help="GPUs that share each layer, if not the profile's",
    )
    add(
        "--disaggregate",
        type=checked(parse_placement),
        metavar="PLACEMENT",
        help=f"where {DISTSERVE} computes, as prefill=TPxPPxN,decode=TPxPPxN: tensor parallelism, "
        "pipeline stages and instances of each phase",
    )
    add(
        "--link-gb-per-s",
        type=number("10^9 bytes per second, more than 0", lambda rate: rate > 0),
        metavar="GB",
        help="bandwidth in 10^9 bytes per second for KVC between instances, if not the profile's",
    )
    add(
        "--prefix-caching",
        choices=[one.value for one in PrefixCaching],
        default=PrefixCaching.OFF.value,
        help="what the prefix cache keeps, where the trace names its blocks. Default: %(default)s",
    )
    add(
        "--results",
        dest="known",
        choices=[one.value for one in Results],
        default=Results.AT_ONCE.value,
        help="when the scheduler knows of an iteration's results. Default: %(default)s",
    )
    add(
        "--jobs",
        type=whole_number(1),
        metavar="J",
        help="runs at a time. Default: one for each core",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments.

    Args:
        parser: of the subcommand.
    """
    add_run_arguments(parser, required=True)
    add = parser.add_argument
    add(
        "--output",
        choices=("table", "json", "html"),
        default="table",
        help="default: %(default)s. html is the page of econoserve report",
    )
    add(
        "--series",
        type=whole_number(2),
        metavar="POINTS",
        help="with json: add series over time, of so many points at most, and the distribution of "
        "JCT, as econoserve report draws them",
    )
    add(
        "--records",
        type=file_of(".jsonl", ".csv"),
        metavar="FILE",
        help="write what came of each request to a .jsonl or .csv file",
    )


def main(options: argparse.Namespace) -> int:
    """Run the command.

    Args:
        options: as ``add_arguments`` describes them.

    Returns:
        The exit status: 0, or 2 after an error, which is printed.
    """
    try:
        if options.series and options.output == "table":
            raise ValueError(
                f"--series {options.series}: a table shows none: add --output json, or leave it out"
            )
        if options.output == "html":
            check_matplotlib()
        points = options.series or (SERIES_POINTS if options.output == "html" else 0)
        specs, results = run_specs(options, points), []
        with records_file(options.records) as add:
            for run in run_all(specs, options.jobs):
                results.append(run.result)
                add(run)
                if missing := shortfall(run):
                    print(f"econoserve simulate: {missing}", file=sys.stderr)
        print(_text(results, options.output))
    except (RunError, ReportError, ValueError, OSError) as error:
        print(f"econoserve simulate: {error}", file=sys.stderr)
        return 2
    return 0


def run_specs(options: argparse.Namespace, series_points: int = 0) -> list[RunSpec]:
    """The runs that the arguments ask for: every policy at every rate.

    Args:
        options: as ``add_run_arguments`` describes them.
        series_points: most points of the series over time; 0 for none.

    Returns:
        What to run.

    Raises:
        ValueError: there is no such profile, or a flag is used by no policy; names the flag.
    """
    check_used(options)
    return [
        spec_of(options, policy, rate_rps, options.seed, series_points)
        for policy in options.policy
        for rate_rps in options.rate
    ]


def check_used(options: argparse.Namespace) -> None:
    """Refuse flags that none of the policies uses.

    Args:
        options: as ``add_system_arguments`` describes them.

    Raises:
        ValueError: a flag would change nothing; names it.
    """
    others = [policy for policy in options.policy if policy != DISTSERVE]
    if len(others) == len(options.policy):
        flags = {
            "--disaggregate": options.disaggregate,
            "--link-gb-per-s": options.link_gb_per_s,
        }
        for flag, value in flags.items():
            if value is not None:
                raise ValueError(f"{flag} {value}: only --policy {DISTSERVE} uses it; leave it out")
    elif not others and options.tensor is not None:
        raise ValueError(
            f"--tensor {options.tensor}: the placement of {DISTSERVE} states it; leave it out"
        )


def spec_of(
    options: argparse.Namespace, policy: str, rate_rps: float, seed: int, series_points: int = 0
) -> RunSpec:
    """The run of a policy at a rate.

    Args:
        options: as ``add_system_arguments`` describes them.
        policy: one of those.
        rate_rps: mean arrivals per second.
        seed: of all that is drawn.
        series_points: most points of the series over time; 0 for none.

    Returns:
        What to run.

    Raises:
        ValueError: there is no such profile, or no placement; names the flag.
    """
    _check_profile(options.hardware, options.model)
    apart = policy == DISTSERVE
    if apart and not options.disaggregate:
        raise ValueError(f"--policy {DISTSERVE}: give --disaggregate, too")
    link_gb_per_s = options.link_gb_per_s
    if apart and link_gb_per_s is None:
        profile = load_profile(options.hardware, options.model)
        if not profile.link_bytes_per_s:
            raise ValueError(f"--link-gb-per-s is missing: profile {profile.name} states none")
    return RunSpec(
        policy,
        WorkloadSpec(
            options.trace,
            rate_rps,
            options.num_requests,
            options.arrivals,
            parse_slo(options.slo),
            seed,
            options.trace_window,
        ),
        options.hardware,
        options.model,
        options.predictor,
        capacity_tokens=options.kvc_tokens,
        max_running=options.max_running,
        overhead_s=options.overhead_ms / 1e3,
        caching=PrefixCaching(options.prefix_caching),
        results=Results(options.known),
        series_points=series_points,
        instances=options.instances,
        router=options.router,
        tensor=None if apart else options.tensor,
        placement=parse_placement(options.disaggregate) if apart else None,
        link_bytes_per_s=None if link_gb_per_s is None else link_gb_per_s * 1e9,
    )


def _check_profile(hardware: str, model: str) -> None:
    if hardware.endswith(".json"):
        return
    names = [name.split("/", 1) for name in profile_names()]
    models = [name for machine, name in names if machine == hardware]
    if not models:
        known = ", ".join(dict.fromkeys(machine for machine, _ in names))
        raise ValueError(f"--hardware {hardware}: choose one of {known}, or give a profile's path")
    if model not in models:
        what = f"--model {model}" if model else "--model is missing"
        raise ValueError(f"{what}: with --hardware {hardware} give one of {', '.join(models)}")


def _window(text: str) -> tuple[float, float]:
    try:
        begin, end = (float(hours) for hours in text.split("-"))
    except ValueError:
        begin, end = 0.0, 0.0
    if not 0 <= begin < end:
        raise argparse.ArgumentTypeError(f"{text}: give two hours, such as 9-12")
    return begin, end


def _check_predictor(name: str) -> None:
    make_replay_predictor(name, LEVEL, lambda features: 1)


def _text(results: Sequence[dict[str, Any]], output: str) -> str:
    if output == "json":
        return json.dumps(results[0] if len(results) == 1 else results, indent=2)
    if output == "html":
        return page(results, "EconoServe: simulated runs")
    from tabulate import tabulate

    rows = [cells(result) for result in results]
    align = ("left", *("right",) * (len(COLUMNS) - 1))
    headings = list(COLUMNS.values())
    return tabulate(rows, headings, tablefmt="github", colalign=align, disable_numparse=True)
