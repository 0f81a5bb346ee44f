"""Stock SGLang against EconoServe on one machine, interleaved, with hidden response lengths.

Owns the command line and the order of the runs. ``python -m benchmark.scheduler_comparison.run``
from the root of the repository; ``--quick`` takes a few minutes on two cores.
"""

import argparse
import json
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from benchmark.scheduler_comparison.figures import Run, compare, figures
from benchmark.scheduler_comparison.report import as_json, as_markdown, checks_text, table
from benchmark.scheduler_comparison.systems import SYSTEMS, RunFailed, Runner, cpu_busy_share
from benchmark.scheduler_comparison.workload import (
    Vocabulary,
    WorkloadSpec,
    describe,
    generate,
)

WARMUP_SEED_OFFSET = 1_000_003
SHOWN_FAILURES = 10
BUSY_LIMIT = 0.1
"""Share of the CPUs that other programs may use before a run without a warning."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured where the command line does not say.

    Attributes:
        requests: requests per run.
        repeats: runs per system and size of the KVC.
        kvc: sizes of the KVC in tokens.
    """

    requests: int
    repeats: int
    kvc: tuple[int, ...]


FULL = Size(requests=200, repeats=3, kvc=(4096, 8192))
QUICK = Size(requests=60, repeats=1, kvc=(4096,))


def build_parser() -> argparse.ArgumentParser:
    """The command line.

    Returns:
        A parser.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.scheduler_comparison.run", description=__doc__
    )
    add = parser.add_argument
    add("--quick", action="store_true", help=f"small defaults: {QUICK}")
    add("--requests", type=int, help=f"requests per run; default: {FULL.requests}")
    add("--repeats", type=int, help=f"runs per system and KVC size; default: {FULL.repeats}")
    add("--kvc", type=int, nargs="+", help=f"KVC sizes in tokens; default: {FULL.kvc}")
    add(
        "--workload",
        nargs="+",
        default=["lognormal"],
        metavar=("NAME", "FILE"),
        help="lognormal (default), uniform, or: trace FILE.csv",
    )
    add("--trace-scale", type=float, default=0.1, help="factor on a trace's lengths; default: 0.1")
    add("--rate", type=float, default=math.inf, help="arrivals per second; default: inf, a burst")
    add("--seed", type=int, default=1, help="of all random numbers; default: 1")
    add("--max-new-tokens", type=int, default=512, help="limit every request states; default: 512")
    add("--slo-fraction", type=float, default=0.0, help="share of requests with an SLO; default: 0")
    add("--slo-ms", type=float, default=10_000.0, help="their limit on JCT; default: 10000")
    add("--warmup", type=int, default=16, help="requests before a measured run; default: 16")
    add("--model-path", type=Path, help="folder of a model; default: the demo model")
    add("--attention-backend", default="econoserve_cpu", help="of both; default: econoserve_cpu")
    add(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of EconoServe, such as tfs=256; may be repeated",
    )
    add("--timeout-s", type=float, default=600.0, help="limit for one run; default: 600")
    add("--json", type=Path, help="write everything to this file")
    add("--markdown", type=Path, help="write a page with the result to this file if nothing failed")
    return parser


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before anything starts; fill in the defaults.

    Args:
        parser: reports errors.
        options: the command line; sizes are filled in.

    Raises:
        SystemExit: a value is out of range.
    """
    size = QUICK if options.quick else FULL
    options.requests = size.requests if options.requests is None else options.requests
    options.repeats = size.repeats if options.repeats is None else options.repeats
    options.kvc = sorted(set(options.kvc or size.kvc))
    for name in ("requests", "repeats", "warmup", "max_new_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: give 1 or more")
    for name in ("rate", "slo_ms", "timeout_s", "trace_scale"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: give more than 0")
    if not 0 <= options.slo_fraction <= 1:
        parser.error(f"--slo-fraction {options.slo_fraction}: give a share in [0, 1]")
    kind, *files = options.workload
    if len(files) != (1 if kind == "trace" else 0):
        parser.error(f"--workload {' '.join(options.workload)}: only trace takes a file, and one")
    for setting in options.setting:
        if "=" not in setting:
            parser.error(f"--setting {setting}: give NAME=VALUE")


def _settings_of(pairs: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, text = pair.split("=", 1)
        try:
            settings[name.replace("-", "_")] = json.loads(text)
        except json.JSONDecodeError:
            settings[name.replace("-", "_")] = text
    return settings


def prepare(options: argparse.Namespace) -> tuple[Runner, dict[str, Any]]:
    """Draw the requests.

    Args:
        options: the checked command line.

    Returns:
        What runs the systems, and the settings for the report.

    Raises:
        ValueError: the workload cannot be drawn, or does not fit the limits.
    """
    if options.model_path is None:
        from econoserve import demo_model

        model = demo_model.ensure()
    else:
        model = options.model_path.resolve()
    vocabulary = Vocabulary.of_model(model)
    kind, *files = options.workload
    spec = WorkloadSpec(
        kind=kind,
        requests=options.requests,
        seed=options.seed,
        rate_per_s=options.rate,
        slo_fraction=options.slo_fraction,
        slo_ms=options.slo_ms,
        trace=Path(files[0]) if files else None,
        trace_scale=options.trace_scale,
        longest_output_tokens=min(options.max_new_tokens, 400),
    )
    requests = generate(spec, vocabulary)
    warmup = generate(
        replace(
            spec,
            requests=options.warmup,
            seed=spec.seed + WARMUP_SEED_OFFSET,
            rate_per_s=math.inf,
            slo_fraction=0.0,
        ),
        vocabulary,
    )
    _check_fit([*requests, *warmup], options.max_new_tokens, min(options.kvc))
    settings = {
        "model": "demo model" if options.model_path is None else model.name,
        "dtype": "float32",
        "attention_backend": options.attention_backend,
        "kvc_tokens": options.kvc,
        "repeats": options.repeats,
        "workload": kind + "".join(f" {Path(file).name}" for file in files),
        **({"trace_scale": options.trace_scale} if files else {}),
        "lengths": describe(requests),
        "arrivals": "burst" if math.isinf(options.rate) else f"{options.rate:g} per second",
        "slo_ms": options.slo_ms if options.slo_fraction else None,
        "max_new_tokens": options.max_new_tokens,
        "warmup_requests": options.warmup,
        "seed": options.seed,
        "econoserve_settings": _settings_of(options.setting),
    }
    runner = Runner(
        model=model,
        requests=requests,
        warmup=warmup,
        eos_ids=vocabulary.eos_ids,
        max_new_tokens=options.max_new_tokens,
        attention_backend=options.attention_backend,
        timeout_s=options.timeout_s,
        settings=settings["econoserve_settings"],
    )
    return runner, settings


def _check_fit(requests: Sequence[Any], max_new_tokens: int, kvc_tokens: int) -> None:
    longest = max(request.output_tokens for request in requests)
    if longest > max_new_tokens:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: the longest response has {longest}")
    needed = max(len(request.prompt_ids) for request in requests) + max_new_tokens
    if needed >= kvc_tokens:
        raise ValueError(f"--kvc {kvc_tokens}: the longest request may need {needed} tokens")


def order_of_runs(repeats: int, kvc_sizes: Sequence[int]) -> list[tuple[int, int, str]]:
    """The order in which everything runs.

    Args:
        repeats: runs per system and size.
        kvc_sizes: sizes of the KVC in tokens.

    Returns:
        Repeat, size and system of each run: the systems take turns at every size, and the one
        that goes first changes with every repeat.
    """
    return [
        (repeat, kvc_tokens, system)
        for repeat in range(repeats)
        for kvc_tokens in kvc_sizes
        for system in (SYSTEMS if repeat % 2 == 0 else SYSTEMS[::-1])
    ]


def measure(runner: Runner, repeats: int, kvc_sizes: Sequence[int]) -> Iterator[Run]:
    """Run everything.

    Args:
        runner: runs one system at a time.
        repeats: runs per system and size.
        kvc_sizes: sizes of the KVC in tokens.

    Yields:
        Each run when it is done.

    Raises:
        RunFailed: a system did not finish a run.
    """
    with tqdm(order_of_runs(repeats, kvc_sizes), unit="run", file=sys.stderr) as progress:
        for repeat, kvc_tokens, system in progress:
            progress.set_description(f"{system}, {kvc_tokens} tokens of KVC, repeat {repeat + 1}")
            busy = cpu_busy_share()
            result = runner.run(system, kvc_tokens)
            answers = result["answers"]
            yield Run(
                system=system,
                kvc_tokens=kvc_tokens,
                repeat=repeat,
                busy_before=busy,
                start_s=round(result["start_s"], 1),
                figures=figures(answers),
                counters=result["counters"],
                answers=answers,
            )


def _stop_on_signal(number: int, _frame: object) -> NoReturn:
    """End by an exception, so that the engine that runs is stopped, too."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        argv: arguments; by default those of the command line.

    Returns:
        The exit status: 0 if all runs finished and every response has its intended length, else 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    options = parser.parse_args(arguments)
    check_options(parser, options)
    try:
        runner, settings = prepare(options)
    except ValueError as error:
        parser.error(str(error))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop_on_signal)
    runs: list[Run] = []
    failures: list[str] = []
    try:
        for run in measure(runner, options.repeats, options.kvc):
            runs.append(run)
    except RunFailed as error:
        failures.append(str(error))
    failures += [failure for run in runs for failure in run.failures]
    if rows := compare(runs):
        print(f"\n{table(rows)}\n\n{checks_text(runs)}")
    busiest = max((run.busy_before or 0.0 for run in runs), default=0.0)
    if busiest > BUSY_LIMIT:
        print(f"warning: other programs used up to {busiest:.0%} of the CPUs", file=sys.stderr)
    if options.json is not None and rows:
        text = json.dumps(as_json(runs, settings, arguments), indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.markdown is not None and not failures:
        options.markdown.write_text(as_markdown(runs, settings, arguments), encoding="utf-8")
    for failure in failures[:SHOWN_FAILURES]:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
