"""Collects what a CUDA machine without a network needs: ``python -m benchmark.gpu.prepare``.

Owns the command line and the order of the steps: trace what a server imports, subtract what the
machine has, fetch the rest, pack it without what its GPU never uses, cut it into parts. Every step
that was done before is not done again.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from benchmark.gpu.kit import closure, pack, rehearsal, wheels
from benchmark.gpu.kit.plan import (
    Decision,
    Rules,
    Target,
    Verdict,
    as_rows,
    decide,
    linked_names,
    requirements_here,
)

MIB = 1 << 20
OUT = closure.ROOT / ".gpu-kit"
LARGEST_PART_MIB = 60


def build_parser() -> argparse.ArgumentParser:
    """The command line.

    Returns:
        A parser.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmark.gpu.prepare", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=OUT, help="folder of everything; default: .gpu-kit")
    add("--dry-run", action="store_true", help="print what would travel, fetch nothing")
    add("--installed", type=Path, help="`pip list --format json` of that machine")
    add("--python", help="Python of that machine; default: the assumed target's")
    add("--rehearse", action="store_true", help="first run with nothing but what will be there")
    add("--trace", action="store_true", help="trace again what a server imports")
    add(
        "--part-mib",
        type=int,
        default=LARGEST_PART_MIB,
        help=f"size of a part in MiB; default: {LARGEST_PART_MIB}",
    )
    add("--jobs", type=int, default=os.cpu_count(), help="archives packed at once; default: CPUs")
    return parser


def target_of(options: argparse.Namespace) -> Target:
    """The machine that the command line describes.

    Args:
        options: the command line.

    Returns:
        The target.

    Raises:
        ValueError: the list of what is installed there cannot be read.
    """
    target = Target.read()
    if options.installed is not None:
        if not options.installed.exists():
            raise ValueError(f"--installed {options.installed.name}: no such file")
        target = target.with_installed(options.installed)
    return target if options.python is None else replace(target, python=options.python)


def importers_of(kept: Path) -> dict[str, list[str]]:
    """What a server imports, traced once.

    Args:
        kept: file that keeps the result.

    Returns:
        By distribution the traced programs that import it.

    Raises:
        closure.TraceFailed: a program did not run.
    """
    if not kept.exists():
        print("tracing what a server imports (about a minute)", file=sys.stderr)
        found = {name: sorted(by) for name, by in sorted(closure.find_closure().items())}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found, indent=1))
    return json.loads(kept.read_text())


def plan(imported: Sequence[str], target: Target, rules: Rules) -> list[Decision]:
    """Decide about everything that is needed.

    Args:
        imported: distributions that a server imports.
        target: the machine.
        rules: exceptions.

    Returns:
        The decisions.
    """
    names = {*imported, *rules.added}
    requirements = {name: requirements_here(name) for name in names}
    todo = set(rules.linked)
    while todo:
        requirements |= {name: requirements_here(name) for name in todo - set(requirements)}
        linked = linked_names(rules.linked, requirements, target)
        todo = linked - set(requirements)
    return decide(closure.installed_versions(names | linked), requirements, target, rules)


def installed_bytes(name: str) -> int:
    """Size of a distribution that is installed here.

    Args:
        name: its name.

    Returns:
        Bytes of its files.
    """
    found = (Path(str(file.locate())) for file in distribution(name).files or ())
    return sum(path.stat().st_size for path in found if path.exists())


def show_plan(decisions: Sequence[Decision], rules: Rules) -> None:
    """Print what travels and why, and what does not and why.

    Args:
        decisions: all.
        rules: what is left out of those that travel.
    """
    rows = [
        (one.name, one.version, one.verdict.value, installed_bytes(one.name) / MIB, one.reason)
        for one in decisions
    ]
    rows.sort(key=lambda row: (row[2] != Verdict.TRAVELS.value, row[2], -row[3]))
    headers = ("distribution", "version", "", "MiB installed here", "why")
    print(tabulate(rows, headers, floatfmt=".1f", disable_numparse=[1]))
    print()
    stripped = [
        (name, pattern, reason)
        for name, patterns in rules.strip.items()
        for pattern, reason in patterns.items()
    ]
    print(tabulate(stripped, ("left out of", "files", "why")))
    print("\nOf every library: machine code for other GPUs, and debug sections.")


def pack_all(
    found: Sequence[wheels.Wheel], target: Target, rules: Rules, out: Path, jobs: int
) -> list[pack.Archive]:
    """Fetch and pack.

    Args:
        found: the wheels.
        target: the machine.
        rules: what is left out.
        out: folder of everything.
        jobs: archives packed at once.

    Returns:
        The archives, largest first.

    Raises:
        wheels.NotAvailable: a wheel cannot be fetched.
    """
    with ProcessPoolExecutor(jobs) as pool:
        pending = []
        for wheel in tqdm(found, unit="wheel", desc="fetching", file=sys.stderr):
            path = wheels.fetch(wheel, out / "wheels", target)
            strip = tuple(rules.strip.get(wheel.distribution, ()))
            arguments = (path, wheel.distribution, wheel.version, strip)
            pending.append(
                pool.submit(pack.pack, *arguments, target.cuda_architecture, out / "archives")
            )
        waiting = tqdm(pending, unit="archive", desc="packing", file=sys.stderr)
        archives = [one.result() for one in waiting]
    return sorted(archives, key=lambda archive: -archive.bytes)


def show_parts(archives: Sequence[pack.Archive], parts: Sequence[dict]) -> None:
    """Print the sizes of what was made.

    Args:
        archives: all.
        parts: all.
    """
    columns = ("bytes", "installed_bytes", "left_out_bytes", "blanked_bytes")
    rows = [
        (one.distribution, one.version, *(getattr(one, name) / MIB for name in columns))
        for one in archives
    ]
    rows.append(("all", "", *(sum(row[i] for row in rows) for i in range(2, 6))))
    headers = ("distribution", "version", "MiB packed", "installed", "left out", "blanked")
    print(tabulate(rows, headers, floatfmt=".1f", disable_numparse=[1]))
    total = sum(part["bytes"] for part in parts)
    print(f"\n{len(parts)} parts, {total / MIB:.1f} MiB")


def main(argv: Sequence[str] | None = None) -> int:
    """Collect everything.

    Args:
        argv: arguments; by default those of the command line.

    Returns:
        The exit status.
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    if not 1 <= options.part_mib <= LARGEST_PART_MIB:
        parser.error(f"--part-mib {options.part_mib}: give 1 to {LARGEST_PART_MIB}")
    rules = Rules.read()
    try:
        target = target_of(options)
        kept = options.out / "closure.json"
        if options.trace:
            kept.unlink(missing_ok=True)
        imported = importers_of(kept)
        decisions = plan(list(imported), target, rules)
        show_plan(decisions, rules)
        if options.rehearse:
            rehearsal.rehearse(decisions, target, rules)
            print("\nrehearsed: nothing is missing")
        if options.dry_run:
            return 0
        wanted = {one.name: one.version for one in decisions if one.verdict is Verdict.TRAVELS}
        archives = pack_all(
            wheels.resolve(wanted, target), target, rules, options.out, options.jobs or 1
        )
    except (ValueError, closure.TraceFailed, rehearsal.Missing, wheels.NotAvailable) as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 1
    folder = options.out / "parts"
    parts = pack.cut(archives, options.out / "archives", folder, options.part_mib * MIB)
    made = pack.manifest(archives, parts, target.python, as_rows(decisions))
    (folder / pack.MANIFEST).write_text(json.dumps(made, indent=1) + "\n")
    show_parts(archives, parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
