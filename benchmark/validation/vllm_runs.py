"""Is the simulator right? Against real runs of vLLM: ``python -m benchmark.validation.vllm_runs``.

LLMServingSim published two runs of vLLM 0.19 with the time stamps of each of 300 requests. The
simulator serves the same requests, at the times at which they came, with policy ``vllm_v1``. Its
profiles know the GPU's operators and nothing of these runs. What the simulator that published them
gets is in their ``summary.txt``.
"""

import argparse
import gzip
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmark.profiles.operators import GPUS, profile
from econoserve.arguments import file_of
from econoserve.core.types import Outcome
from econoserve.policies import make_policy
from econoserve.prediction.quantile import GlobalQuantiles
from econoserve.sim.instance import Instance, Machine, Results
from econoserve.sim.operators import OperatorTables
from econoserve.sim.prefix import PrefixCaching
from econoserve.sim.profile import load_profile
from econoserve.sim.run import serve
from econoserve.sim.timing import IterationTime, Pass
from econoserve.workload.readers import read_jsonl
from econoserve.workload.trace import TraceRequest

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TRACE = "traces/sharegpt_llama31_300/sharegpt-llama-3.1-8b-300-sps10.jsonl.gz"
RUNS = "calibration/vllm_real_runs"
STAMPS = ("queued_ts", "arrival_time", "first_token_ts", "last_token_ts")
FIGURES = ("ttft_mean", "ttft_p90", "tpot_mean", "tpot_p90", "latency_mean", "latency_p90")
TARGETS = {"ttft_mean": 0.04, "tpot_mean": 0.01, "latency_mean": 0.02}
"""Relative errors that we aim at."""


@dataclass(frozen=True, slots=True)
class Model:
    """What of vLLM is modelled, and what the times of passes are from.

    Attributes:
        name: in the table.
        fitted: whether the packaged coefficients are used, not the operator tables.
        uneven: whether uneven contexts cost more than equal ones.
        caching: of prefixes.
        results: whether vLLM plans while the GPU computes, as it does by default.
    """

    name: str
    fitted: bool = False
    uneven: bool = True
    caching: PrefixCaching = PrefixCaching.BLOCKS
    results: Results = Results.LATE


MODELS = (
    Model("operator tables"),
    Model("fitted profile", fitted=True),
    Model("tables, contexts as if equal", uneven=False),
    Model("tables, no prefix caching", caching=PrefixCaching.OFF),
    Model("tables, results at once", results=Results.AT_ONCE),
)


@dataclass(frozen=True, slots=True)
class EvenContexts:
    """Times of passes as if all contexts in a pass were equal.

    Attributes:
        time: the times.
    """

    time: IterationTime

    def seconds(self, work: Pass) -> float:
        """See ``IterationTime.seconds``."""
        return self.time.seconds(replace(work, longest_tokens=0))


@dataclass(frozen=True, slots=True)
class RealRun:
    """What vLLM did.

    Attributes:
        arrivals_s: of the requests, from the first.
        figures: seconds by name of ``FIGURES``.
        published: relative errors of LLMServingSim.
        max_seqs: vLLM's ``max_num_seqs``.
        kvc_tokens: what vLLM found room for; ``None`` where the run does not say.
    """

    arrivals_s: list[float]
    figures: dict[str, float]
    published: dict[str, float]
    max_seqs: int
    kvc_tokens: int | None

    @classmethod
    def read(cls, folder: Path) -> "RealRun":
        """Read a run.

        A request's arrival was stamped by another clock than the rest. Both are laid on each other
        where a request was taken in fastest.

        Args:
            folder: has ``requests.jsonl``, ``meta.json`` and ``summary.txt``.

        Returns:
            The run.
        """
        lines = (folder / "requests.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        queued, arrived, first, last, tokens = (
            np.array([row[name] for row in rows]) for name in (*STAMPS, "output_toks")
        )
        arrived = arrived + (queued - arrived).min()
        meta = json.loads((folder / "meta.json").read_text())
        found = re.findall(
            r"(TTFT|TPOT|Latency) (Mean|P90) .* ([+-][\d.]+)%", (folder / "summary.txt").read_text()
        )
        return cls(
            (arrived - arrived.min()).tolist(),
            figures(arrived, first, last, tokens),
            {f"{what}_{which}".lower(): float(error) / 100 for what, which, error in found},
            meta["engine_kwargs"]["max_num_seqs"],
            meta.get("kv_cache", {}).get("num_kv_tokens"),
        )


def figures(
    arrived: np.ndarray, first: np.ndarray, last: np.ndarray, tokens: np.ndarray
) -> dict[str, float]:
    """The figures of a run.

    Args:
        arrived: when requests came, in seconds.
        first: when their first tokens were out.
        last: when their last ones were.
        tokens: of their responses, two or more each.

    Returns:
        Seconds by name of ``FIGURES``.
    """
    values = (first - arrived, (last - first) / (tokens - 1), last - arrived)
    found = [figure for one in values for figure in (one.mean(), np.percentile(one, 90))]
    return dict(zip(FIGURES, map(float, found), strict=True))


def simulated(
    run: RealRun, requests: Sequence[TraceRequest], time: IterationTime, kvc: int, model: Model
) -> dict[str, Any]:
    """Serve the requests of a run in the simulator.

    Args:
        run: the run.
        requests: its requests, by arrival.
        time: of passes.
        kvc: tokens of KVC.
        model: what is modelled.

    Returns:
        Its figures, and ``preemptions`` and ``recomputed_tokens``.
    """
    machine = Machine(
        kvc, time, max_running=run.max_seqs, caching=model.caching, results=model.results
    )
    policy = make_policy("vllm_v1", kvc, max_seqs=run.max_seqs)
    instance = Instance(machine, policy, GlobalQuantiles(0.5, 512))
    pairs = zip(requests, run.arrivals_s, strict=True)
    serve(instance, [replace(request, arrival_s=at_s) for request, at_s in pairs])
    records = instance.records
    if any(record.outcome is not Outcome.FINISHED for record in records):
        raise RuntimeError(f"{model.name}: not all requests were served")
    names = ("arrival_s", "first_token_s", "end_s", "output_tokens")
    columns = (np.array([getattr(record, name) for record in records]) for name in names)
    return {
        **figures(*columns),
        "preemptions": sum(record.preemptions for record in records),
        "recomputed_tokens": sum(record.recomputed_tokens for record in records),
    }


def validate(data: Path, gpu: str) -> dict[str, Any]:
    """Compare one real run.

    Args:
        data: the folder with traces and calibrations.
        gpu: its folder's name.

    Returns:
        Figures and errors.
    """
    run = RealRun.read(data / RUNS / gpu / "run")
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        Path(file.name).write_bytes(gzip.decompress((data / TRACE).read_bytes()))
        requests = read_jsonl(Path(file.name))
    packaged = load_profile(GPUS[gpu][0], "llama-3.1-8b")
    tables = OperatorTables.of(profile(data / RUNS / gpu / "profile", gpu)["time"])
    kvc = run.kvc_tokens or packaged.memory.capacity_tokens
    models = {}
    for model in MODELS:
        time: IterationTime = packaged.time if model.fitted else tables
        found = simulated(run, requests, time if model.uneven else EvenContexts(time), kvc, model)
        errors = {name: found[name] / run.figures[name] - 1 for name in FIGURES}
        met = {name: abs(errors[name]) <= limit for name, limit in TARGETS.items()}
        models[model.name] = {"figures": found, "errors": errors, "met": met}
    return {
        "gpu": gpu,
        "kvc_tokens": kvc,
        "max_seqs": run.max_seqs,
        "real": run.figures,
        "published_errors": run.published,
        "models": models,
    }


def table(result: dict[str, Any]) -> str:
    """A comparison as a table.

    Args:
        result: of ``validate``.

    Returns:
        Markdown; a star marks an error that is larger than its target.
    """
    rows = [["vLLM, real", *(f"{result['real'][name]:.4g} s" for name in FIGURES), ""]]
    compared = {"LLMServingSim": {"errors": result["published_errors"], "figures": {}}}
    for name, found in {**compared, **result["models"]}.items():
        cells = []
        for figure in FIGURES:
            error = found["errors"][figure]
            star = "*" if abs(error) > TARGETS.get(figure, np.inf) else ""
            cells.append(f"{error:+.1%}{star}")
        rows.append([name, *cells, str(found["figures"].get("preemptions", ""))])
    head = [result["gpu"], *(name.replace("_", " ") for name in FIGURES), "preempted"]
    align = ("left", *("right",) * (len(FIGURES) + 1))
    return tabulate(rows, head, tablefmt="github", colalign=align, disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare all runs.

    Args:
        argv: arguments; by default those of the command line.

    Returns:
        The exit status: 0, or 2 where the data are not there.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmark.validation.vllm_runs")
    add = parser.add_argument
    text = "folder with traces/ and calibration/. Default: ../shared/data of the project"
    add("--data", type=Path, default=DATA, metavar="DIR", help=text)
    add("--json", type=file_of(".json"), metavar="FILE", help="also write all figures there")
    options = parser.parse_args(argv)
    if not (options.data / TRACE).is_file():
        print(f"--data {options.data}: {TRACE} is not there; name the folder", file=sys.stderr)
        return 2
    results = [validate(options.data, gpu) for gpu in GPUS]
    for result in results:
        print(table(result), end="\n\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
