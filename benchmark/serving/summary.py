"""The first table and the first plot of a report: ours and the better peer, and the targets.

Owns how the comparison looks.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from benchmark.paper.claims import Reach
from benchmark.serving.comparison import ATTAINMENT, Attained, Comparison, Ratio, geometric_mean
from econoserve.report.plots import Looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNS = {Reach.EXACT: "", Reach.AT_LEAST: "\u2265 ", Reach.AT_MOST: "\u2264 "}
DEFINITIONS = f"""\
Goodput here is the rate at which {ATTAINMENT:.0%} of the requests meet their objectives: the \
median over repeats, by a straight line between the highest measured rate that meets it and the \
next one, which stand in brackets. Where one of these was not measured, goodput and its ratio are \
bounds: a peer below the lowest rate counts as that rate. Beside a ratio stands what it is at \
least by measured rates alone: our lower rate to the peer's upper one. Peers are stock SGLang and \
vLLM, the better peer is that with the higher goodput. Mean JCT is compared at the lowest rate at \
which all peers miss {ATTAINMENT:.0%}, with the least of theirs; throughput is the rate that we \
serve at the least mean normalised latency (JCT per output token) that a peer has there, to that \
rate; p99 JCT is compared at the highest measured rate that the better peer still serves well. A \
figure is missing (-) where a request was not served or no such rate was measured."""


def number(value: float | None, digits: int = 2) -> str:
    """A figure for a table.

    Args:
        value: the figure.
        digits: decimals.

    Returns:
        Its text; ``-`` if there is none.
    """
    return "-" if value is None else f"{value:,.{digits}f}"


def _rate(found: Attained | None) -> str:
    if found is None:
        return "-"
    text = SIGNS[found.reach] + number(found.rate_rps)
    return f"{text} ({found.low_rps:g}-{found.high_rps:g})" if found.reach is Reach.EXACT else text


def _ratio(found: Ratio | None) -> str:
    if found is None:
        return "-"
    text = SIGNS[found.reach] + number(found.value)
    return text if found.least is None else f"{text} ({number(found.least)})"


def table(found: Sequence[Comparison], systems: Sequence[str]) -> str:
    """The summary.

    Args:
        found: the comparisons.
        systems: the columns.

    Returns:
        A Markdown table, and a line for each target.
    """
    headings = [
        "workload",
        "KVC",
        *(f"`{name}`" for name in systems),
        "goodput ratio",
        "mean JCT ratio",
        "throughput ratio",
        "p99 JCT ratio",
    ]
    lines = [
        [
            one.workload,
            one.kvc,
            *(_rate(one.by_system.get(name)) for name in systems),
            _ratio(one.goodput),
            number(one.jct),
            _ratio(one.throughput),
            number(one.p99_jct),
        ]
        for one in found
    ]
    text = tabulate(
        lines,
        headings,
        tablefmt="github",
        disable_numparse=True,
        colalign=["right"] * len(headings) if lines else None,
    )
    return text + "\n\n" + "\n".join(f"- {line}" for line in targets(found))


def targets(found: Sequence[Comparison]) -> list[str]:
    """What became of the targets.

    Args:
        found: the comparisons.

    Returns:
        A line for each.
    """
    scarce = [one for one in found if one.kvc != "ample"]
    ample = [one.goodput for one in found if one.kvc == "ample" and one.goodput is not None]
    known = [one.goodput for one in scarce if one.goodput is not None]
    least = [ratio.least for ratio in known]
    sure = geometric_mean(least) if known and all(least) else None
    worst = min(ample, key=lambda ratio: ratio.value, default=None)
    jct = [one.jct for one in found]
    p99 = [one.p99_jct for one in found if one.p99_jct is not None]
    return [
        f"goodput over the better peer's, geometric mean over tight and very tight: "
        f"{number(geometric_mean(ratio.value for ratio in known))} (target: 2.0 or more), "
        f"{_of(known, scarce)}{_bounds(known)}; by measured rates alone at least {number(sure)}",
        f"least ratio where the KVC is ample: {number(worst and worst.value)} "
        f"(target: 0.97 or more), {_of(ample, [one for one in found if one.kvc == 'ample'])}"
        f"{_bounds(ample)}",
        f"mean JCT over the better peer's where that one just saturates, geometric mean: "
        f"{number(geometric_mean(jct))}, greatest: {number(max(filter(None, jct), default=None))} "
        f"(target: 0.5 or less), {_of([value for value in jct if value is not None], found)}",
        f"p99 JCT over the better peer's at its goodput, greatest: "
        f"{number(max(p99, default=None))} (target: 1.0 or less), {_of(p99, found)}",
    ]


def _of(known: Sequence[Any], every: Sequence[Any]) -> str:
    return f"{len(known)} of {len(every)} settings"


def _bounds(ratios: Iterable[Ratio]) -> str:
    reaches = [ratio.reach for ratio in ratios]
    words = {Reach.AT_LEAST: "lower", Reach.AT_MOST: "upper"}
    counted = [
        f"{reaches.count(reach)} {word} bounds" for reach, word in words.items() if reach in reaches
    ]
    return f", {' and '.join(counted)} among them" if counted else ""


def bars(found: Sequence[Comparison], looks: Looks) -> Callable[["Figure"], None]:
    """Goodput of the systems on all workloads, a panel for each size of the KVC.

    Args:
        found: the comparisons.
        looks: of the systems.

    Returns:
        What draws it; a line goes from the rate that is still served well to that which is not, an
        arrow stands where no measured rate was too high, a pale bar where all were.
    """
    sizes = list(dict.fromkeys(one.kvc for one in found))

    def draw(figure: "Figure") -> None:
        from matplotlib.patches import Patch

        for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
            own = [one for one in found if one.kvc == size]
            width = 0.8 / len(looks)
            for place, (system, look) in enumerate(looks.items()):
                for column, one in enumerate(own):
                    if (rate := one.by_system.get(system)) is None:
                        continue
                    x = column + (place - (len(looks) - 1) / 2) * width
                    # Pale where even the lowest measured rate is too high.
                    alpha = 0.25 if rate.reach is Reach.AT_MOST else 1.0
                    axes.bar(x, rate.rate_rps, 0.9 * width, color=look.colour, alpha=alpha)
                    if math.isinf(rate.high_rps):
                        axes.plot(x, rate.rate_rps, marker="^", markersize=5, color=look.colour)
                    else:
                        axes.vlines(x, rate.low_rps, rate.high_rps, colors="#888888", linewidth=1)
            axes.set_xticks(range(len(own)), [one.workload for one in own], rotation=20)
            axes.set(title=f"KVC {size}", ylabel="requests per second")
            axes.grid(False, axis="x")
        handles = [Patch(color=look.colour, label=system) for system, look in looks.items()]
        figure.legend(handles=handles, loc="outside right upper")

    return draw
