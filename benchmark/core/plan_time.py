"""How long a plan takes: python benchmark/core/plan_time.py [--json] [--quick].

For each mode of the KVC ledger, EconoServe plans for a machine with so many tasks running and so
many prompts queued, with the KVC as the limit. Times are of single calls, on one core.
"""

import argparse
import gc
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

if not __package__:
    # Started as a script: the root of the repository is not on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark.core.workload import CountingMachine
from econoserve.core.cost import TfsConfig
from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.policies.econoserve import EconoServe, EconoServeConfig

SIZES = ((32, 100), (256, 1_000), (1_024, 10_000))
"""(running, queued); at the second a plan should take less than 150 us, at the third 1 ms."""

GROWTH = (1_000, 3_000, 10_000, 30_000, 100_000)
"""Queued prompts at 256 running, for the growth."""

WARM_ITERATIONS = 400
"""Iterations until completions are spread evenly over time."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Planning times of one mode at one size.

    Attributes:
        mode: of the KVC ledger.
        running: tasks that decode, as asked for.
        queued: prompts that wait.
        median_us: of one plan.
        p99_us: of one plan.
        books_median_us: of all other calls of an iteration together.
        mean_running: tasks that decoded.
    """

    mode: str
    running: int
    queued: int
    median_us: float
    p99_us: float
    books_median_us: float
    mean_running: float


def machine(mode: KvcMode, capacity_tokens: int, running: int, queued: int) -> CountingMachine:
    """A machine with EconoServe on it.

    Args:
        mode: of the KVC ledger.
        capacity_tokens: size of the KVC.
        running: about how many tasks run.
        queued: prompts that wait.

    Returns:
        The machine, before its first iteration.
    """
    tfs = TfsConfig(pinned_tokens=2 * running + 2048)
    config = EconoServeConfig(capacity_tokens, kvc=KvcConfig(mode=mode), tfs=tfs)
    return CountingMachine(EconoServe(config), capacity_tokens, 4 * running, queued)


def capacity_for(mode: KvcMode, running: int) -> int:
    """The KVC in which about so many tasks run, found by trial.

    Args:
        mode: of the KVC ledger.
        running: tasks that are to run.

    Returns:
        Tokens.
    """
    capacity_tokens = 400 * running
    for _ in range(3):
        pilot = machine(mode, capacity_tokens, running, min(8 * running, 2_000))
        costs = [pilot.step() for _ in range(WARM_ITERATIONS + 100)]
        seen = statistics.mean(cost.running for cost in costs[WARM_ITERATIONS:])
        capacity_tokens = max(int(capacity_tokens * running / max(seen, 1)), 4096)
    return capacity_tokens


def measure(
    mode: KvcMode, running: int, queued: int, capacity_tokens: int, iterations: int
) -> Timing:
    """Time plans.

    Args:
        mode: of the KVC ledger.
        running: about how many tasks run.
        queued: prompts that wait.
        capacity_tokens: size of the KVC.
        iterations: plans to time.

    Returns:
        The times.
    """
    under_test = machine(mode, capacity_tokens, running, queued)
    for _ in range(WARM_ITERATIONS):
        under_test.step()
    gc.collect()
    gc.freeze()
    costs = [under_test.step() for _ in range(iterations)]
    gc.unfreeze()
    plans = sorted(cost.plan_s * 1e6 for cost in costs)
    return Timing(
        mode=mode.value,
        running=running,
        queued=queued,
        median_us=round(statistics.median(plans), 1),
        p99_us=round(plans[min(int(0.99 * len(plans)), len(plans) - 1)], 1),
        books_median_us=round(statistics.median(cost.books_s * 1e6 for cost in costs), 1),
        mean_running=round(statistics.mean(cost.running for cost in costs), 1),
    )


def growth(timings: list[Timing]) -> str:
    """The line through the median time over the logarithm of the queue's length.

    Args:
        timings: of one mode at one number of running tasks.

    Returns:
        A sentence with the fit and with the exponent of the power law through the same points.
    """
    logs = [math.log10(timing.queued) for timing in timings]
    medians = [timing.median_us for timing in timings]
    slope, intercept = statistics.linear_regression(logs, medians)
    power, _ = statistics.linear_regression(logs, [math.log10(median) for median in medians])
    return (
        f"{timings[0].mode}: {intercept:.0f} us {slope:+.1f} us per tenfold queue "
        f"(power law: queued^{power:.3f})"
    )


def main() -> None:
    """Measure, print a table, and with ``--json`` the figures as the last line."""
    parser = argparse.ArgumentParser(description="Time EconoServe's planning.")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, last")
    parser.add_argument(
        "--quick", action="store_true", help="fewer plans and no queue above 10,000"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=[mode.value for mode in KvcMode],
        default=[mode.value for mode in KvcMode],
        help="modes of the KVC ledger. Default: all",
    )
    arguments = parser.parse_args()
    iterations = 200 if arguments.quick else 1_000
    grown = [queued for queued in GROWTH if queued <= (10_000 if arguments.quick else 100_000)]
    sizes = [*SIZES, *((256, queued) for queued in grown if (256, queued) not in SIZES)]
    timings = []
    work = [(KvcMode(mode), *size) for mode in arguments.modes for size in sizes]
    capacities: dict[tuple[KvcMode, int], int] = {}
    for mode, running, queued in tqdm(work, file=sys.stderr, desc="planning", unit="size"):
        if (mode, running) not in capacities:
            capacities[mode, running] = capacity_for(mode, running)
        capacity = capacities[mode, running]
        timings.append(measure(mode, running, queued, capacity, iterations))
    print(tabulate([asdict(timing) for timing in timings], headers="keys"))
    print()
    for mode in arguments.modes:
        chosen = [one for one in timings if one.mode == mode and one.running == 256]
        print(growth(sorted(chosen, key=lambda one: one.queued)))
    if arguments.json:
        print(json.dumps([asdict(timing) for timing in timings]))


if __name__ == "__main__":
    main()
