"""Is a profile of our own engine right? ``python -m benchmark.validation.own_engine``.

Serves requests with our engine on this machine's CPU and logs its iterations, makes a profile of
the log, and predicts other runs: other rates, another KVC, other lengths drawn. Both sides run the
same policy; lengths are hidden from both, and predictors learn as they go.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from benchmark.scheduler_comparison.systems import RunFailed, Runner
from benchmark.scheduler_comparison.worker import ECONOSERVE
from benchmark.scheduler_comparison.workload import Request, Vocabulary, WorkloadSpec, generate
from econoserve import demo_model
from econoserve.arguments import file_of, whole_number
from econoserve.policies import make_policy
from econoserve.prediction.registry import make_replay_predictor
from econoserve.prediction.request import RequestFeatures
from econoserve.profiling import OUTLIER, profile_from, read_log
from econoserve.sim.instance import Instance, Machine, Results
from econoserve.sim.profile import Profile, profile_of
from econoserve.sim.records import summarise
from econoserve.sim.run import serve
from econoserve.workload.trace import TraceRequest

MAX_NEW_TOKENS = 512
TARGET = 0.05
"""Relative error of throughput and mean JCT that we aim at."""

FIGURES = ("throughput_rps", "mean_jct_s", "mean_ttft_s")


@dataclass(frozen=True, slots=True)
class Case:
    """One run of the engine.

    Attributes:
        rate_per_s: mean arrivals.
        kvc_tokens: size of the KVC.
        seed: of lengths, prompts and arrivals.
    """

    rate_per_s: float
    kvc_tokens: int
    seed: int


class Sent(NamedTuple):
    """The requests of a run.

    Attributes:
        requests: what is measured.
        warmup: what is sent before.
    """

    requests: list[Request]
    warmup: list[Request]

    @classmethod
    def draw(cls, case: Case, count: int, vocabulary: Vocabulary) -> "Sent":
        """Draw them.

        Args:
            case: what to run.
            count: requests.
            vocabulary: of the model.

        Returns:
            The requests; the same for equal arguments.
        """
        spec = WorkloadSpec(requests=count, seed=case.seed, rate_per_s=case.rate_per_s)
        warmup = WorkloadSpec(requests=32, seed=1000 + case.seed)
        return cls(generate(spec, vocabulary), generate(warmup, vocabulary))


RECORDED = Case(18.0, 6000, 1)
PREDICTED = (Case(12.0, 6000, 2), Case(9.0, 2500, 3))


def measured(
    case: Case, sent: Sent, log: Path, vocabulary: Vocabulary, model: Path
) -> list[dict[str, Any]]:
    """Run the engine.

    Args:
        case: what to run.
        sent: what is sent.
        log: for the iterations.
        vocabulary: of the model.
        model: its folder.

    Returns:
        The answers.

    Raises:
        RunFailed: the engine failed, or an answer was not as long as it should be.
    """
    settings = {"iteration_log": str(log), "predictor": "quantile"}
    runner = Runner(
        model, sent.requests, sent.warmup, vocabulary.eos_ids, MAX_NEW_TOKENS, settings=settings
    )
    answers = runner.run(ECONOSERVE, case.kvc_tokens)["answers"]
    wrong = [one for one in answers if one["error"] or one["output_tokens"] != one["wanted_tokens"]]
    if wrong:
        raise RunFailed(f"{len(wrong)} answers are not as they should be: {wrong[0]}")
    return answers


def figures_of(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Figures of a run of the engine, as the simulator has them.

    Args:
        answers: of all requests.

    Returns:
        By name of ``FIGURES``.
    """
    arrivals = np.array([one["arrival_s"] for one in answers])
    jct_s = np.array([one["jct_s"] for one in answers])
    span_s = (arrivals + jct_s).max() - arrivals.min()
    ttft_s = float(np.mean([one["ttft_s"] for one in answers]))
    return dict(zip(FIGURES, (len(answers) / span_s, float(jct_s.mean()), ttft_s), strict=True))


def predicted(
    profile: Profile, case: Case, requests: Sequence[Request], warmup: Sequence[Request]
) -> dict[str, float]:
    """Figures of a run in the simulator.

    Args:
        profile: of the engine.
        case: what to run.
        requests: what is sent.
        warmup: what was sent before, and learned from.

    Returns:
        By name of ``FIGURES``.
    """
    # The engine ends requests itself that state no more than this.
    trace = [
        TraceRequest(
            one.arrival_s,
            RequestFeatures.of_prompt(one.prompt_ids, MAX_NEW_TOKENS, limit_tokens=MAX_NEW_TOKENS),
            one.output_tokens,
        )
        for one in requests
    ]
    machine = Machine(case.kvc_tokens, profile.time, results=Results.LATE)
    policy = make_policy("plus", case.kvc_tokens)
    predictor = make_replay_predictor("quantile", 0.5, lambda seen: 0)
    for one in warmup:
        features = RequestFeatures.of_prompt(one.prompt_ids, MAX_NEW_TOKENS)
        predictor.predict(features)
        predictor.observe(features, one.output_tokens, True)
    instance = Instance(machine, policy, predictor)
    serve(instance, trace)
    found = summarise(instance.records, instance.use)
    return {name: found[name] for name in FIGURES}


def pass_error(log: Path, profile: Profile) -> float:
    """How far a profile is off for the iterations of a run, all together.

    What the same iterations took in another run shows how steady the machine is.

    Args:
        log: of the run's iterations.
        profile: of the engine.

    Returns:
        Relative error of their sum.
    """
    _, timed = read_log(log)
    expected_s = [profile.time.seconds(one.work) for one in timed]
    usual = [
        (guess_s, one.elapsed_s)
        for guess_s, one in zip(expected_s, timed, strict=True)
        if one.elapsed_s <= OUTLIER * guess_s
    ]
    return sum(guess_s for guess_s, _ in usual) / sum(real_s for _, real_s in usual) - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Record, fit and predict.

    Args:
        argv: arguments; by default those of the command line.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmark.validation.own_engine")
    add = parser.add_argument
    add(
        "--requests",
        type=whole_number(1),
        default=240,
        metavar="N",
        help="in each run. Default: %(default)s",
    )
    add("--json", type=file_of(".json"), metavar="FILE", help="also write all figures there")
    options = parser.parse_args(argv)
    model = demo_model.ensure()
    vocabulary = Vocabulary.of_model(model)
    rows, results = [], []
    profile: Profile | None = None
    try:
        with tempfile.TemporaryDirectory(prefix="own-engine-") as folder:
            for number, case in enumerate((RECORDED, *PREDICTED)):
                log = Path(folder) / f"{number}.jsonl"
                sent = Sent.draw(case, options.requests, vocabulary)
                answers = measured(case, sent, log, vocabulary, model)
                if profile is None:
                    fields, fit = profile_from(log)
                    profile = profile_of("own-engine", fields)
                real, simulated = figures_of(answers), predicted(profile, case, *sent)
                passes = pass_error(log, profile)
                errors = {name: simulated[name] / real[name] - 1 for name in FIGURES}
                results.append(
                    {"real": real, "simulated": simulated, "errors": errors, "passes": passes}
                )
                cells = [f"{real[name]:.4g} ({errors[name]:+.1%})" for name in FIGURES]
                use = "fitted to" if case is RECORDED else "predicted"
                rows.append(
                    [use, f"{case.rate_per_s:g}", case.kvc_tokens, *cells, f"{passes:+.1%}"]
                )
                print("\t".join(map(str, rows[-1])), file=sys.stderr)
    except RunFailed as error:
        print(f"python -m benchmark.validation.own_engine: {error}", file=sys.stderr)
        return 1
    head = ["run", "rate", "KVC tokens", "requests/s", "mean JCT s", "mean TTFT s", "iterations"]
    print(tabulate(rows, head, tablefmt="github", disable_numparse=True))
    print(
        "\nReal figures, and the simulator's errors; the last column has the profile's error for "
        f"that run's own iterations together. Fit: {fit.passes} iterations, mean error "
        f"{fit.mean_error:.1%}, error of their sum {fit.total_error:+.2%}."
    )
    if options.json:
        found = {"profile": fields, "runs": results}
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
