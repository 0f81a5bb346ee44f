"""What our scheduler adds to a decode iteration: ``python -m benchmark.scheduler_overhead.run``.

So many requests decode together, with room for all; nothing is decided that would change the work.
The time of an iteration is that of the whole run by the number of tokens of each response. Stock
SGLang and EconoServe take turns, each in a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
PROMPT_TOKENS = 16
RUN_LIMIT_S = 300


def work(system: str, running: int, tokens: int, policy: str) -> dict[str, Any]:
    """One run, in this process.

    Args:
        system: ``stock`` or ``econoserve``.
        running: requests that decode together.
        tokens: length of each response.
        policy: of EconoServe.

    Returns:
        ``iteration_ms``, and EconoServe's counters (``None`` for stock SGLang).
    """
    from econoserve import demo_model

    keywords: dict[str, Any] = {
        "model_path": str(demo_model.ensure()),
        "device": "cpu",
        "dtype": "float32",
        "max_total_tokens": running * (PROMPT_TOKENS + tokens) * 2,
        "max_running_requests": running,
        "log_level": "error",
    }
    if system == "stock":
        from sglang import Engine
    else:
        from econoserve import Engine

        keywords["econoserve_policy"] = policy
    engine = Engine(**keywords)
    prompts = [[7 + (i * 31 + j) % 4000 for j in range(PROMPT_TOKENS)] for i in range(running)]

    def seconds(new_tokens: int) -> float:
        params = {"max_new_tokens": new_tokens, "ignore_eos": True, "temperature": 0}
        began_s = time.perf_counter()
        engine.generate(input_ids=prompts, sampling_params=params)
        return time.perf_counter() - began_s

    try:
        seconds(8)
        short_s, long_s = seconds(8), seconds(8 + tokens)
        state = engine.get_server_info()["internal_states"][0].get("econoserve")
    finally:
        engine.shutdown()
    return {"iteration_ms": (long_s - short_s) / tokens * 1e3, "state": state}


def _run(system: str, running: int, options: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmark.scheduler_overhead.run", "--worker", system]
    command += ["--running", str(running), "--tokens", str(options.tokens)]
    command += ["--policy", options.policy]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_LIMIT_S, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{system} at {running} running:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])["iteration_ms"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print.

    Args:
        argv: arguments; by default those of the command line.
    """
    parser = argparse.ArgumentParser(description="What our scheduler adds to a decode iteration.")
    parser.add_argument("--running", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--tokens", type=int, default=200, help="per response. Default: 200")
    parser.add_argument("--repeats", type=int, default=3, help="of each. Default: 3")
    parser.add_argument("--policy", default="plus", help="of EconoServe. Default: plus")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, last")
    parser.add_argument("--worker", choices=("stock", "econoserve"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        result = work(options.worker, options.running[0], options.tokens, options.policy)
        print(json.dumps(result))
        return
    systems = ("stock", "econoserve")
    turns = [
        (running, repeat, system)
        for repeat in range(options.repeats)
        for running in options.running
        for system in (systems if repeat % 2 == 0 else systems[::-1])
    ]
    figures: dict[tuple[int, str], list[float]] = {}
    for running, _, system in tqdm(turns, unit="run", file=sys.stderr):
        figures.setdefault((running, system), []).append(_run(system, running, options))
    rows = []
    for running in options.running:
        stock, ours = figures[running, "stock"], figures[running, "econoserve"]
        added = [mine / other - 1 for mine, other in zip(ours, stock, strict=True)]
        rows.append(
            {
                "running": running,
                "stock_ms": round(statistics.median(stock), 3),
                "econoserve_ms": round(statistics.median(ours), 3),
                "added": round(statistics.median(added), 3),
                "added_range": [round(min(added), 3), round(max(added), 3)],
            }
        )
    print(tabulate(rows, headers="keys"))
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
