"""The CPU engine against upstream's and vLLM's, on one machine, in one run, interleaved.

Owns the command line. Progress goes to standard error, the result to standard output. vLLM's
environment is set up on first use.
"""

import argparse
import datetime
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from benchmark.cpu_engine import models, peer
from benchmark.cpu_engine.figures import BURST, DECODE, MEASUREMENTS, OPEN
from benchmark.cpu_engine.measure import FULL, QUICK, Session, Size
from benchmark.cpu_engine.processes import Failed
from benchmark.cpu_engine.report import as_json, as_markdown, summary_text
from benchmark.cpu_engine.systems import SYSTEMS, VLLM
from benchmark.scheduler_comparison.systems import cpu_busy_share

BUSY_LIMIT = 0.1
"""Share of the CPUs that other programs may use before a run without a warning."""


def build_parser() -> argparse.ArgumentParser:
    """The command line.

    Returns:
        A parser.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmark.cpu_engine.run", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer repeats and requests, the tiny model only")
    add("--model", nargs="+", choices=models.MODELS, help="default: both; with --quick: tiny")
    add("--systems", nargs="+", choices=tuple(SYSTEMS), help="default: all")
    add("--skip-vllm", action="store_true", help="leave vLLM out; nothing is installed")
    add("--skip", nargs="+", choices=MEASUREMENTS, default=[], help="measurements to leave out")
    add("--repeats", type=int, help="default: 5; with --quick: 2, open loop 1")
    add("--batches", type=int, nargs="+", help="of the decode measurement; default: 1 8 32 128")
    add("--timeout-s", type=float, default=300.0, help="limit for one run; default: 300")
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write everything to this file; without FILE, print it as the last line",
    )
    add("--markdown", type=Path, help="write a page with the result to this file")
    return parser


def sizes_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Size]:
    """Refuse what cannot be measured, and say how much is.

    Args:
        parser: for errors.
        options: the command line; ``systems`` is completed.

    Returns:
        Sizes by model.
    """
    names = options.systems or list(SYSTEMS)
    options.systems = [name for name in names if not (options.skip_vllm and name == VLLM)]
    if not options.systems:
        parser.error("--systems vllm --skip-vllm: nothing is left to measure")
    if set(options.skip) == set(MEASUREMENTS):
        parser.error(f"--skip {' '.join(options.skip)}: nothing is left to measure")
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: give 1 or more")
    if not options.timeout_s > 0:
        parser.error(f"--timeout-s {options.timeout_s}: give more than 0")
    for batch in options.batches or ():
        if not 1 <= batch <= 180:  # more do not fit the KVC
            parser.error(f"--batches {batch}: give numbers from 1 to 180")
    changes: dict[str, Any] = {}
    if options.repeats is not None:
        changes |= {"repeats": options.repeats, "open_repeats": options.repeats}
    if options.batches:
        changes["batches"] = tuple(sorted(set(options.batches)))
    chosen = options.model or ([models.TINY] if options.quick else models.MODELS)
    table = QUICK if options.quick else FULL
    return {model: replace(table[model], **changes) for model in models.MODELS if model in chosen}


def _stop_on_signal(number: int, _frame: object) -> NoReturn:
    """End by an exception, so that everything that runs is stopped, too."""
    raise SystemExit(128 + number)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def measure(session: Session, sizes: dict[str, Size], skip: Sequence[str]) -> None:
    """Run everything.

    Args:
        session: takes the samples.
        sizes: how much, by model.
        skip: measurements to leave out.
    """
    loads = [measurement for measurement in (BURST, OPEN) if measurement not in skip]
    for model, size in sizes.items():
        folder = models.ensure(model)
        if DECODE not in skip:
            session.decode(model, folder, size)
        if loads:
            session.load(model, folder, size, loads)


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
    sizes = sizes_of(parser, options)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop_on_signal)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    with tempfile.TemporaryDirectory(prefix="cpu-engine-") as folder:
        logs = Path(folder)
        systems = [SYSTEMS[name] for name in options.systems]
        session = Session(systems, logs, options.timeout_s, _say)
        try:
            if VLLM in options.systems:
                peer.ensure(logs, _say)
            busy = cpu_busy_share() or 0.0
            if busy > BUSY_LIMIT:
                _say(f"warning: other programs use {busy:.0%} of the CPUs")
            measure(session, sizes, options.skip)
        except Failed as failure:
            session.failures.append(str(failure))
        except KeyboardInterrupt:
            _say("interrupted; everything that was started has been stopped")
            return 128 + signal.SIGINT
    summary = summary_text(session.samples, sizes, session.facts, date)
    if session.samples:
        print(summary)
    if options.markdown is not None and not session.failures:
        page = summary_text(session.samples, sizes, session.facts, date, "## ")
        options.markdown.write_text(as_markdown(page, arguments), encoding="utf-8")
    for failure in session.failures:
        print(failure, file=sys.stderr)
    if options.json is not None and session.samples:
        result = as_json(session.samples, sizes, session.facts, session.failures, arguments, date)
        text = json.dumps(result)
        if options.json == "-":
            print(text, flush=True)
        else:
            Path(options.json).write_text(text + "\n", encoding="utf-8")
    return 1 if session.failures else 0
