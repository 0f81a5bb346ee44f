"""The paper's claims on trial: ``python -m benchmark.paper``.

Owns the command: which runs are done, in processes of their own, and what it prints. Each run is a
line of a file, and a second call goes on where the first one ended. ``python -m
benchmark.paper.report`` makes the tables and plots of that file.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from benchmark.paper.bounds import bounds
from benchmark.paper.grid import CELLS, FULL_SCALE, QUICK, Paper
from benchmark.paper.known import Known
from benchmark.paper.plan import STAGES, needed
from benchmark.paper.requests import requests_of
from benchmark.paper.store import Line, Store, code_version
from benchmark.paper.tasks import Task, do
from econoserve.arguments import file_of, number, whole_number
from econoserve.cli import INTERRUPTED
from econoserve.runs import workers

OUT = "paper-claims.jsonl"


def measure(
    paper: Paper, store: Store, stages: Sequence[str], jobs: int, minutes: float | None = None
) -> list[str]:
    """Do all runs that are not in the store.

    Args:
        paper: the trial.
        store: where they are kept.
        stages: which.
        jobs: runs at a time.
        minutes: no run is begun later than that; ``None`` for no limit.

    Returns:
        The runs that failed, and why; what waits for them is left undone.
    """
    end_s = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    known = Known(paper, store)
    failed: dict[str, str] = {}
    running: dict[Future[Line], Task] = {}
    with (
        ThreadPoolExecutor(jobs) as threads,
        workers(jobs) as side_by_side,
        tqdm(unit="run", file=sys.stderr, initial=len(store)) as bar,
    ):
        # All processes are started here: later there are threads, with which they do not mix.
        list(side_by_side(abs, range(jobs)))

        def one(task: Task) -> Line:
            return next(iter(side_by_side(do, [task])))

        while True:
            begun = {task.key for task in running.values()} | failed.keys()
            left = [task for task in needed(known, stages) if task.key not in begun]
            if time.monotonic() < end_s:
                for task in left[: jobs - len(running)]:
                    running[threads.submit(one, task)] = task
            if not running:
                return list(failed.values())
            under_way = {task.key for task in running.values()}
            waiting = sum(task.key not in under_way for task in left)
            bar.total = len(store) + len(failed) + len(under_way) + waiting
            bar.set_description(", ".join(str(task) for task in running.values()))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    store.add(task.settings, future.result())
                    bar.update()
                except Exception as error:
                    failed[task.key] = f"{_label(task)}: {error!r}"
                    tqdm.write(f"failed: {failed[task.key]}", file=sys.stderr)


def print_bounds(paper: Paper) -> None:
    """Print what giving up the heaviest tenth of the requests is worth.

    Args:
        paper: the trial.
    """
    print("Giving up the heaviest tenth of the requests, where the KVC limits, is worth at most")
    for cell in paper.cells:
        found = bounds(requests_of(paper, cell))
        print(
            f"  {cell.name}: {found.lengths:.2f}x knowing all lengths, "
            f"{found.prompts:.2f}x by the prompts alone"
        )


def add_paper_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments that say which trial it is.

    Args:
        parser: of a command.
    """
    add = parser.add_argument
    add(
        "--out",
        type=file_of(".jsonl"),
        default=Path(OUT),
        metavar="FILE.jsonl",
        help="where the runs are kept; default: %(default)s",
    )
    add(
        "--cells",
        nargs="+",
        default=[],
        metavar="CELL",
        help="settings whose names contain one of these; default: all of "
        + ", ".join(cell.name for cell in CELLS),
    )
    add(
        "--trace",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="take the requests of this trace file for all settings of that name, such as "
        "azure-conv=FILE.csv; they arrive as a Poisson process, too",
    )
    add("--quick", action="store_true", help="tiny runs, to try the command; they mean nothing")
    add("--seed", type=whole_number(0), default=0, metavar="S", help="default: %(default)s")
    add("--keep", action="store_true", help="use lines of other versions of the code as well")


def paper_of(options: argparse.Namespace) -> Paper:
    """The trial that is asked for.

    Args:
        options: as ``add_paper_arguments`` describes them.

    Returns:
        The trial.

    Raises:
        ValueError: a name is not known.
    """
    cells = CELLS
    if options.cells:
        for part in options.cells:
            if not any(part in cell.name for cell in CELLS):
                names = ", ".join(cell.name for cell in CELLS)
                raise ValueError(f"--cells {part}: no setting's name contains it; give of {names}")
        cells = [cell for cell in CELLS if any(part in cell.name for part in options.cells)]
    names = {cell.lengths for cell in CELLS}
    files = {}
    for text in options.trace:
        name, _, file = text.partition("=")
        if name not in names or not Path(file).is_file():
            raise ValueError(
                f"--trace {text}: give NAME=FILE, with NAME one of {', '.join(sorted(names))} and "
                "a file that exists"
            )
        files[name] = file
    return Paper(tuple(cells), QUICK if options.quick else FULL_SCALE, files, options.seed)


def _label(task: Task) -> str:
    spec = task.spec
    lengths = f"{spec.workload.trace} on {spec.hardware}/{spec.model}"
    kind = "" if getattr(task, "whole", True) else " (until it fails)"
    tensor = f" tensor {spec.tensor}" if spec.tensor else ""
    many = f"{spec.workload.requests} requests"
    return f"{task}, {spec.predictor}, {many} of {lengths}{tensor}{kind}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and print what was done.

    Args:
        argv: arguments; by default those of the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.paper",
        description="The paper's claims on trial, in the simulator. A second call goes on where "
        "the first one ended.",
    )
    add_paper_arguments(parser)
    add = parser.add_argument
    add(
        "--jobs",
        type=whole_number(1),
        default=os.cpu_count() or 1,
        metavar="N",
        help="runs at a time; default: one for each core",
    )
    add(
        "--stages",
        nargs="+",
        choices=list(STAGES),
        default=list(STAGES),
        metavar="STAGE",
        help=f"default: {', '.join(STAGES)}, in this order",
    )
    add(
        "--minutes",
        type=number("minutes, more than 0", lambda minutes: minutes > 0),
        metavar="M",
        help="begin no run later than that; call again to go on",
    )
    options = parser.parse_args(argv)
    try:
        paper = paper_of(options)
        store = Store(options.out, code_version(), keep=options.keep)
        if store.stale:
            print(
                f"{options.out}: {store.stale} lines of other versions of the code are not used; "
                "--keep uses them",
                file=sys.stderr,
            )
        print_bounds(paper)
        before = len(store)
        failed = measure(paper, store, options.stages, options.jobs, options.minutes)
    except (ValueError, OSError) as error:
        print(f"benchmark.paper: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("benchmark.paper: interrupted; call again to go on", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    left = len(needed(Known(paper, store), options.stages))
    print(
        f"{len(store) - before} runs done, {len(store)} in {options.out} "
        f"({store.wall_s:.0f} s of a core)" + (f"; {left} or more left" if left else "")
    )
    if failed:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
