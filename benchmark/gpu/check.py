"""The check on a GPU, or the same on a CPU: ``python -m benchmark.gpu.check --device cuda``.

Owns the command line and the order of the stages. What a stage found is kept: a check that was
stopped goes on where it was, and a stage that fails does not keep the next ones from running.
"""

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from benchmark.gpu import sizes
from benchmark.gpu.results import DONE, FAILED, Results, table
from benchmark.gpu.sizes import Device, Sizes
from benchmark.gpu.stages import EXPECTED, ROOT, Check, stages

OUT = ROOT / ".gpu-kit" / "results"
DEFAULT_LIMIT_S = 900.0

SIZES = {
    (Device.CUDA, False): sizes.CUDA_FULL,
    (Device.CUDA, True): sizes.CUDA_QUICK,
    (Device.CPU, False): sizes.CPU_FULL,
    (Device.CPU, True): sizes.CPU_QUICK,
}


def build_parser() -> argparse.ArgumentParser:
    """The command line.

    Returns:
        A parser.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmark.gpu.check", description=__doc__)
    add = parser.add_argument
    add("--device", choices=[one.value for one in Device], required=True)
    add("--quick", action="store_true", help="small sizes")
    add("--stage", nargs="+", metavar="NAME", help="only these; default: all")
    add("--out", type=Path, default=OUT, help="folder of results; default: .gpu-kit/results")
    add("--fresh", action="store_true", help="repeat stages that are done")
    add(
        "--limit-s",
        type=float,
        default=DEFAULT_LIMIT_S,
        help=f"end the stage that runs after so many seconds; default: {DEFAULT_LIMIT_S:g}",
    )
    return parser


def run(check: Check, wanted: Sequence[str]) -> list[str]:
    """Run the stages that are not done; none starts after the check's deadline.

    Args:
        check: what they know.
        wanted: their names, in order.

    Returns:
        Names of those that failed or were not started.
    """
    todo = stages(check)
    bad = []
    for name in wanted:
        if check.results.value(name) is not None:
            print(f"{name}: done before", file=sys.stderr, flush=True)
            continue
        stage_s = time.monotonic()
        if stage_s > check.deadline_s:
            print(f"{name}: no time left", file=sys.stderr, flush=True)
            bad.append(name)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            value, status, error = todo[name](), DONE, ""
        except EXPECTED as failure:
            value, status, error = None, FAILED, f"{type(failure).__name__}: {failure}"
        except Exception:
            value, status, error = None, FAILED, traceback.format_exc()
        seconds = time.monotonic() - stage_s
        check.results.keep(name, status, seconds, value, error)
        print(f"{name}: {status} in {seconds:.0f} s", file=sys.stderr, flush=True)
        if status == FAILED:
            print(error, file=sys.stderr, flush=True)
            bad.append(name)
    return bad


def sizes_of(options: argparse.Namespace) -> Sizes:
    """How much the command line asks for.

    Args:
        options: the command line.

    Returns:
        The sizes.
    """
    return SIZES[Device(options.device), options.quick]


def _stop_on_signal(number: int, _frame: object) -> NoReturn:
    """End by an exception, so that the engines that run are stopped, too."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, and print what was found.

    Args:
        argv: arguments; by default those of the command line.

    Returns:
        The exit status: 0 if every stage is done.
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    folder = options.out.absolute()
    deadline_s = time.monotonic() + options.limit_s
    check = Check(Device(options.device), sizes_of(options), folder, Results(folder), deadline_s)
    known = list(stages(check))
    wanted = known if options.stage is None else options.stage
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"--stage {' '.join(unknown)}: give some of {', '.join(known)}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop_on_signal)
    if options.fresh:
        for name in wanted:
            check.results.forget(name)
    try:
        bad = run(check, wanted)
    finally:
        check.engines.close()
    print(f"\n{table(check.results, known if options.stage is None else wanted)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
