"""The tables of the page on the claims, in Markdown.

Owns which figures are shown. What was not run is shown as ``-``.
"""

from collections.abc import Callable, Mapping

from benchmark.paper import formats
from benchmark.paper.bounds import bounds
from benchmark.paper.claims import (
    Value,
    fewer_gpus,
    jct_reductions,
    over,
    ssr_increases,
    ssr_ratios,
    throughput_ratios,
)
from benchmark.paper.grid import (
    EXACT,
    FRACTIONS,
    PEERS,
    PREDICTED,
    SYSTEMS,
    VARIANTS,
    VLLM_2023,
    Cell,
)
from benchmark.paper.known import Figures, Known
from benchmark.paper.plan import ablated, best_peer, placed, tensors
from benchmark.paper.requests import requests_of
from econoserve.sim.profile import load_profile

Claim = Callable[[Mapping[float, Figures], Mapping[float, Figures], str], list[Value]]

POLICIES = ("plus", *PEERS, VLLM_2023)
"""Whose capacities are shown."""


def settings(known: Known) -> str:
    """The settings, whether their SLO can be kept, and what giving up requests is worth."""
    rows = []
    for cell in known.paper.cells:
        alone = known.alone(cell)
        worth = bounds(requests_of(known.paper, cell))
        rows.append(
            [
                f"`{cell.name}`",
                cell.slo_text,
                "DistServe's" if cell.published else "ours",
                cell.max_running,
                formats.share(alone["ssr"]) if alone else None,
                formats.two(worth.lengths),
                formats.two(worth.prompts),
            ]
        )
    headers = (
        "setting",
        "TTFT/TPOT s",
        "whose",
        "most in a batch",
        "SSR at a tenth",
        "heaviest tenth",
        "longest prompts",
    )
    return formats.table(headers, rows)


def capacities(known: Known) -> str:
    """Capacities of all policies, with predicted lengths, and of ``plus`` with exact ones."""
    rows, over_best, over_first = [], [], []
    for cell in known.paper.cells:
        found = {policy: known.capacity(cell, policy) for policy in POLICIES}
        exact, best = known.capacity(cell, "plus", EXACT), best_peer(known, cell)
        ratio = first = None
        if (plus := found["plus"]) is not None and plus.rate_rps:
            if best is not None and best[1]:
                over_best.append(ratio := plus.rate_rps / best[1])
            vllm = found[VLLM_2023]
            if vllm is not None and vllm.rate_rps:
                over_first.append(first := plus.rate_rps / vllm.rate_rps)
        rates = [formats.rate(found[policy]) for policy in POLICIES]
        peer = best[0] if best else None
        rows.append(
            [
                f"`{cell.name}`",
                *rates,
                formats.rate(exact),
                peer,
                formats.two(ratio),
                formats.two(first),
            ]
        )
    means = [formats.mean(values) for values in (over_best, over_first)]
    rows.append(["geometric mean", *[""] * (len(POLICIES) + 2), *means])
    headers = ("setting", *POLICIES, "plus, exact", "best peer", "plus/best", "plus/vllm")
    return formats.table(headers, rows)


def competition(known: Known) -> str:
    """``plus`` over the others at 90 % SLO; and beside the best of today's at its capacity."""
    rows = []
    for other in (*PEERS, VLLM_2023):
        values = []
        for cell in known.paper.cells:
            ours, theirs = known.capacity(cell, "plus"), known.capacity(cell, other)
            if ours is not None and theirs is not None and theirs.rate_rps:
                values.append(Value(ours.rate_rps / theirs.rate_rps, f"`{cell.name}`"))
        rows.append([f"capacity over {other}", *formats.range_cells(over(values), "ratio")])
    capacity, jct_s, heaviest = [], [], []
    for cell in known.paper.cells:
        best, where = best_peer(known, cell), f"`{cell.name}`"
        if best is None or not best[1]:
            continue
        if (ours := known.capacity(cell, "plus")) is not None:
            capacity.append(Value(ours.rate_rps / best[1], where))
        theirs, run = known.capacity(cell, best[0]), known.run(cell, "plus", best[1])
        if theirs is not None and run is not None:
            peer = theirs.figures
            if run["p99_jct_s"] is not None:
                jct_s.append(Value(run["p99_jct_s"] / peer["p99_jct_s"], where))
            last = run["ssr_by_demand"][-1], peer["ssr_by_demand"][-1]
            if None not in last:
                heaviest.append(Value(last[0] - last[1], where))
    rows.append(
        ["capacity over the best of today's", *formats.range_cells(over(capacity), "ratio")]
    )
    there = "at the best peer's capacity"
    rows.append([f"p99 JCT over that peer's, {there}", *formats.range_cells(over(jct_s), "ratio")])
    rows.append([f"SSR of the heaviest tenth, less the peer's, {there}"])
    rows[-1].extend(formats.range_cells(over(heaviest), "share"))
    return formats.table(("plus", "min", "median", "max", "where the max is", "of"), rows)


def at_capacity(known: Known) -> str:
    """What runs look like at their policy's own capacity."""
    rows = []
    for cell in known.paper.cells:
        for policy in POLICIES:
            found = known.capacity(cell, policy)
            if found is None or not found.figures:
                continue
            figures = found.figures
            rows.append(
                [
                    f"`{cell.name}`",
                    policy,
                    formats.three(found.rate_rps),
                    formats.share(figures["ssr"]),
                    formats.share(figures["ssr_by_demand"][-1]),
                    formats.seconds(figures["mean_jct_s"]),
                    formats.seconds(figures["p99_jct_s"]),
                    formats.seconds(figures["p99_ttft_s"]),
                    formats.share(figures["kvc_useful_utilisation"]),
                    formats.share(figures["kvc_useful_utilisation_backlog"]),
                    formats.share(figures["backlog_share"]),
                ]
            )
    headers = (
        "setting",
        "policy",
        "rate/s",
        "SSR",
        "heaviest tenth",
        "mean JCT s",
        "p99 JCT s",
        "p99 TTFT s",
        "useful KVC",
        "in backlog",
        "backlog",
    )
    return formats.table(headers, rows, 2)


def at_peers_capacity(known: Known) -> str:
    """``plus`` and the best peer at the highest rate that the peer sustains, by demand."""
    rows = []
    for cell in known.paper.cells:
        best = best_peer(known, cell)
        if best is None or not best[1]:
            continue
        peer, rate_rps = best
        theirs = known.capacity(cell, peer)
        shown = [
            (peer, theirs.figures if theirs else None),
            ("plus", known.run(cell, "plus", rate_rps)),
            ("plus, exact", known.run(cell, "plus", rate_rps, EXACT)),
        ]
        for name, figures in shown:
            if figures:
                tenths = [formats.share(ssr) for ssr in figures["ssr_by_demand"]]
                mean_s, p99_s = (
                    formats.seconds(figures["mean_jct_s"]),
                    formats.seconds(figures["p99_jct_s"]),
                )
                row = [f"`{cell.name}`", formats.three(rate_rps), name, mean_s, p99_s]
                rows.append([*row, formats.share(figures["ssr"]), *tenths])
    headers = ("setting", "rate/s", "policy", "mean JCT s", "p99 JCT s", "SSR", *range(1, 11))
    return formats.table([str(header) for header in headers], rows, 3)


CLAIMS: tuple[tuple[str, Claim, str], ...] = (
    ("throughput at equal latency", throughput_ratios, "ratio"),
    ("mean JCT, reduction", jct_reductions, "share"),
    ("SSR, increase in points", ssr_increases, "share"),
    ("SSR, increase relative to vLLM's", ssr_ratios, "share"),
)
"""Claims 1 to 3, and how their figures are written."""


def ranges(known: Known) -> str:
    """Claims 1 to 3 over all settings and rates of the sweep."""
    rows = []
    for title, claim, form in CLAIMS:
        for policy, predictor in SYSTEMS:
            values = [
                value
                for cell in known.paper.cells
                for value in _claim(known, cell, claim, policy, predictor)
            ]
            rows.append(
                [title, formats.system(policy, predictor), *formats.range_cells(over(values), form)]
            )
    headers = ("claim", "over vLLM 2023", "min", "median", "max", "where the max is", "of")
    return formats.table(headers, rows, 2)


def claims_by_setting(known: Known) -> str:
    """Claims 1 to 3 of each setting."""
    rows = []
    for cell in known.paper.cells:
        for policy, predictor in SYSTEMS:
            row = [f"`{cell.name}`", formats.system(policy, predictor)]
            for _, claim, form in CLAIMS[:3]:
                found = over(_claim(known, cell, claim, policy, predictor))
                row.append(formats.span(found, form))
            rows.append(row)
    headers = ("setting", "system", *(title for title, _, _ in CLAIMS[:3]))
    return formats.table(headers, rows, 2)


def sweep(known: Known) -> str:
    """The runs of the sweep."""
    rows = []
    for cell in known.paper.cells:
        base_rps = known.base_rps(cell)
        for policy, predictor in ((VLLM_2023, PREDICTED), *SYSTEMS):
            for fraction, figures in sorted(known.sweep(cell, policy, predictor).items()):
                rows.append(
                    [
                        f"`{cell.name}`",
                        formats.system(policy, predictor),
                        f"{fraction:g}",
                        formats.three(fraction * base_rps),
                        formats.three(figures["mean_normalised_latency_s"]),
                        formats.seconds(figures["mean_jct_s"]),
                        formats.share(figures["ssr"]),
                        formats.share(figures["kvc_useful_utilisation_backlog"]),
                    ]
                )
    headers = (
        "setting",
        "system",
        "fraction",
        "rate/s",
        "s/token",
        "mean JCT s",
        "SSR",
        "in backlog",
    )
    return formats.table(headers, rows, 2)


def distserve(known: Known) -> str:
    """Claim 4: goodput per GPU against DistServe's best placement."""
    rows, saved, same = [], [], []
    for cell in placed(known.paper.cells):
        theirs = known.placement(cell)
        own = load_profile(cell.hardware, cell.model).memory.gpus
        choices = {own: known.capacity(cell, "plus")}
        choices |= {n: known.capacity(cell, "plus", tensor=n) for n in tensors(known.paper, cell)}
        per_gpu = {n: found.rate_rps / n for n, found in choices.items() if found is not None}
        if theirs is None or not theirs["placement"] or not per_gpu:
            placement = None if theirs is None else theirs["placement"] or "none keeps the SLO"
            rows.append([f"`{cell.name}`", placement, *[None] * 5])
            continue
        theirs_per_gpu = theirs["rate_rps"] / theirs["gpus"]
        gpus = max(per_gpu, key=lambda n: per_gpu[n])
        row = [f"`{cell.name}`", theirs["placement"], formats.three(theirs_per_gpu), gpus]
        row.append(formats.three(per_gpu[gpus]))
        shown = []
        for number, values in ((gpus, saved), (theirs["gpus"], same)):
            fewer = None
            if per_gpu.get(number):
                fewer = fewer_gpus(per_gpu[number], theirs_per_gpu)
                values.append(Value(fewer, f"`{cell.name}`"))
            shown.append(formats.share(fewer))
        rows.append([*row, *shown])
    for title, values in (("over all settings", saved), ("with as many GPUs together", same)):
        if (found := over(values)) is not None:
            span = f"{formats.span(found, 'share')} ({found.most.where})"
            rows.append([f"{title}: min / median / max", "", "", "", "", span, ""])
    headers = (
        "setting",
        "DistServe's placement",
        "rate/s a GPU",
        "plus: GPUs",
        "rate/s a GPU",
        "fewer GPUs",
        "with as many together",
    )
    return formats.table(headers, rows, 2)


def ablation(known: Known) -> str:
    """Capacities of the variants."""
    runs = [(policy, PREDICTED) for policy in VARIANTS] + [("full", EXACT), ("plus", EXACT)]
    rows = []
    for cell in ablated(known.paper.cells):
        found = [known.capacity(cell, policy, predictor) for policy, predictor in runs]
        rows.append([f"`{cell.name}`", *(formats.rate(capacity) for capacity in found)])
    return formats.table(("setting", *(formats.system(*run) for run in runs)), rows)


TABLES: Mapping[str, Callable[[Known], str]] = {
    "settings": settings,
    "capacities": capacities,
    "competition": competition,
    "at-capacity": at_capacity,
    "at-peers-capacity": at_peers_capacity,
    "ranges": ranges,
    "claims-by-setting": claims_by_setting,
    "distserve": distserve,
    "ablation": ablation,
    "sweep": sweep,
}
"""What writes each table, by name."""


def _claim(known: Known, cell: Cell, claim: Claim, policy: str, predictor: str) -> list[Value]:
    """A claim at one setting; none while its sweeps are not whole."""
    theirs = known.sweep(cell, VLLM_2023)
    ours = known.sweep(cell, policy, predictor)
    if len(theirs) < len(FRACTIONS) or len(ours) < len(FRACTIONS):
        return []
    return claim(ours, theirs, f"`{cell.name}`")
