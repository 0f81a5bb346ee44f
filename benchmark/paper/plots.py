"""The plots of the page on the claims.

Owns how they look. matplotlib is imported here alone: no run needs it.
"""

import math
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmark.paper.grid import EXACT, PEERS, PREDICTED, SYSTEMS, VLLM_2023, Cell
from benchmark.paper.known import Known
from benchmark.paper.plan import best_peer

COLUMNS = 4

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0508a", "#e69f00", "#56b4e9")

STYLE = {
    "svg.hashsalt": "econoserve",
    "svg.fonttype": "none",
    "figure.facecolor": "white",
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def draw(known: Known) -> dict[str, Figure]:
    """All plots for which there are runs.

    Args:
        known: what is known.

    Returns:
        Figures by name.
    """
    with rc_context(STYLE):
        drawn = {
            "latency": _sweep(known, "mean_normalised_latency_s", "latency, s/token"),
            "ssr": _sweep(known, "ssr", "SSR"),
            "capacity": _capacity(known),
            "demand": _demand(known),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save(figure: Figure, path: str) -> None:
    """Write a plot.

    Args:
        figure: the plot.
        path: of an SVG file; the same plot gives the same file.
    """
    with rc_context(STYLE):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(path, format="svg", metadata=nothing)


def _sweep(known: Known, name: str, label: str) -> Figure | None:
    """A figure against the rate, as a fraction of the capacity of vLLM of 2023."""
    lines: dict[Cell, Mapping[str, list[tuple[float, float]]]] = {}
    for cell in known.paper.cells:
        found = {}
        for policy, predictor in ((VLLM_2023, PREDICTED), *SYSTEMS):
            sweep = known.sweep(cell, policy, predictor)
            if sweep:
                # Without a latency where nobody is served.
                points = [
                    (fraction, figures[name])
                    for fraction, figures in sorted(sweep.items())
                    if figures[name] is not None
                ]
                found[f"{policy}, exact lengths" if predictor == EXACT else policy] = points
        if found:
            lines[cell] = found
    if not lines:
        return None
    figure, grid = _panels(len(lines))
    for axes, (cell, found) in zip(grid, lines.items(), strict=False):
        for number, (system, points) in enumerate(found.items()):
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[number],
                marker="osD^"[number],
                markersize=3,
                linewidth=1.2,
                label=system,
            )
        axes.set_title(cell.name.replace("@", "\n"))
        if name == "ssr":
            axes.set_ylim(0, 1.02)
        else:
            axes.set_yscale("log")
    figure.supxlabel("rate, as a share of the capacity of vLLM of 2023")
    figure.supylabel(label)
    _legend(figure, grid[0])
    return figure


def _capacity(known: Known) -> Figure | None:
    """Capacities over that of vLLM V1."""
    policies = ("plus", *PEERS, VLLM_2023)
    rows = []
    for cell in known.paper.cells:
        found = [known.capacity(cell, policy) for policy in policies]
        first = known.capacity(cell, PEERS[0])
        if first is not None and first.rate_rps and all(found):
            rows.append((cell, [capacity.rate_rps / first.rate_rps for capacity in found]))
    if not rows:
        return None
    figure = Figure(figsize=(8.0, 0.9 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(policies)
    for number, policy in enumerate(policies):
        places = [row + height * number - 0.4 + height / 2 for row in range(len(rows))]
        values = [ratios[number] for _, ratios in rows]
        axes.barh(places, values, height, color=COLOURS[number], label=policy)
    axes.set_yticks(range(len(rows)), [cell.name for cell, _ in rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel(f"capacity, over that of {PEERS[0]}")
    _legend(figure, axes)
    return figure


def _demand(known: Known) -> Figure | None:
    """SSR of each tenth by demand, at the capacity of the best peer."""
    rows = []
    for cell in known.paper.cells:
        best = best_peer(known, cell)
        if best is None or not best[1]:
            continue
        theirs, ours = known.capacity(cell, best[0]), known.run(cell, "plus", best[1])
        if theirs is not None and ours:
            shown = ((best[0], theirs.figures), ("plus", ours))
            rows.append((cell, [(name, figures["ssr_by_demand"]) for name, figures in shown]))
    if not rows:
        return None
    figure, grid = _panels(len(rows))
    for axes, (cell, shown) in zip(grid, rows, strict=False):
        for name, values in shown:
            points = [(part + 1, ssr) for part, ssr in enumerate(values) if ssr is not None]
            number = ("plus", *PEERS).index(name)
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[number],
                marker="o",
                markersize=3,
                linewidth=1.2,
                label=name,
            )
        axes.set(ylim=(0, 1.02), xticks=(1, 4, 7, 10))
        axes.set_title(cell.name.replace("@", "\n"))
        axes.legend(fontsize=7)
    figure.supxlabel("tenth of the requests by KVC-time demand, least first")
    figure.supylabel("SSR")
    return figure


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    size = (max(2.2 * columns, 4.0), 1.9 * rows + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
