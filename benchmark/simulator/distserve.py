"""Prefills and decodes apart, here and in DistServe's own simulator, on the same requests.

``python -m benchmark.simulator.distserve --distserve CHECKOUT --python PYTHON`` needs a checkout
of github.com/LLMServe/DistServe (read at commit 82831f1), and a Python with simpy and pandas.

``simdistserve`` adds 2 ms and 0.1 us for each token of context to every iteration, for Ray, and
1 ms to prefills without a pipeline. The comparison puts that in here as well; ``econoserve
simulate`` leaves it out. Its KVC moves in no time; here 200 tokens take 0.5 ms.
"""

import argparse
import csv
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tabulate import tabulate

from econoserve.sim.cluster import Clock, run_events
from econoserve.sim.disaggregated import Disaggregated
from econoserve.sim.placement import Placement, parse_placement
from econoserve.sim.profile import load_profile
from econoserve.sim.run import RunSpec, stage_machines
from econoserve.sim.timing import IterationTime, Pass
from econoserve.workload.trace import TraceRequest
from econoserve.workload.workload import WorkloadSpec, make_workload

CASES = (
    ("prefill=1x1x1,decode=1x1x1", 4.0),
    ("prefill=2x1x1,decode=1x1x1", 4.0),
    ("prefill=1x2x1,decode=1x2x1", 3.0),
    ("prefill=1x2x1,decode=1x2x1", 6.0),
)
MODEL = "opt-13b"
RAY_S, RAY_S_PER_TOKEN, PREFILL_S = 2e-3, 1e-7, 1e-3


@dataclass(frozen=True, slots=True)
class WithRay:
    """A time with what ``simdistserve`` adds in the first of a pipeline's stages, for each token.

    Attributes:
        time: of the pass.
        stages: of the pipeline, by whose number the time is divided later.
    """

    time: IterationTime
    stages: int

    def seconds(self, work: Pass) -> float:
        """See ``IterationTime.seconds``."""
        tokens = work.prompt_tokens + work.context_tokens
        alone_s = PREFILL_S if work.prompt_tokens and self.stages == 1 else 0.0
        return self.time.seconds(work) + RAY_S_PER_TOKEN * tokens * self.stages + alone_s


def ours(spec: RunSpec, requests: Sequence[TraceRequest]) -> np.ndarray:
    """Means of TTFT, TPOT and latency in seconds, in our simulator."""
    profile = load_profile(spec.hardware, spec.model)
    machines = [
        [
            replace(machine, time=WithRay(machine.time, machine.stages), overhead_s=RAY_S)
            for machine in phase
        ]
        for phase in stage_machines(spec, spec.placement, profile)
    ]
    clock = Clock()
    system = Disaggregated(*machines, clock, requests[0].arrival_s)
    run_events(system, clock, requests)
    records = system.records
    tpot_s = [record.tpot_s for record in records if record.tpot_s is not None]
    ttft_s, jct_s = ([getattr(r, name) for r in records] for name in ("ttft_s", "jct_s"))
    return np.array([np.mean(ttft_s), np.mean(tpot_s), np.mean(jct_s)])


def theirs(
    checkout: Path, python: str, placement: Placement, requests: Sequence[TraceRequest]
) -> np.ndarray:
    """The same in ``simdistserve``."""
    with tempfile.TemporaryDirectory() as folder:
        workload, latencies = Path(folder, "workload.json"), Path(folder, "latencies.csv")
        rows = [
            {
                "start_time": request.arrival_s,
                "prompt_len": request.features.prompt_tokens,
                "output_len": request.output_tokens,
            }
            for request in requests
        ]
        workload.write_text(json.dumps(rows))
        command = [python, "-m", "simdistserve.benchmarks.simulate_dist"]
        command += ["--backend", "distserve", "--model", f"facebook/{MODEL}", "--rate", "1"]
        command += ["--N", str(len(requests)), "--workload", str(workload), "--arrival", "custom"]
        command += ["--output-request-latency", str(latencies)]
        for name in ("prefill", "decode"):
            kind = getattr(placement, name).parallelism
            command += [f"--tp-{name}", str(kind.tensor), f"--pp-{name}", str(kind.pipeline)]
        subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True)
        with latencies.open(newline="") as file:
            found = list(csv.DictReader(file))
    names = ("first_token_latency", "tpot", "total_latency")
    return np.array([np.mean([float(row[name]) for row in found]) for name in names]) / 1e3


def main() -> None:
    """Run both on all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--distserve", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--python", required=True, metavar="PYTHON", help="with simpy and pandas")
    parser.add_argument("--num-requests", type=int, default=2000, metavar="N")
    options = parser.parse_args()
    rows = []
    for text, rate_rps in CASES:
        placement = parse_placement(text)
        workload = WorkloadSpec("synthetic:sharegpt", rate_rps, options.num_requests, seed=1)
        # Their decodes have no limit on the batch.
        spec = RunSpec("distserve", workload, "a100", MODEL, placement=placement, max_running=10**6)
        requests = make_workload(workload, load_profile("a100", MODEL).context_tokens).requests
        here = ours(spec, requests)
        there = theirs(options.distserve, options.python, placement, requests)
        cells = [f"{a:.4f} / {b:.4f}" for a, b in zip(here, there, strict=True)]
        worst = np.abs(here / there - 1).max()
        rows.append([text, rate_rps, *cells, f"{100 * worst:.1f} %"])
    headings = ["placement", "rate", "TTFT s", "TPOT s", "latency s", "largest difference"]
    print(tabulate(rows, headings, tablefmt="github"))


if __name__ == "__main__":
    main()
