"""``econoserve``: the console command.

``econoserve doctor`` checks the installation, ``econoserve simulate`` runs the simulator,
``econoserve capacity`` searches with it, ``econoserve report`` shows what came of runs, and
``econoserve profile`` makes profiles for it.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version

from econoserve import __version__, capacity, profiling, reporting, simulate
from econoserve.config import ARM_VARIABLE

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's report.

    Attributes:
        name: what was looked at.
        passed: whether it is as it should be; ``None`` for information only.
        found: what was found.
        advice: what to do about it, if anything.
    """

    name: str
    passed: bool | None
    found: str
    advice: str = ""


def _release() -> Iterator[Check]:
    from econoserve.patches import TESTED_SGLANG

    try:
        found = version("sglang")
    except PackageNotFoundError:
        yield Check("sglang", False, "not installed", f"pip install sglang=={TESTED_SGLANG}")
        return
    advice = "" if found == TESTED_SGLANG else f"pip install sglang=={TESTED_SGLANG}"
    yield Check("sglang", found == TESTED_SGLANG, found, advice)


def _patches() -> Iterator[Check]:
    from econoserve.patches import TESTED_SGLANG, check, targets

    findings = check()
    count = len(targets())
    if not findings:
        yield Check("patched symbols", True, f"all {count} as in SGLang {TESTED_SGLANG}")
    for finding in findings:
        yield Check(
            f"patched symbol {finding.symbol}",
            False,
            finding.problem,
            f"pip install sglang=={TESTED_SGLANG}, or start with --econoserve-allow-untested",
        )


def _plugins() -> Iterator[Check]:
    import os

    wanted = {
        "sglang.srt.platforms": "econoserve_cpu",
        "sglang.srt.plugins": "econoserve_scheduler",
    }
    allowed = {name for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name}
    for group, name in wanted.items():
        found = [point for point in entry_points(group=group) if point.name == name]
        label = f"plug-in {name}"
        if not found:
            yield Check(label, False, "not registered", "pip install econoserve again")
            continue
        if allowed and name not in allowed:
            advice = f"unset SGLANG_PLUGINS or add {name} to it"
            yield Check(
                label, False, f"left out by SGLANG_PLUGINS={','.join(sorted(allowed))}", advice
            )
            continue
        try:
            found[0].load()
        except Exception as error:
            yield Check(label, False, f"does not load: {error}", "pip install econoserve again")
            continue
        yield Check(label, True, "registered and loads")
    others = [point.name for point in entry_points(group="sglang.srt.platforms")]
    others = [name for name in others if name != "econoserve_cpu"]
    if others:
        yield Check(
            "other platform plug-ins",
            None,
            ", ".join(others),
            "set SGLANG_PLATFORM to the one to use",
        )


def _device() -> Iterator[Check]:
    import torch

    from econoserve.platform import activate

    if torch.cuda.is_available():
        yield Check("device", True, f"CUDA: {torch.cuda.get_device_name(0)}")
        try:
            found = version("flashinfer-python")
        except PackageNotFoundError:
            yield Check(
                "flashinfer", False, "not installed", "pip install flashinfer-python==0.7.2"
            )
            return
        yield Check("flashinfer", True, found)
    elif activate() is None:
        yield Check("device", None, "no CUDA, and the CPU platform steps aside for another device")
    else:
        yield Check(
            "device", True, f"CPU with {torch.get_num_threads()} threads", "start with --device cpu"
        )


def _hooks() -> Iterator[Check]:
    import os
    import subprocess

    script = (
        "from sglang.srt.plugins import load_plugins\n"
        "load_plugins()\n"
        "from sglang.srt.managers import scheduler\n"
        "print('SCHEDULER=' + scheduler.Scheduler.__module__)\n"
    )
    for armed, label, expected in (
        ("1", "scheduler under EconoServe", "econoserve.runtime.scheduler"),
        ("0", "scheduler of stock SGLang", "sglang.srt.managers.scheduler"),
    ):
        run = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, ARM_VARIABLE: armed},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        lines = [line for line in run.stdout.splitlines() if line.startswith("SCHEDULER=")]
        found = lines[-1].removeprefix("SCHEDULER=") if lines else run.stderr.strip()[-500:]
        advice = "" if found == expected else "look for another plug-in that replaces Scheduler"
        yield Check(label, found == expected, found, advice)


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (_release, _patches, _plugins, _device, _hooks)
"""The doctor's examinations, in order; each needs only what those before it found in order."""


def doctor() -> int:
    """Examine the installation and print one line per finding, with what to do.

    Returns:
        0 if everything is in order, else 1.
    """
    failed = 0
    for examine in CHECKS:
        try:
            checks = list(examine())
        except Exception as error:
            name = examine.__name__.strip("_")
            checks = [Check(name, False, f"{type(error).__name__}: {error}", "see above")]
        for check in checks:
            mark = {True: "ok  ", False: "FAIL", None: "note"}[check.passed]
            print(f"{mark}  {check.name}: {check.found}", flush=True)
            if check.advice:
                print(f"      -> {check.advice}", flush=True)
            failed += check.passed is False
    print("everything is in order" if not failed else f"{failed} problem(s) found")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Run the console command.

    Args:
        argv: command line; that of the process by default.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="econoserve", description="EconoServe on SGLang.")
    parser.add_argument("--version", action="version", version=f"econoserve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="check SGLang's version, our patches, plug-ins and device")
    simulator = commands.add_parser("simulate", help="run scheduling policies in the simulator")
    simulate.add_arguments(simulator)
    searcher = commands.add_parser("capacity", help="find the rate that policies can sustain")
    capacity.add_arguments(searcher)
    reporter = commands.add_parser("report", help="make a page of what the simulator found")
    reporting.add_arguments(reporter)
    profiler = commands.add_parser("profile", help="make a simulator's profile of a server's log")
    profiling.add_arguments(profiler)
    run = {
        "simulate": simulate.main,
        "capacity": capacity.main,
        "report": reporting.main,
        "profile": profiling.main,
    }
    options = parser.parse_args(argv)
    try:
        return run[options.command](options) if options.command in run else doctor()
    except KeyboardInterrupt:
        print(f"econoserve {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
