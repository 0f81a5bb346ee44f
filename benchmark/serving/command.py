"""EconoServe, stock SGLang and vLLM as servers on one machine, one at a time, in turns.

Owns the command line. Progress goes to standard error, tables to standard output.
"""

import argparse
import datetime
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from benchmark.cpu_engine import models, peer
from benchmark.cpu_engine.processes import Failed
from benchmark.cpu_engine.systems import DTYPE, VLLM
from benchmark.scheduler_comparison.report import machine, versions
from benchmark.scheduler_comparison.systems import cpu_busy_share
from benchmark.serving.measure import Session, Settings
from benchmark.serving.records import Cell, SettingsDiffer, Store, is_late, merge, missing, order
from benchmark.serving.report import as_html, as_markdown, as_plot
from benchmark.serving.systems import (
    KVC_TOKENS,
    MAX_RUNNING,
    NAMES,
    VLLM_BLOCK_TOKENS,
    check_kvc,
    family,
    system,
)
from benchmark.serving.workloads import CONTEXT_TOKENS, MAX_TOKENS, WORKLOADS, rate_rps, source

BUSY_LIMIT = 0.1
"""Share of the CPUs that other programs may use before a run without a warning."""

LOADS = (0.5, 1.0, 1.5, 2.0)
QUICK_LOADS = (1.0,)
QUICK_REQUESTS = 20
START_S = {VLLM: 70.0}
OTHER_START_S = 45.0
SERVED_LOAD = 1.4
RUN_OVERHEAD_S = 4.0
"""For the estimate of how long it takes, measured roughly: seconds to start, warm and end a server,
the load that the slowest one still serves, and what a run takes besides."""


def build_parser() -> argparse.ArgumentParser:
    """The command line.

    Returns:
        A parser.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmark.serving", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the records; a run there goes on")
    add(
        "--quick",
        action="store_true",
        help=f"ShareGPT lengths, tight, load 1, once, {QUICK_REQUESTS} requests, no vLLM",
    )
    add("--systems", nargs="+", help=f"default: {' '.join(NAMES)}; also econoserve:POLICY")
    add("--workloads", nargs="+", choices=tuple(WORKLOADS), help="default: all")
    add("--kvc", nargs="+", choices=tuple(KVC_TOKENS), help=f"default: all; tokens: {KVC_TOKENS}")
    add("--rates", type=float, nargs="+", metavar="LOAD", help=f"loads; default: {LOADS}")
    add("--repeats", type=int, help="default: 3")
    add("--arrivals-s", type=float, default=15.0, help="time of arrivals of a run; default: 15")
    add("--requests", type=int, help="requests of a run, instead of --arrivals-s")
    add("--arrivals", default="poisson", help="poisson (default) or gamma:CV")
    add("--slo-scale", type=float, default=1.0, help="factor on the objectives; default: 1")
    add("--seed", type=int, default=1, help="of the first repeat; default: 1")
    add("--repeat-late", action="store_true", help="measure runs with a late client again")
    add("--plan", action="store_true", help="say what would be measured and how long it takes")
    add("--json", type=Path, help="merge the records into this file, docs/results/serving.json")
    add("--markdown", type=Path, help="write a page with the result to this file")
    add("--plot", type=Path, help="write the plot of goodput to this file, as SVG")
    return parser


def complete(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot be measured; fill in the defaults.

    Args:
        parser: for errors.
        options: the command line.
    """
    quick = options.quick
    options.systems = options.systems or list(NAMES[:2] if quick else NAMES)
    options.workloads = options.workloads or (["sharegpt"] if quick else list(WORKLOADS))
    options.kvc = options.kvc or (["tight"] if quick else list(KVC_TOKENS))
    options.rates = options.rates or (list(QUICK_LOADS) if quick else list(LOADS))
    options.repeats = (1 if quick else 3) if options.repeats is None else options.repeats
    if quick and options.requests is None:
        options.requests = QUICK_REQUESTS
    for name in ("repeats", "requests"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: give 1 or more")
    for name in ("arrivals_s", "slo_scale"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: give more than 0")
    if not all(load > 0 for load in options.rates):
        parser.error(f"--rates {options.rates}: give loads above 0")
    for name in options.systems:
        try:
            system(name)
        except ValueError as error:
            parser.error(str(error))


def estimate_s(servers: Sequence[Sequence[Cell]], settings: Settings) -> float:
    """About how long a measurement takes.

    Args:
        servers: the runs of each server.
        settings: of the runs.

    Returns:
        Seconds.
    """
    seconds = 0.0
    for cells in servers:
        seconds += START_S.get(family(cells[0].system), OTHER_START_S)
        for cell in cells:
            workload = WORKLOADS[cell.workload]
            rate = rate_rps(workload, cell.load, cell.kvc)
            arrivals_s = settings.count(workload, rate) / rate
            seconds += arrivals_s * max(cell.load / SERVED_LOAD, 1.0) + RUN_OVERHEAD_S
    return seconds


def describe(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The terms of the comparison, for the files.

    Args:
        options: the command line.
        settings: of the runs.

    Returns:
        Plain values; two folders with equal ones hold comparable records.
    """
    return {
        **asdict(settings),
        "model": "demo model",
        "dtype": DTYPE,
        "context_tokens": CONTEXT_TOKENS,
        "max_tokens": MAX_TOKENS,
        "max_running": MAX_RUNNING,
        "kvc_tokens": KVC_TOKENS,
        "vllm_block_tokens": VLLM_BLOCK_TOKENS,
        "machine": machine(),
        "versions": {**versions(), "vllm": peer.VERSION},
        "spans": {name: workload.span for name, workload in WORKLOADS.items()},
        "objectives": {
            name: [asdict(one.slo) for one in workload.classes]
            for name, workload in WORKLOADS.items()
        },
        "sources": {name: source(workload) for name, workload in WORKLOADS.items()},
    }


def command_line(arguments: Sequence[str]) -> str:
    """The command that repeats a measurement.

    Args:
        arguments: those of this run.

    Returns:
        A command line with its folders and files cut to their names.
    """
    kept = [Path(argument).name if os.sep in argument else argument for argument in arguments]
    return shlex.join(["python", "-m", "benchmark.serving", *kept])


def _stop_on_signal(number: int, _frame: object) -> NoReturn:
    """End by an exception, so that everything that runs is stopped, too."""
    raise SystemExit(128 + number)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        argv: arguments; by default those of the command line.

    Returns:
        The exit status: 0 if everything was measured, else 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    options = parser.parse_args(arguments)
    complete(parser, options)
    check_kvc()
    settings = Settings(
        arrivals_s=options.arrivals_s,
        requests=options.requests,
        arrivals=options.arrivals,
        slo_scale=options.slo_scale,
        seed=options.seed,
    )
    servers = order(options.repeats, options.kvc, options.systems, options.workloads, options.rates)
    store = Store(options.out)
    terms = describe(options, settings)
    done = store.read()
    if options.repeat_late:
        done = [record for record in done if not is_late(record)]
    left = missing(servers, done)
    _say(
        f"{sum(map(len, left))} of {sum(map(len, servers))} runs on {len(left)} servers are to be "
        f"measured: about {estimate_s(left, settings) / 60:.0f} minutes"
    )
    if options.plan:
        return 0
    try:
        store.open(terms)
    except SettingsDiffer as error:
        parser.error(str(error))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop_on_signal)
    logs = options.out / "logs"
    logs.mkdir(exist_ok=True)
    session = Session(
        settings, models.ensure(models.TINY), store, logs.resolve(), _say, store.read_facts()
    )
    try:
        if any(cells[0].system == VLLM for cells in left):
            peer.ensure(logs, _say)
        busy = cpu_busy_share() or 0.0
        if busy > BUSY_LIMIT:
            _say(f"warning: other programs use {busy:.0%} of the CPUs")
        if left:
            session.measure(left)
            store.write_facts(session.facts)
    except Failed as failure:
        session.failures.append(str(failure))
    except KeyboardInterrupt:
        _say("interrupted; everything that was started has been stopped")
        return 128 + signal.SIGINT
    records = store.read()
    if records:
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        facts = {"date": date, "command": command_line(arguments), "systems": session.facts}
        page = as_markdown(records, {**terms, **facts})
        print(page)
        (options.out / "report.md").write_text(page, encoding="utf-8")
        (options.out / "report.html").write_text(
            as_html(records, {**terms, **facts}), encoding="utf-8"
        )
        if options.markdown is not None and not session.failures:
            options.markdown.write_text(page, encoding="utf-8")
        if options.plot is not None and not session.failures:
            options.plot.write_text(as_plot(records), encoding="utf-8")
        if options.json is not None:
            try:
                merge(options.json, terms, facts, records)
            except SettingsDiffer as error:
                session.failures.append(str(error))
    for failure in dict.fromkeys(session.failures):
        print(failure, file=sys.stderr)
    return 1 if session.failures else 0
