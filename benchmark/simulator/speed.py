"""How long simulated runs take: ``python -m benchmark.simulator.speed``.

Each policy serves the same requests on one instance. Times are of this process on this machine;
the figures of a run do not depend on them.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from econoserve.sim.run import RunSpec, simulate
from econoserve.workload.workload import WorkloadSpec

REQUESTS, RATE_RPS = 10_000, 6.0
POLICIES = ("plus", "full", "vllm_v1", "sarathi", "sglang", "past_future")


def measure(policy: str, requests: int) -> dict[str, float | str | int]:
    """Time a run.

    Args:
        policy: name of the policy.
        requests: how many it serves.

    Returns:
        Seconds on the clock, and what was simulated in them.
    """
    workload = WorkloadSpec("synthetic:sharegpt", RATE_RPS, requests)
    begin_s = time.perf_counter()
    figures = simulate(RunSpec(policy, workload, "a100", "opt-13b")).figures
    wall_s = time.perf_counter() - begin_s
    names = ("served", "iterations", "span_s")
    return {"policy": policy, "wall_s": wall_s} | {name: figures[name] for name in names}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print.

    Args:
        argv: command line; that of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.simulator.speed", description="How long simulated runs take."
    )
    parser.add_argument("--requests", type=int, default=REQUESTS, help="default: %(default)s")
    parser.add_argument(
        "--policy", nargs="+", default=POLICIES, metavar="P", help=f"default: {' '.join(POLICIES)}"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, last")
    options = parser.parse_args(argv)
    rows = []
    for policy in tqdm(options.policy, file=sys.stderr, unit="run", leave=False):
        rows.append(row := measure(policy, options.requests))
        print(
            f"{policy}: {row['wall_s']:.1f} s for {row['served']} requests, "
            f"{row['iterations']} iterations, {row['span_s']:.0f} simulated seconds",
            flush=True,
        )
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
