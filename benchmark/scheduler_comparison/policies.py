"""All policies on one engine: ``python -m benchmark.scheduler_comparison.policies``.

The same requests for every policy, interleaved, with hidden response lengths, at several sizes of
the KVC. It separates the policy from the engine. Takes the flags of ``run``, and ``--policies``.
"""

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmark.scheduler_comparison.figures import METRICS, figures
from benchmark.scheduler_comparison.report import command, machine, versions
from benchmark.scheduler_comparison.run import build_parser, check_options, prepare
from benchmark.scheduler_comparison.systems import RunFailed, Runner
from benchmark.scheduler_comparison.worker import ECONOSERVE
from econoserve.policies import POLICIES

SHOWN = ("output_tokens_per_s", "mean_jct_s", "p99_jct_s", "mean_ttft_s", "mean_tpot_ms", "slo_met")


def order_of_runs(
    repeats: int, kvc_sizes: Sequence[int], policies: Sequence[str]
) -> list[tuple[int, int, str]]:
    """The order in which everything runs.

    Args:
        repeats: runs per policy and size.
        kvc_sizes: sizes of the KVC in tokens.
        policies: their names.

    Returns:
        Repeat, size and policy of each run: the policies take turns, in an order that is reversed
        from one repeat to the next.
    """
    return [
        (repeat, kvc_tokens, policy)
        for repeat in range(repeats)
        for kvc_tokens in kvc_sizes
        for policy in (policies if repeat % 2 == 0 else policies[::-1])
    ]


def measure(
    runner: Runner, repeats: int, kvc_sizes: Sequence[int], policies: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Run everything.

    Args:
        runner: runs one engine at a time.
        repeats: runs per policy and size.
        kvc_sizes: sizes of the KVC in tokens.
        policies: their names.

    Yields:
        Each run when it is done: policy, size, repeat, figures, the engine's counters, failures.
    """
    with tqdm(order_of_runs(repeats, kvc_sizes, policies), unit="run", file=sys.stderr) as progress:
        for repeat, kvc_tokens, policy in progress:
            progress.set_description(f"{policy}, {kvc_tokens} tokens of KVC, repeat {repeat + 1}")
            run = {"policy": policy, "kvc_tokens": kvc_tokens, "repeat": repeat}
            try:
                one = replace(runner, settings={**runner.settings, "policy": policy})
                result = one.run(ECONOSERVE, kvc_tokens)
            except RunFailed as error:
                yield {**run, "figures": {}, "counters": {}, "failures": [str(error)]}
                continue
            answers = result["answers"]
            wrong = [
                f"{policy}: request {index}: {a['error'] or 'a response of another length'}"
                for index, a in enumerate(answers)
                if a["error"] or a["output_tokens"] != a["wanted_tokens"]
            ]
            yield {
                **run,
                "figures": figures(answers),
                "counters": result["counters"],
                "failures": wrong,
            }


def table(runs: Sequence[dict[str, Any]], table_format: str = "simple") -> str:
    """Lay out the result.

    Args:
        runs: all runs.
        table_format: a format of ``tabulate``.

    Returns:
        One row per size and policy, best mean JCT first, with medians over the repeats.
    """
    metrics = [metric for metric in METRICS if metric.key in SHOWN]
    rows = []
    for kvc_tokens in sorted({run["kvc_tokens"] for run in runs}):
        block = []
        for policy in dict.fromkeys(run["policy"] for run in runs):
            mine = [r for r in runs if (r["policy"], r["kvc_tokens"]) == (policy, kvc_tokens)]
            cells: list[str] = []
            for metric in metrics:
                values = [r["figures"].get(metric.key) for r in mine]
                known = [value for value in values if value is not None]
                cells.append(f"{statistics.median(known):,.{metric.digits}f}" if known else "-")
            for name in ("preempted", "allocation_failures", "recomputed_tokens"):
                counts = [(r["counters"] or {}).get(name, 0) for r in mine]
                cells.append(f"{statistics.median(counts):,.0f}")
            jcts = [r["figures"].get("mean_jct_s") or float("inf") for r in mine]
            block.append((statistics.median(jcts), [f"{kvc_tokens:,}", policy, *cells]))
        rows += [row for _, row in sorted(block)]
    titles = [metric.title for metric in metrics]
    headers = ["KVC tokens", "policy", *titles, "preempted", "retracted", "tokens recomputed"]
    return tabulate(rows, headers=headers, tablefmt=table_format, disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        argv: arguments; by default those of the command line.

    Returns:
        The exit status: 0 if all runs finished and every response has its intended length, else 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    parser.prog = "python -m benchmark.scheduler_comparison.policies"
    parser.description = "All policies on one engine, interleaved, with hidden response lengths."
    parser.add_argument(
        "--policies", nargs="+", choices=tuple(POLICIES), default=list(POLICIES), metavar="NAME"
    )
    options = parser.parse_args(arguments)
    check_options(parser, options)
    try:
        runner, settings = prepare(options)
    except ValueError as error:
        parser.error(str(error))
    runs = list(measure(runner, options.repeats, options.kvc, options.policies))
    print(f"\n{table(runs)}\n")
    failures = [failure for run in runs for failure in run["failures"]]
    about = {"settings": settings, "machine": machine(), "software": versions()}
    if options.json is not None:
        text = json.dumps({**about, "runs": runs}, indent=1)
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    if options.markdown is not None:
        line = command(arguments).replace("comparison.run", "comparison.policies")
        text = f"```\n{line}\n```\n\n{table(runs, 'github')}\n"
        Path(options.markdown).write_text(text, encoding="utf-8")
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
