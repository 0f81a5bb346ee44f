"""Runs of the simulator side by side, in processes of their own.

Owns these processes: none is left when the runs end, fail, or are interrupted.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from typing import Any, TypeVar

import numpy as np

from econoserve.sim.pool import SimulationError
from econoserve.sim.records import RequestRecord
from econoserve.sim.run import RunSpec, simulate

QUANTILES = (*range(0, 100, 5), 99, 100)
"""Percentiles by which a distribution is stated."""


class RunError(RuntimeError):
    """A run that failed; says which one, and why."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has ended.

    Attributes:
        spec: what was run.
        result: its settings and figures, as printed; all but ``wall_s``, the last one, are the
            same for equal ``spec``.
        records: of every request, by arrival.
    """

    spec: RunSpec
    result: dict[str, Any]
    records: list[RequestRecord]


def run_one(spec: RunSpec) -> Run:
    """Run it, and time it.

    Args:
        spec: what to run.

    Returns:
        What came of it.

    Raises:
        RunError: it failed, for what ``sim.run.simulate`` raises.
    """
    begin_s = time.perf_counter()
    try:
        ended = simulate(spec)
    except (ValueError, TypeError, OSError, SimulationError) as error:
        raise RunError(f"{_name(spec)}: {error}") from error
    except Exception as error:
        error.add_note(f"in the run of {_name(spec)}")
        raise
    figures = ended.figures
    if spec.series_points:
        jct_s = [record.jct_s for record in ended.records if record.jct_s != float("inf")]
        figures["jct_percentiles_s"] = _percentiles(jct_s)
    result = {
        **settings_of(spec),
        **figures,
        "wall_s": round(time.perf_counter() - begin_s, 3),
    }
    return Run(spec, result, ended.records)


def run_all(specs: Sequence[RunSpec], jobs: int | None = None) -> Iterator[Run]:
    """Runs, one after the other as they are given; more than one in processes of their own.

    Args:
        specs: what to run.
        jobs: runs at a time; one for each core by default.

    Yields:
        The runs in their order.

    Raises:
        RunError: one failed, or its process was ended from outside; the others are given up.
    """
    if len(specs) == 1:
        yield run_one(specs[0])
        return
    from tqdm import tqdm

    with workers(min(jobs or os.cpu_count() or 1, len(specs))) as side_by_side:
        runs = side_by_side(run_one, specs)
        yield from tqdm(runs, total=len(specs), unit="run", file=sys.stderr, leave=False)


def shortfall(run: Run) -> str | None:
    """What is to be said where a run served other requests than were asked for.

    Args:
        run: the run.

    Returns:
        A sentence; ``None`` where it had as many as asked for.
    """
    asked, had = run.spec.workload.requests, run.result["requests"]
    left_out = run.result["left_out"]
    if had >= asked or not left_out:
        return None
    return (
        f"{_name(run.spec)}: {had} requests, not {asked}: {left_out} of the trace exceed the "
        "model's context or the KVC and were left out"
    )


def settings_of(spec: RunSpec) -> dict[str, Any]:
    """What a run is of.

    Args:
        spec: the run.

    Returns:
        Its settings by name, as they are printed.
    """
    workload = spec.workload
    limits = asdict(workload.slo).items()
    return {
        "policy": spec.policy,
        "trace": workload.trace,
        "window_h": workload.window_h,
        "rate_rps": workload.rate_rps,
        "arrivals": workload.arrivals,
        "hardware": spec.hardware,
        "model": spec.model,
        "slo": {name: limit for name, limit in limits if limit is not None},
        "predictor": spec.predictor,
        "max_running": spec.max_running,
        "overhead_s": spec.overhead_s,
        "prefix_caching": spec.caching.value,
        "results": spec.results.value,
        "instances": spec.instances,
        "router": None if spec.placement else spec.router,
        "tensor": spec.tensor,
        "placement": str(spec.placement) if spec.placement else None,
        "link_bytes_per_s": spec.link_bytes_per_s if spec.placement else None,
        "seed": workload.seed,
    }


Task = TypeVar("Task")
Done = TypeVar("Done")
SideBySide = Callable[[Callable[[Task], Done], Iterable[Task]], Iterator[Done]]
"""Applies a function to each task, like ``map``, in processes of their own."""


@contextmanager
def workers(count: int) -> Iterator[SideBySide]:
    """Processes that do tasks; all are ended on leaving.

    Args:
        count: how many.

    Yields:
        What gives them tasks, any number of times.

    Raises:
        RunError: a process was ended from outside.
    """
    pool = ProcessPoolExecutor(count, initializer=_watch_parent)

    def side_by_side(function: Callable[[Task], Done], tasks: Iterable[Task]) -> Iterator[Done]:
        # Workers inherit that Ctrl-C is blocked: their parent ends them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.map(function, tasks)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield side_by_side
    except BrokenProcessPool:
        raise RunError(
            "the process of a run was ended from outside, perhaps for want of memory: "
            "give a smaller --jobs"
        ) from None
    finally:
        left = multiprocessing.active_children()
        pool.shutdown(wait=False, cancel_futures=True)
        # They hold nothing, and may have inherited a handler of SIGTERM.
        for worker in left:
            worker.kill()
        for worker in left:
            worker.join()


def _watch_parent() -> None:
    """A worker does not outlive its parent, however that ends."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _name(spec: RunSpec) -> str:
    return f"{spec.policy} at rate {spec.workload.rate_rps:g}"


def _percentiles(values: Sequence[float]) -> list[list[float]]:
    """Pairs of percent and value; none of no values."""
    if not values:
        return []
    found = np.percentile(values, QUANTILES)
    return [[percent, float(value)] for percent, value in zip(QUANTILES, found, strict=True)]
