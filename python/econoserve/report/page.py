"""The page of a report: what was run, its table and its plots, in one file that needs no network.

Owns what is shown: runs that differ in nothing but policy and rate are shown together.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

from econoserve.report import plots
from econoserve.report.plots import Look, Looks, Result, policies, svg
from econoserve.report.style import STYLE
from econoserve.report.table import COLUMNS, cell, cells
from econoserve.sim.profile import ProfileError, load_profile
from econoserve.workload.synthetic import synthetic_workloads
from econoserve.workload.workload import SYNTHETIC

ABLATION = ("d", "sd", "sdo", "full", "plus")

SETTINGS = {
    "trace": "trace",
    "window_h": "hours of the trace",
    "arrivals": "arrivals",
    "requests": "requests",
    "hardware": "hardware",
    "model": "model",
    "instances": "instances",
    "router": "router",
    "tensor": "tensor parallelism",
    "placement": "placement",
    "link_bytes_per_s": "link, bytes/s",
    "capacity_tokens": "KVC, tokens",
    "slo": "SLO",
    "predictor": "predictor",
    "max_running": "most running",
    "overhead_s": "scheduling, s an iteration",
    "prefix_caching": "prefix caching",
    "results": "results known",
    "seed": "seed",
}
"""What runs that are shown together have in common, and its names."""

WORDS = {
    "SSR": "share of all requests that were served within all of their objectives; - without any",
    "goodput": "these requests per second",
    "JCT, TTFT": "from arrival to the last and to the first token, of served requests",
    "TPOT": "time for each token after the first",
    "KVC held": "KVC that was held, over the whole run, as a share of all",
    "useful": "what of it belonged to requests in the forward pass and was not thrown away later",
    "in backlog": "the same over the time in which requests waited that held no KVC",
    "TFS": "target forward size of EconoServe's policies",
}


def page(results: Sequence[Result], title: str) -> str:
    """Make the page.

    Args:
        results: of runs, at least one, each as ``econoserve simulate --output json`` prints it.
        title: of the page.

    Returns:
        HTML; the same for the same results.

    Raises:
        ReportError: matplotlib is missing.
    """
    plots.check_matplotlib()
    looks = {policy: Look(number) for number, policy in enumerate(policies(results))}
    parts = [f"<h1>{escape(title)}</h1>"]
    count = "1 run" if len(results) == 1 else f"{len(results)} runs"
    parts.append(f"<p>{count} of EconoServe's simulator.</p>")
    for number, runs in enumerate(_together(results)):
        parts.extend(_section(runs, looks, f"s{number}"))
    words = (f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in WORDS.items())
    parts.append(f"<h2>Words</h2><dl>{''.join(words)}</dl>")
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8" />\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>"
    )


def _together(results: Sequence[Result]) -> list[list[Result]]:
    """Runs by their setting; of the same policy at the same rate, the last."""
    groups: dict[str, dict[tuple[str, float], Result]] = {}
    for result in results:
        setting = json.dumps([result.get(name) for name in SETTINGS])
        groups.setdefault(setting, {})[result["policy"], result["rate_rps"]] = result
    return [list(group.values()) for group in groups.values()]


def _section(runs: Sequence[Result], looks: Looks, name: str) -> Iterator[str]:
    first = runs[0]
    title = " on ".join(filter(None, (str(first.get("model", "")), str(first["hardware"]))))
    yield f"<h2>{escape(str(first['trace']))}, {escape(title)}</h2>"
    said = (
        f"<dt>{escape(words)}</dt><dd>{escape(_setting(first[key]))}</dd>"
        for key, words in SETTINGS.items()
        if first.get(key) not in (None, "")
    )
    yield f'<dl class="settings">{"".join(said)}</dl>'
    yield _table(runs)
    yield from _plots(runs, looks, name)
    for label, source in _sources(first):
        yield f'<p class="source">{label}: {escape(source)}</p>'


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {limit:g}" for name, limit in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(runs: Sequence[Result]) -> str:
    headings = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in COLUMNS.values())
    rows = []
    for run in runs:
        policy, *others = cells(run)
        values = "".join(f"<td>{escape(value)}</td>" for value in others)
        rows.append(f'<tr><th scope="row">{escape(policy)}</th>{values}</tr>')
    return (
        f'<div class="wide"><table><thead><tr>{headings}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _plots(runs: Sequence[Result], looks: Looks, name: str) -> Iterator[str]:
    rates = sorted({run["rate_rps"] for run in runs})
    if len(rates) > 1:
        panels = {
            "mean_normalised_latency_s": "mean JCT per output token, s",
            "mean_jct_s": "mean JCT, s",
        }
        draw = plots.against_rate(panels, runs, looks)
        yield _figure(draw, (9, 3.2), f"{name}-latency", "Latency against rate.")
        panels = {"throughput_rps": "served per second"}
        if any(run.get("ssr") is not None for run in runs):
            panels = {"ssr": "SSR", "goodput_rps": "goodput, per second"}
        draw = plots.against_rate(panels, runs, looks)
        words = "SSR and goodput" if "ssr" in panels else "Throughput"
        yield _figure(draw, (9, 3.2), f"{name}-ssr", f"{words} against rate.")
    top = [run for run in runs if run["rate_rps"] == rates[-1]]
    at = f"at {cell(rates[-1])} arrivals per second"
    if found := [run for run in top if run.get("ssr_by_demand")]:
        words = f"SSR by demand of KVC-time {at}: the tokens that a request holds, summed over its"
        draw = plots.by_demand(found, looks)
        yield _figure(draw, (7, 3.2), f"{name}-demand", f"{words} iterations.")
    if found := [run for run in top if run.get("jct_percentiles_s")]:
        draw = plots.jct_distribution(found, looks)
        yield _figure(draw, (7, 3.2), f"{name}-jct", f"Distribution of JCT {at}.")
    if found := [run for run in top if run.get("series", {}).get("time_s")]:
        step_s = ", ".join(dict.fromkeys(f"{run['series']['step_s']:g}" for run in found))
        words = f"KVC and forward size over time {at}; means over steps of {step_s} s."
        size = (11, 1.0 + 1.6 * len(found))
        yield _figure(plots.over_time(found), size, f"{name}-time", words)
    else:
        yield "<p>No series over time in these results: <code>--series</code> adds them.</p>"
    variants = [run for policy in ABLATION for run in top if run["policy"] == policy]
    if len(variants) > 1:
        panels = {"mean_jct_s": "mean JCT, s", "throughput_rps": "served per second"}
        if all(run.get("ssr") is not None for run in variants):
            panels["ssr"] = "SSR"
        if any(run.get("mean_jct_s") is None for run in variants):
            del panels["mean_jct_s"]
        draw = plots.bars(panels, variants, looks)
        yield _figure(draw, (9, 2.8), f"{name}-ablation", f"EconoServe's parts, one by one, {at}.")


def _figure(draw: Callable[[Any], None], size: tuple[float, float], name: str, caption: str) -> str:
    text = escape(caption)
    drawing = svg(draw, size, name).replace("<svg", f'<svg role="img" aria-label="{text}"', 1)
    return f'<figure><div class="wide">{drawing}</div><figcaption>{text}</figcaption></figure>'


def _sources(result: Result) -> Iterator[tuple[str, str]]:
    """Where the profile's and the trace's numbers are from, where that is known here."""
    try:
        yield "Profile", load_profile(result["hardware"], result.get("model", "")).source
    except (ProfileError, OSError):
        yield "Profile", f"{result['hardware']}; it is not at hand where this page was made."
    trace = str(result["trace"])
    workload = synthetic_workloads().get(trace.removeprefix(SYNTHETIC))
    if trace.startswith(SYNTHETIC) and workload is not None:
        yield "Trace", workload.source
