"""How good length predictions are and what they are worth: ``python -m benchmark.prediction.run``.

Each trace is gone through in the order of its arrivals: a request is predicted when it arrives, and
learned from when its response would have ended. Then policy ``plus`` serves a part of it with each
predictor on a machine that only counts. Trace files that are absent are skipped.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmark.prediction.accuracy import hindsight, measure
from benchmark.prediction.scheduling import LEVEL, Service, make_load, serve
from benchmark.prediction.traces import TRACES
from econoserve.prediction.registry import make_replay_predictor
from econoserve.workload.trace import TraceError, TraceRequest

ROOT = Path(__file__).resolve().parents[2]
TRACE_FOLDER = ROOT.parent / "shared" / "data" / "traces"

REQUESTS, QUICK_REQUESTS = 20_000, 4_200
PAST, QUICK_PAST = 3_000, 1_500
SERVED, QUICK_SERVED = 1_200, 300
"""Requests whose predictions are measured; learned from before serving; and served."""

COMPARED = ("quantile", "prefix-tree", "text", "hint", "max-tokens", "oracle", "noisy-oracle(0.3)")


def predictors_for(requests: Sequence[TraceRequest]) -> list[str]:
    """What can be compared on a trace.

    Args:
        requests: of the trace.

    Returns:
        Names; without prompts' words and senders' hints, the predictors that are made for them
        are the prefix tree.
    """
    absent = set()
    if not any(request.features.edges for request in requests):
        absent.add("text")
    if all(request.features.expected_tokens is None for request in requests):
        absent.add("hint")
    return [name for name in COMPARED if name not in absent]


def figures(requests: Sequence[TraceRequest], options: argparse.Namespace) -> dict[str, dict]:
    """All that is measured on a trace.

    Args:
        requests: by arrival.
        options: of the command line.

    Returns:
        By predictor, then by figure.
    """
    past, served = (QUICK_PAST, QUICK_SERVED) if options.quick else (PAST, SERVED)
    names = predictors_for(requests)
    load = make_load(requests, past, served)
    # Features are compared by identity: two requests may look the same and differ in length.
    truth = {id(r.features): r.output_tokens for r in (*requests, *load.past, *load.requests)}
    result: dict[str, dict[str, Any]] = {}
    services: dict[str, Service] = {}
    total = len(names) * (1 + len(load.requests))
    with tqdm(total=total, file=sys.stderr, unit="step", leave=False) as bar:
        for name in names:
            bar.set_description(name)
            predictor, other = (
                make_replay_predictor(name, LEVEL, lambda features: truth[id(features)])
                for _ in range(2)
            )
            result[name] = asdict(measure(requests, predictor))
            bar.update()
            services[name] = serve(load, other, bar.update)
    for name, service in services.items():
        result[name] |= asdict(service)
        best = services["oracle"].goodput_per_s
        result[name]["goodput_vs_oracle"] = service.goodput_per_s / best if best else None
    error = hindsight(requests)
    if error is not None:
        result["hindsight"] = {"mae": error}
    return result


def table(result: dict[str, dict]) -> str:
    """The figures for people.

    Args:
        result: of a trace.

    Returns:
        A table, a line for each predictor.
    """
    columns = {
        "MAE": ("mae", "{:.1f}"),
        "informed": ("mae_informed", "{:.1f}"),
        "pinball 0.5": ("pinball_50", "{:.1f}"),
        "0.9": ("pinball_90", "{:.1f}"),
        "coverage 0.9": ("coverage_90", "{:.3f}"),
        "us": ("us_per_request", "{:.0f}"),
        "goodput": ("goodput_vs_oracle", "{:.1%}"),
        "preempted": ("preemptions", "{}"),
        "KVC": ("kvc_used", "{:.1%}"),
        "JCT s": ("jct_s", "{:.1f}"),
    }
    rows = [
        [name, *(_cell(row.get(key), form) for key, form in columns.values())]
        for name, row in result.items()
    ]
    align = ("left", *("right",) * len(columns))
    return tabulate(
        rows, ["predictor", *columns], tablefmt="github", colalign=align, disable_numparse=True
    )


def _cell(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print.

    Args:
        argv: arguments; by default those of the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.prediction.run",
        description="How good length predictions are, and what they do to scheduling.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer requests: about a minute instead of several"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, last")
    parser.add_argument(
        "--traces",
        type=Path,
        default=TRACE_FOLDER,
        metavar="DIR",
        help="folder with the traces' folders. Default: ../shared/data/traces of the project",
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(TRACES), metavar="TRACE", help=", ".join(TRACES)
    )
    options = parser.parse_args(argv)
    results = {}
    for name in options.only or TRACES:
        folder, read = TRACES[name]
        path = options.traces / (folder or "")
        if folder is not None and not path.is_dir():
            print(f"{name}: skipped, {path} is not there (--traces)", file=sys.stderr)
            continue
        try:
            requests = read(path, QUICK_REQUESTS if options.quick else REQUESTS)
        except (OSError, TraceError, KeyError, ValueError) as error:
            sys.exit(f"{name}: {path} cannot be read: {error!r}")
        results[name] = figures(requests, options)
        print(f"\n{name}, {len(requests)} requests\n\n{table(results[name])}", flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
