"""Prints a measurement: as tables, as a Markdown page and as JSON.

Owns how results look. It must never write a host's name or a path into them.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmark.cpu_engine.figures import BURST, DECODE, Sample, Table, headline, tables
from benchmark.cpu_engine.measure import Size
from benchmark.cpu_engine.models import TINY
from benchmark.cpu_engine.offline import KVC_TOKENS as OFFLINE_KVC_TOKENS
from benchmark.cpu_engine.offline import PROMPT_TOKENS
from benchmark.cpu_engine.serving import KVC_TOKENS as SERVER_KVC_TOKENS
from benchmark.cpu_engine.serving import LONGEST_TOKENS, RANGE_RATIO
from benchmark.cpu_engine.systems import DTYPE, SYSTEMS, VLLM_BLOCK_TOKENS
from benchmark.scheduler_comparison.report import machine, spread_text, versions

OUTPUT_FLAGS = ("--json", "--markdown")

EXPLANATION = """\
All systems of a part are up at once; they take turns, and a different one goes first in every \
repeat. Before one is measured, the others have come to rest (vLLM spins on one core for a second \
after its last request); the table above says what they used all the same. Decode steps are \
computed on all cores by everyone. As servers SGLang with our platform and vLLM leave a core to \
the HTTP process, by their own defaults; `torch_native` is upstream's default, all cores.

Figures are medians over the repeats with the lowest and the highest in brackets; ratios are taken \
repeat by repeat. For times, a ratio below 1 means that the first of the two is faster, for \
tokens/s one above 1. Absolute figures depend on the machine: compare within a table.

Decode steps: an offline engine gets B prompts of {prompt} random tokens that are in its prefix \
cache but for the last, greedy, `ignore_eos`. A step is the time by which a run with the longer \
responses exceeds one with the shorter, divided by the difference in tokens; what happens before \
cancels out. A sample is the median of at most five such pairs of runs, as many as fit 1.5 seconds.

Loads: `sglang.bench_serving` with `random-ids`, prompts and responses of {shortest} to {longest} \
tokens, the same requests for all systems, other ones in every repeat, prefix caches emptied \
before. Every request carries `ignore_eos` and its true length as `max_tokens`: the schedulers of \
SGLang and EconoServe see and use that length, vLLM does not use it. This compares engines; it \
says little about schedulers."""


def tables_text(samples: Sequence[Sample], sizes: Mapping[str, Size], heading: str = "") -> str:
    """Lay out all measurements.

    Args:
        samples: all samples.
        sizes: what was measured, by model.
        heading: Markdown's mark before each title.

    Returns:
        A titled table for each model and measurement.
    """
    return "\n\n".join(
        f"{heading}{_title(table, sizes[table.model])}\n\n{_table_text(table)}"
        for table in tables(samples)
    )


def _title(table: Table, size: Size) -> str:
    if table.measurement == DECODE:
        what = f"decode step, context {size.span.mean_context_tokens:g} tokens on average"
    elif table.measurement == BURST:
        what = f"burst of {size.burst.requests} requests"
    else:
        what = f"{size.open.requests} requests, {size.open.rate_per_s:g} per second"
    return f"{table.model} model: {what}"


def _table_text(table: Table) -> str:
    rows = [
        (
            f"`{system}`",
            *(spread_text(spreads.get(column.key), column.digits) for column in table.columns),
        )
        for system, spreads in table.spreads.items()
    ]
    rows += [
        (
            f"{over} / {under}",
            *(spread_text(spreads.get(column.key), 2) for column in table.columns),
        )
        for (over, under), spreads in table.ratios.items()
    ]
    return tabulate(
        rows,
        ("", *(column.title for column in table.columns)),
        tablefmt="github",
        disable_numparse=True,
        colalign=("left", *("right" for _ in table.columns)),
    )


def settings(sizes: Mapping[str, Size], systems: Sequence[str]) -> dict[str, Any]:
    """What was run.

    Args:
        sizes: what was measured, by model.
        systems: those that were to be measured.

    Returns:
        Plain values.
    """
    return {
        "systems": {name: SYSTEMS[name].title for name in systems},
        "dtype": DTYPE,
        "decode_prompt_tokens": PROMPT_TOKENS,
        "decode_kvc_tokens": OFFLINE_KVC_TOKENS,
        "server_kvc_tokens": SERVER_KVC_TOKENS,
        "vllm_block_tokens": VLLM_BLOCK_TOKENS,
        "true_lengths_are_visible": "to SGLang's and our scheduler, unused by vLLM",
        "models": {model: asdict(size) for model, size in sizes.items()},
    }


def environment(facts: Mapping[str, Mapping[str, Any]], date: str) -> dict[str, Any]:
    """What it was run on.

    Args:
        facts: by system; see ``measure.Session``.
        date: when, as ISO 8601.

    Returns:
        Plain values.
    """
    return {
        "date": date,
        "machine": machine(),
        "versions": versions(),
        "systems": {system: dict(found) for system, found in facts.items()},
    }


def _mean_cores(samples: Sequence[Sample], system: str, key: str) -> float | None:
    found = [
        sample.details[key]
        for sample in samples
        if sample.system == system and sample.measurement == DECODE and key in sample.details
    ]
    return sum(found) / len(found) if found else None


def _systems_text(samples: Sequence[Sample], facts: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for system, found in facts.items():
        cores = _mean_cores(samples, system, "cores")
        others = _mean_cores(samples, system, "idle_systems_cores")
        rows.append(
            (
                f"`{system}`",
                SYSTEMS[system].title,
                found.get("vllm", ""),
                found.get("omp_num_threads") or "unset",
                "-" if cores is None else f"{cores:.2f}",
                f"{found.get('idle_cores', 0.0):.3f}",
                "-" if others is None else f"{others:.3f}",
            )
        )
    headers = (
        "",
        "what it is",
        "version",
        "`OMP_NUM_THREADS` of the engine",
        "cores in use while decoding",
        "cores in use while idle, at most",
        "by idle systems meanwhile",
    )
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def summary_text(
    samples: Sequence[Sample],
    sizes: Mapping[str, Size],
    facts: Mapping[str, Mapping[str, Any]],
    date: str,
    heading: str = "",
) -> str:
    """Tables, systems and settings.

    Args:
        samples: all samples.
        sizes: what was measured, by model.
        facts: by system; see ``measure.Session``.
        date: when, as ISO 8601.
        heading: Markdown's mark before each title.

    Returns:
        Markdown.
    """
    host = machine()
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    repeats = "; ".join(
        f"{model} model {size.repeats}, open loop {size.open_repeats}"
        for model, size in sizes.items()
    )
    facts_text = "\n".join(
        (
            f"- {host['cpu_model']}, {host['cpus']} CPUs, {host['architecture']}; {date}",
            f"- {packages}",
            f"- {DTYPE}; KVC {OFFLINE_KVC_TOKENS:,} tokens for decode steps, "
            f"{SERVER_KVC_TOKENS:,} for loads; vLLM's blocks have {VLLM_BLOCK_TOKENS} tokens",
            f"- repeats: {repeats}",
        )
    )
    explanation = EXPLANATION.format(
        prompt=PROMPT_TOKENS, shortest=int(LONGEST_TOKENS * RANGE_RATIO), longest=LONGEST_TOKENS
    )
    return "\n\n".join(
        (
            tables_text(samples, sizes, heading),
            f"{heading}Systems",
            _systems_text(samples, facts),
            f"{heading}How it was measured",
            explanation,
            facts_text,
        )
    )


def command(arguments: Sequence[str]) -> str:
    """The command that repeats a measurement.

    Args:
        arguments: those of this run.

    Returns:
        A command line without output files.
    """
    kept: list[str] = []
    after_output = False
    for argument in arguments:
        if argument.split("=")[0] in OUTPUT_FLAGS:
            after_output = "=" not in argument
        elif after_output and not argument.startswith("-"):
            after_output = False
        else:
            after_output = False
            kept.append(argument)
    return shlex.join(["python", "-m", "benchmark.cpu_engine.run", *kept])


def as_markdown(summary: str, arguments: Sequence[str]) -> str:
    """A page with the result.

    Args:
        summary: see ``summary_text``.
        arguments: the command line.

    Returns:
        Markdown.
    """
    return f"# The CPU engine and its peers\n\n```\n{command(arguments)}\n```\n\n{summary}\n"


def as_json(
    samples: Sequence[Sample],
    sizes: Mapping[str, Size],
    facts: Mapping[str, Mapping[str, Any]],
    failures: Sequence[str],
    arguments: Sequence[str],
    date: str,
) -> dict[str, Any]:
    """Everything that was measured.

    Args:
        samples: all samples.
        sizes: what was measured, by model.
        facts: by system; see ``measure.Session``.
        failures: what went wrong.
        arguments: the command line.
        date: when, as ISO 8601.

    Returns:
        Plain values. The first three keys are medians of the tiny model.
    """
    return {
        **headline(samples, TINY),
        "models": {
            model: {
                **headline(samples, model),
                "tables": [
                    {
                        "measurement": table.measurement,
                        "spreads": {
                            system: {key: asdict(spread) for key, spread in spreads.items()}
                            for system, spreads in table.spreads.items()
                        },
                        "ratios": {
                            f"{over}/{under}": {
                                key: asdict(spread) for key, spread in spreads.items()
                            }
                            for (over, under), spreads in table.ratios.items()
                        },
                    }
                    for table in tables(samples)
                    if table.model == model
                ],
            }
            for model in sizes
        },
        "samples": [asdict(sample) for sample in samples],
        "settings": settings(sizes, list(facts)),
        "environment": environment(facts, date),
        "failures": [without_folders(failure) for failure in failures],
        "command": command(arguments),
    }


def without_folders(text: str) -> str:
    """Take the names of folders out of a message.

    Args:
        text: a message.

    Returns:
        The message with file names only.
    """
    words = text.split(" ")
    return " ".join(Path(word).name if word.count(os.sep) > 1 else word for word in words)
