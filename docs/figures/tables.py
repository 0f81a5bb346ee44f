"""The tables of docs/scheduling.md, worked out by the scheduling core.

Owns the places in the page that are written by code: what is between ``<!-- begin NAME -->`` and
``<!-- end NAME -->``.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from enum import Enum
from typing import Any

from runs import MODES, Run
from worked import (
    CANDIDATES,
    REFUSED,
    fill,
    overflow,
    renewals,
    room_after,
    target,
)

from econoserve.core import filling, holding, late, risk
from econoserve.policies import econoserve
from econoserve.policies.econoserve import VARIANTS, EconoServeConfig


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown.

    Args:
        head: names of the columns.
        rows: what is in them.

    Returns:
        Lines.
    """
    head = tuple(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def admits() -> str:
    """What each mode makes of the same claims."""
    configs = [replace(config, reserve_fraction=0.0) for config in MODES.values()]
    rows = []
    for one in (*CANDIDATES, REFUSED):
        rooms = [room_after(config, one) for config in configs]
        cells = [f"{'no' if room < 0 else '**yes**'} ({room})" for room in rooms]
        rows.append((one.name, one.held_tokens, one.response_tokens, *cells))
    return table(("candidate", "prompt", "RL", *MODES), rows)


def burst() -> str:
    """How many of the same requests each way of promising admits."""
    ways = [("exact", 0.5), ("exact", 0.9), ("skyline", 0.5), ("skyline", 0.9)]
    ways += [("risk 0.1", None), ("risk 0.01", None)]
    rows = []
    for name, level in ways:
        _, count = fill(replace(MODES[name], reserve_fraction=0.0), level or 0.5)
        chance = overflow(count)
        promise = "eight outcomes" if level is None else f"one length, at level {level}"
        rows.append((name, promise, count, "< 0.001" if chance < 0.001 else f"{chance:.3f}"))
    return table(("mode", "promise", "begin at once", "KVC too small at the worst step"), rows)


def modes(runs: Mapping[tuple[str, bool], Run]) -> str:
    """What became of a workload in each mode.

    Args:
        runs: by mode, and whether lengths were known.

    Returns:
        Lines.
    """
    rows = []
    for known in (True, False):
        for name in MODES:
            run = runs[name, known]
            rows.append(
                (
                    "known" if known else "by kind",
                    name,
                    f"{run.mean_running:.1f}",
                    f"{100 * run.mean_use:.0f} %",
                    f"{run.mean_completion:,.0f}",
                    f"{len(run.moments):,}",
                    run.preempted,
                )
            )
    return table(
        ("lengths", "mode", "running", "KVC in use", "mean JCT", "all done", "preempted"), rows
    )


def renewed() -> str:
    """What is promised to a response that goes on and on."""
    asked = renewals()
    return table(
        ("tokens out", *(out for out, _ in asked)),
        [("RL promised", *(promised for _, promised in asked))],
    )


def targets() -> str:
    """TFS for several batches."""
    rows = []
    for decoding in (0, 64, 256):
        for tpot_s in (None, 0.02, 0.01, 0.005) if decoding else (None,):
            tokens = target(decoding, 512 * decoding, tpot_s)
            stated = "none" if tpot_s is None else f"{1e3 * tpot_s:.0f} ms"
            rows.append((decoding, stated, tokens, tokens - decoding))
    return table(("decoding", "tightest TPOT", "TFS", "of it for prompts"), rows)


def variants() -> str:
    """The ablation's variants."""
    adds = {
        "d": "separate queues for prompts and responses",
        "sd": "time-synced groups",
        "sdo": "the order by urgency, held KVC, length",
        "full": "KVC pipelining",
        "plus": "the skyline over distributions instead of pipelining; when prompts start; who "
        "steps back",
    }
    return table(
        ("variant", "ledger", "order", "adds"),
        [
            (f"`{name}`", f"`{mode.value}`", f"`{order.value}`", adds[name])
            for name, (mode, order) in VARIANTS.items()
        ],
    )


def bounds() -> str:
    """What limits the work of a plan."""
    return table(
        ("name", "value", "bounds"),
        [
            ("`LEVELS`", econoserve.LEVELS, "levels of urgency whose GTs are tested in vain"),
            ("`TRIES`", filling.TRIES, "prompts tested in vain"),
            ("`HELD_UP`", filling.HELD_UP, "prompts that wait for something else than KVC"),
            ("`GROUPS`", filling.GROUPS, "groups of prompts looked at"),
            ("`BATCH`", late.BATCH, "late prompts demoted or refused"),
            ("`PROMPTS`", holding.PROMPTS, "prompts whose waiting is added up"),
            ("`CELLS`", risk.CELLS, "grid points from the claims' own ends (mode `risk`)"),
            ("`HORIZONS`", len(risk.HORIZONS), "further grid points, farther and farther apart"),
        ],
    )


def constants() -> str:
    """The defaults of all that can be configured."""
    config = EconoServeConfig(capacity_tokens=1)
    names = ("kvc", "order", "victims", "tfs", "holding", "pausing", "shedding")
    parts = {name: getattr(config, name) for name in names}
    rows = [(f"`{name}`", _defaults(part)) for name, part in parts.items()]
    own = {"capacity_tokens", *parts}
    return table(("part", "defaults"), [*rows, ("the policy's own", _defaults(config, own))])


def tables(runs: Mapping[tuple[str, bool], Run]) -> dict[str, str]:
    """All tables.

    Args:
        runs: of the workload, by mode and whether lengths were known.

    Returns:
        Lines by the table's name.
    """
    return {
        "admits": admits(),
        "burst": burst(),
        "modes": modes(runs),
        "renewed": renewed(),
        "targets": targets(),
        "variants": variants(),
        "bounds": bounds(),
        "constants": constants(),
    }


def refresh(page: str, written: Mapping[str, str]) -> str:
    """Put tables into a page.

    Args:
        page: the page.
        written: lines by the table's name.

    Returns:
        The page with these tables.

    Raises:
        ValueError: the page has no place for one of them.
    """
    for name, lines in written.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        place = re.compile(f"{begin}.*?{end}", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"the page has no place for the table {name!r}: add {begin} and {end}")
        page = place.sub(lambda _, text=f"{begin}\n{lines}\n{end}": text, page)
    return page


def _defaults(config: Any, without: Iterable[str] = ()) -> str:
    """The fields of a configuration with their values."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return ", ".join(
        f"`{name}` {value.value if isinstance(value, Enum) else value}"
        for name, value in values.items()
        if name not in without
    )
