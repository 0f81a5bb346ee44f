"""Prints the comparison: Markdown tables, and a page with plots.

Owns how results look. It must never write a host's name or a path into them.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from tabulate import tabulate

from benchmark.cpu_engine.systems import ECONOSERVE
from benchmark.serving import summary
from benchmark.serving.comparison import compare, uneven
from benchmark.serving.figures import Record, grouped, median
from benchmark.serving.records import LATE_S, is_late
from benchmark.serving.systems import KVC_TOKENS, NAMES
from benchmark.serving.workloads import WORKLOADS
from econoserve.report import plots
from econoserve.report.plots import Look, Looks, svg
from econoserve.report.style import STYLE

COLUMNS: dict[str, tuple[str, float, int]] = {
    "not_served": ("not served", 1, 0),
    "ssr": ("SSR", 1, 3),
    "goodput_rps": ("goodput/s", 1, 2),
    "throughput_tokens_per_s": ("tokens/s", 1, 0),
    "mean_jct_s": ("mean JCT s", 1, 2),
    "p50_jct_s": ("p50", 1, 2),
    "p99_jct_s": ("p99", 1, 2),
    "mean_ttft_s": ("mean TTFT s", 1, 3),
    "p50_ttft_s": ("p50", 1, 3),
    "p99_ttft_s": ("p99", 1, 3),
    "mean_tpot_s": ("mean TPOT ms", 1e3, 2),
    "p50_tpot_s": ("p50", 1e3, 2),
    "p99_tpot_s": ("p99", 1e3, 2),
    "preemptions": ("preempted", 1, 0),
    "recomputed_tokens": ("recomputed", 1, 0),
    "cached_tokens": ("cached", 1, 0),
    "kvc_use_mean": ("KVC use", 1, 2),
    "cpu_ms_per_token": ("CPU ms/token", 1, 3),
}
"""Figures of a run: heading, factor and decimals."""

PEERS = tuple(name for name in NAMES if name != ECONOSERVE)
WORDS = {
    "SSR": "share of all requests that were served within all of their objectives",
    "goodput": "these requests per second, from the first arrival to the last answer",
    "not served": "requests refused, or without their last token in time, of all repeats",
    "JCT, TTFT": (
        "from when a request was due to its last and its first token at the client, of the "
        "requests that were served"
    ),
    "TPOT": "time for each token after the first",
    "preempted": (
        "vLLM's preemptions, SGLang's retractions, EconoServe's preemptions that give KVC "
        "up or move it to host memory"
    ),
    "recomputed": "prompt and output tokens computed again; - where a system does not say",
    "cached": "prompt tokens found in the prefix cache; vLLM finds whole blocks of 32",
    "KVC use": "mean of the server's own gauge, once a second; vLLM counts whole blocks",
    "CPU": "of all processes of the server, without the load generator",
}


def summarised(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Runs over their repeats.

    Args:
        records: of runs.

    Returns:
        For each workload, size of the KVC, rate and system the median of each figure, and
        ``repeats``; as the plots of ``econoserve.report`` take them.
    """
    names = ("workload", "kvc", "load", "rate_rps", "system")
    found = []
    for key, runs in grouped(records, *names).items():
        row = dict(zip(names, key, strict=True))
        row["policy"] = row["system"]
        row["repeats"] = len(runs)
        for name in (*COLUMNS, "mean_normalised_latency_s", "kvc_use_max"):
            row[name] = median(run.get(name) for run in runs)
        row["not_served"] = sum(run["requests"] - run["served"] for run in runs)
        deciles = zip(*(run["ssr_by_demand"] for run in runs), strict=True)
        row["ssr_by_demand"] = [median(values) for values in deciles]
        row["jct_percentiles_s"] = _percentiles(runs)
        found.append(row)
    systems = {name: number for number, name in enumerate(NAMES)}
    return sorted(
        found,
        key=lambda row: (
            list(WORKLOADS).index(row["workload"]),
            list(KVC_TOKENS).index(row["kvc"]),
            row["load"],
            systems.get(row["system"], len(NAMES)),
            row["system"],
        ),
    )


def _percentiles(runs: Sequence[Record]) -> list[list[float]]:
    known = [run["jct_percentiles_s"] for run in runs if run.get("jct_percentiles_s")]
    return [
        [pairs[0][0], median(value for _, value in pairs)] for pairs in zip(*known, strict=True)
    ]


def _cell(value: Any, factor: float, digits: int) -> str:
    return "-" if value is None else f"{value * factor:,.{digits}f}"


def _title(workload: str, kvc: str) -> str:
    return f"{WORKLOADS[workload].title}, KVC {kvc} ({KVC_TOKENS[kvc]:,} tokens)"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    headings = ["rate", "system", *(heading for heading, _, _ in COLUMNS.values())]
    lines = [
        [
            f"{row['rate_rps']:g}",
            f"`{row['system']}`",
            *(_cell(row[name], factor, digits) for name, (_, factor, digits) in COLUMNS.items()),
        ]
        for row in rows
    ]
    return _github(lines, headings)


def _github(lines: Sequence[Sequence[str]], headings: Sequence[str]) -> str:
    align = ["right"] * len(headings)
    return tabulate(
        lines, headings, tablefmt="github", disable_numparse=True, colalign=align if lines else None
    )


def _deciles(rows: Sequence[Mapping[str, Any]]) -> str:
    headings = ["rate", "system", *(str(part) for part in range(1, 11))]
    lines = [
        [
            f"{row['rate_rps']:g}",
            f"`{row['system']}`",
            *(_cell(value, 1, 2) for value in row["ssr_by_demand"]),
        ]
        for row in rows
    ]
    return _github(lines, headings)


def _systems(records: Sequence[Record]) -> list[str]:
    found = dict.fromkeys(record["system"] for record in records)
    return [name for name in NAMES if name in found] + [n for n in found if n not in NAMES]


def _classes(rows: Sequence[Record]) -> str:
    lines = []
    for (rate, system), runs in grouped(rows, "rate_rps", "system").items():
        for name in runs[0]["classes"]:
            figures = [run["classes"][name] for run in runs]
            lines.append(
                [
                    f"{rate:g}",
                    f"`{system}`",
                    name,
                    _cell(median(one["ssr"] for one in figures), 1, 3),
                    _cell(median(one["mean_jct_s"] for one in figures), 1, 2),
                ]
            )
    return _github(lines, ["rate", "system", "class", "SSR", "mean JCT s"])


def as_markdown(records: Sequence[Record], facts: Mapping[str, Any]) -> str:
    """The page of tables.

    Args:
        records: of all runs.
        facts: the terms of the comparison and the environment.

    Returns:
        Markdown.
    """
    rows = summarised(records)
    systems = _systems(records)
    parts = ["# EconoServe, stock SGLang and vLLM as servers", f"```\n{facts['command']}\n```"]
    parts.append("## Goodput\n\n" + summary.DEFINITIONS)
    parts.append(summary.table(compare(records, ECONOSERVE, PEERS), systems))
    for (workload, kvc), own in grouped(rows, "workload", "kvc").items():
        parts.append(f"## {_title(workload, kvc)}\n\n{_table(own)}")
        parts.append(
            "SSR of each tenth of the requests by KVC-time demand, least first:\n\n" + _deciles(own)
        )
        runs = [r for r in records if r["workload"] == workload and r["kvc"] == kvc]
        if len(runs[0]["classes"]) > 1:
            parts.append("By class:\n\n" + _classes(runs))
    parts.append("## Words\n\n" + "\n".join(f"- {name}: {said}" for name, said in WORDS.items()))
    parts.append("## Terms\n\n" + "\n".join(f"- {line}" for line in _terms(records, facts)))
    return "\n\n".join(parts) + "\n"


def _terms(records: Sequence[Record], facts: Mapping[str, Any]) -> Iterator[str]:
    machine = facts["machine"]
    yield (
        f"{machine['cpu_model']}, {machine['cpus']} CPUs, {machine['architecture']}; "
        + facts["date"]
    )
    yield ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    yield (
        f"{facts['model']}, {facts['dtype']}; context {facts['context_tokens']:,} tokens; every "
        f"request states max_tokens={facts['max_tokens']:,}, its length is hidden"
    )
    count = facts["requests"]
    arriving = f"{count} requests" if count else f"arrivals of {facts['arrivals_s']:g} s"
    scale = f"objectives x{facts['slo_scale']:g}"
    yield f"{arriving}, {facts['arrivals']}, seed {facts['seed']}; {scale}"
    for name in dict.fromkeys(record["workload"] for record in records):
        for one in WORKLOADS[name].classes:
            stated = {"TTFT": one.slo.ttft_s, "TPOT": one.slo.tpot_s, "E2E": one.slo.e2e_s}
            slo = ", ".join(f"{key} {1e3 * value:g} ms" for key, value in stated.items() if value)
            yield (
                f"{name}: {one.share:.0%} {one.name}, {one.lengths}, prompts "
                f"x{one.prompt_scale:g}, responses x{one.output_scale:g}, {slo}; "
                + facts["sources"][name]
                + (
                    f"; arrivals for {span:g} times as long"
                    if (span := WORKLOADS[name].span) != 1
                    else ""
                )
            )
    for name, known in facts["systems"].items():
        yield f"{name}: " + ", ".join(f"{key} {value}" for key, value in known.items())
    busy = max((record["busy_before"] or 0.0 for record in records), default=0.0)
    yield f"other programs used up to {busy:.0%} of the CPUs before a server was started"
    lag = max(record["client_lag_s"] for record in records)
    late = [record for record in records if is_late(record)]
    if late:
        names = ", ".join(
            f"{name} {len(runs)}" for (name,), runs in grouped(late, "system").items()
        )
        yield (
            f"WARNING: the load generator was more than {LATE_S * 1e3:g} ms late in {len(late)} of "
            f"{len(records)} runs ({names}): it got no CPU; measure these again on an idle machine "
            "(--repeat-late)"
        )
    for lacking in uneven(records):
        yield f"WARNING: {lacking}; the better peer may be another one"
    if not all(record.get("client_has_precedence") for record in records):
        yield "the load generator ran without precedence over other programs"
    yield f"requests were sent up to {lag * 1e3:.0f} ms after they were due; that counts as theirs"
    yield f"runs with a request that ended in an error: {sum(bool(r['errors']) for r in records)}"


def as_html(records: Sequence[Record], facts: Mapping[str, Any]) -> str:
    """The page with plots, in one file that needs no network.

    Args:
        records: of all runs.
        facts: the terms of the comparison and the environment.

    Returns:
        HTML.
    """
    plots.check_matplotlib()
    rows = summarised(records)
    looks = {name: Look(number) for number, name in enumerate(_systems(records))}
    found = compare(records, ECONOSERVE, PEERS)
    title = "EconoServe, stock SGLang and vLLM as servers"
    parts = [f"<h1>{title}</h1>", "<h2>Goodput</h2>"]
    parts.append(f"<p>{escape(summary.DEFINITIONS)}</p>")
    parts.append(_html(summary.table(found, list(looks))))
    draw = summary.bars(found, looks)
    parts.append(_figure(draw, (11, 3.2), "goodput", "Goodput at 90 % attainment of objectives."))
    for number, ((workload, kvc), own) in enumerate(grouped(rows, "workload", "kvc").items()):
        parts.append(f"<h2>{escape(_title(workload, kvc))}</h2>")
        parts.extend(_plots(own, looks, f"w{number}"))
        parts.append(_html(_table(own)))
        parts.append("<p>SSR of each tenth of the requests by KVC-time demand, least first:</p>")
        parts.append(_html(_deciles(own)))
        runs = [r for r in records if r["workload"] == workload and r["kvc"] == kvc]
        if len(runs[0]["classes"]) > 1:
            parts.extend(("<p>By class:</p>", _html(_classes(runs))))
    words = (f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in WORDS.items())
    parts.append(f"<h2>Words</h2><dl>{''.join(words)}</dl>")
    terms = "".join(f"<li>{escape(line)}</li>" for line in _terms(records, facts))
    parts.append(f"<h2>Terms and environment</h2><ul>{terms}</ul>")
    parts.append(f"<details><summary>All settings</summary><pre>{_dump(facts)}</pre></details>")
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8" />\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _dump(facts: Mapping[str, Any]) -> str:
    return escape(json.dumps(facts, indent=1))


def as_plot(records: Sequence[Record]) -> str:
    """The plot of goodput as a file of its own, for light and dark pages.

    Args:
        records: of all runs.

    Returns:
        SVG.
    """
    plots.check_matplotlib()
    looks = {name: Look(number) for number, name in enumerate(_systems(records))}
    draw = summary.bars(compare(records, ECONOSERVE, PEERS), looks)
    text = svg(draw, (11, 3.4), "goodput")
    look = STYLE[: STYLE.index("body {")] + "svg { background: var(--page); }"
    return text.replace(">", f">\n<style>{look}</style>", 1)


def _html(markdown: str) -> str:
    """Tables and lists as this module writes them, as HTML."""
    found: list[str] = []
    table: list[list[str]] = []
    for line in (*markdown.splitlines(), ""):
        if line.startswith("|"):
            cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
            if len(table) != 1 or set("".join(cells)) - set("-:"):  # else the line under the head
                table.append(cells)
            continue
        if table:
            found.append(_html_table(table))
            table = []
        if line:
            found.append(f"<p>{escape(line.removeprefix('- '))}</p>")
    return "\n".join(found)


def _html_table(table: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table[1:]
    )
    table_text = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table_text}</div>'


def _plots(rows: Sequence[Mapping[str, Any]], looks: Looks, name: str) -> Iterator[str]:
    rates = sorted({row["rate_rps"] for row in rows})
    if len(rates) > 1:
        panels = {"ssr": "SSR", "goodput_rps": "goodput, per second", "mean_jct_s": "mean JCT, s"}
        draw = plots.against_rate(panels, rows, looks)
        yield _figure(draw, (11, 3.2), f"{name}-rate", "SSR, goodput and mean JCT against rate.")
    top = [row for row in rows if row["rate_rps"] == rates[-1]]
    at = f"at {rates[-1]:g} arrivals per second"
    draw = plots.by_demand(top, looks)
    yield _figure(draw, (7, 3.2), f"{name}-demand", f"SSR by demand of KVC-time {at}.")
    if found := [row for row in top if row["jct_percentiles_s"]]:
        draw = plots.jct_distribution(found, looks)
        yield _figure(draw, (7, 3.2), f"{name}-jct", f"Distribution of JCT {at}.")


def _figure(draw: Callable[[Any], None], size: tuple[float, float], name: str, caption: str) -> str:
    text = escape(caption)
    drawing = svg(draw, size, name).replace("<svg", f'<svg role="img" aria-label="{text}"', 1)
    return f'<figure><div class="wide">{drawing}</div><figcaption>{text}</figcaption></figure>'
