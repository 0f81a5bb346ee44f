"""Draws the pictures of docs/scheduling.md and fills in its tables: python docs/figures/make.py.

Everything is worked out by the scheduling core; nothing is drawn by hand. The same core gives the
same files.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from runs import CAPACITY as RUN_CAPACITY
from runs import MODES, Run, run_all
from tables import refresh, tables
from worked import (
    BURST_CAPACITY,
    CANDIDATES,
    CAPACITY,
    REFUSED,
    Held,
    first_ledger,
    nest,
    outlook,
    prediction,
    room_after,
)

from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.core.nested import Nesting

HERE = Path(__file__).parent

INK, GREY, PALE, SAND = "#222222", "#777777", "#d9d9d9", "#f3d28c"
BLUE, SKY, GREEN, ORANGE, RED = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00"

STYLE = {
    "svg.hashsalt": "econoserve",
    "svg.fonttype": "none",
    "figure.facecolor": "white",
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "path.simplify_threshold": 0.2,
}


def draw_skyline() -> Figure:
    """Who holds what in the future, with a candidate that fits and one that does not.

    Returns:
        The picture.
    """
    config = KvcConfig(KvcMode.SKYLINE, reserve_fraction=0.0)
    figure, panels = pyplot.subplots(1, 2, figsize=(9.2, 3.6), sharey=True, layout="constrained")
    for axes, candidate in zip(panels, (CANDIDATES[-1], REFUSED), strict=True):
        ledger, used_tokens = first_ledger(config)
        trial = ledger.trial(used_tokens)
        response = prediction(candidate.response_tokens).outcomes(0, 1)
        fits = trial.fits(candidate.held_tokens, response)
        steps = np.arange(0, 41)
        base = np.full(len(steps), ledger.standing_tokens(used_tokens))
        _band(axes, steps, 0 * base, base, PALE, "")
        axes.text(34, 2, "P, parked", fontsize=8)
        for name, color in (("A", BLUE), ("B", SKY), ("C", GREEN)):
            claim = ledger[name]
            # What a claim holds at step t is what it holds less now, and t, until it ends.
            holds = np.where(steps <= claim.ends[-1], ledger.base_of(claim) + steps, 0)
            _band(axes, steps, base, base + holds, color, name)
            base = base + holds
        # A prompt that starts now is in the KVC from now on and decodes from the next step on.
        end = 1 + response[-1]
        holds = np.where(steps <= end, candidate.held_tokens + np.maximum(steps - 1, 0), 0)
        color = ORANGE if fits else RED
        _band(axes, steps, base, base + holds, color, f"candidate {candidate.name}")
        axes.axhline(CAPACITY, color=INK, linewidth=1.4)
        axes.text(40, CAPACITY + 1.5, "capacity", ha="right")
        top = int((base + holds).argmax())
        room = room_after(config, candidate)
        told = f"fits: {room} to spare" if fits else f"refused: {-room} too many"
        axes.annotate(
            f"{told} at step {top}",
            (top, (base + holds)[top]),
            (top + 4, 113),
            arrowprops={"arrowstyle": "->", "color": INK},
        )
        axes.set_title(_described(candidate), loc="left")
        axes.set(xlim=(0, 40), ylim=(0, 122), xlabel="decode steps from now")
    panels[0].set_ylabel("KVC tokens")
    return figure


def draw_nesting() -> Figure:
    """Hosts and guests in the promise of one response, for each way of nesting.

    Returns:
        The picture.
    """
    length = 64
    colors = (BLUE, ORANGE, GREEN, RED)
    figure, panels = pyplot.subplots(1, 3, figsize=(9.2, 3.8), sharey=True, layout="constrained")
    for axes, nesting in zip(panels, Nesting, strict=True):
        stays, use = nest(nesting, length)
        for stay in stays:
            end, top = stay.start + stay.length, stay.bottom + stay.length
            corners = [(stay.start, stay.bottom), (end, stay.bottom), (end, top)]
            axes.add_patch(
                Polygon(
                    corners, facecolor=colors[min(stay.depth, 3)], edgecolor="white", linewidth=0.4
                )
            )
        axes.plot((0, length, length), (length, length, 0), color=INK, linewidth=1.2)
        axes.set_title(f"{nesting.value}: {use:.3f} of the promise in use", loc="left")
        axes.set(xlim=(0, length), ylim=(0, length), xlabel="decode steps", aspect="equal")
        axes.set_xticks(range(0, length + 1, 16))
        axes.set_yticks(range(0, length + 1, 16))
    panels[0].set_ylabel(f"promise of {length} tokens")
    names = ("owner", "its guests", "their guests", "and so on")
    figure.legend(_patches(colors), names, loc="outside lower center", ncols=4)
    return figure


def draw_modes(runs: Mapping[tuple[str, bool], Run]) -> Figure:
    """KVC in use and promised over time, for each mode, with lengths known and predicted.

    Args:
        runs: by mode, and whether lengths were known.

    Returns:
        The picture.
    """
    figure, rows = pyplot.subplots(
        2, len(MODES), figsize=(11.6, 4.8), sharex=True, sharey=True, layout="constrained"
    )
    longest = max(len(run.moments) for run in runs.values())
    moments = [moment for run in runs.values() for moment in run.moments]
    most = max(moment.used_tokens + moment.promised_tokens for moment in moments)
    percent = 100 / RUN_CAPACITY
    for panels, known in zip(rows, (True, False), strict=True):
        for axes, name in zip(panels, MODES, strict=True):
            run = runs[name, known]
            for color, heights in (
                (SAND, [moment.used_tokens + moment.promised_tokens for moment in run.moments]),
                (BLUE, [moment.used_tokens for moment in run.moments]),
            ):
                chosen = np.arange(0, len(heights), 20)
                corners = (0, *np.array(heights)[chosen] * percent, 0)
                axes.fill((0, *chosen, chosen[-1]), corners, color=color, linewidth=0)
            axes.axhline(100, color=INK, linewidth=1)
            axes.set_title(f"{name}: {run.mean_running:.0f} running", loc="left")
            axes.set(xlim=(0, longest), ylim=(0, 1.02 * most * percent))
    for axes in rows[1]:
        axes.set_xlabel("iterations")
    rows[0][0].set_ylabel("lengths known\n% of the KVC")
    rows[1][0].set_ylabel("predicted by kind\n% of the KVC")
    names = ("in use", "promised beyond that")
    figure.legend(_patches((BLUE, SAND)), names, loc="outside lower center", ncols=2)
    return figure


def draw_risk() -> Figure:
    """What a ledger with risk expects, beside the truth and beside skylines of one length each.

    Returns:
        The picture.
    """
    expected = outlook()
    figure, panels = pyplot.subplots(1, 2, figsize=(9.2, 3.7), sharey=True, layout="constrained")
    percent = f"{100 * expected.risk:g} %"
    left, right = panels
    bound = f"mean + {expected.z:.2f} std"
    left.step(expected.grid, expected.margin, where="pre", color=RED, label=bound)
    left.plot(
        expected.steps,
        expected.exact_bound,
        color=RED,
        linestyle=":",
        label=f"exceeded with {percent}, exactly",
    )
    left.step(expected.grid, expected.mean, where="pre", color=BLUE, label="mean")
    left.plot(expected.steps, expected.exact_mean, color=BLUE, linestyle=":", label="mean, exactly")
    left.set_title("the ledger's grid against full enumeration", loc="left")
    right.plot(expected.steps, expected.by_mean, color=GREEN, label="skyline over mean lengths")
    right.plot(expected.steps, expected.by_median, color=ORANGE, label="skyline over medians")
    right.plot(expected.steps, expected.exact_mean, color=BLUE, linestyle=":", label="mean")
    right.plot(
        expected.steps,
        expected.exact_bound,
        color=RED,
        linestyle=":",
        label=f"exceeded with {percent}",
    )
    right.set_title("skylines over one length per claim, against the same", loc="left")
    for axes in panels:
        axes.axhline(BURST_CAPACITY, color=INK, linewidth=1.2)
        axes.text(expected.steps[-1], BURST_CAPACITY + 90, "capacity", ha="right", fontsize=8)
        axes.set(xlim=(0, expected.steps[-1]), ylim=(0, None), xlabel="decode steps from now")
        axes.legend(loc="lower left", fontsize=8)
    left.set_ylabel("KVC tokens")
    return figure


def _band(
    axes: Axes, steps: np.ndarray, low: np.ndarray, high: np.ndarray, color: str, name: str
) -> None:
    """What one claim holds, on top of the others, with its name at its left end."""
    axes.fill_between(steps, low, high, step="post", color=color, edgecolor="white", linewidth=0.5)
    ink = INK if color in (SKY, ORANGE) else "white"
    axes.text(0.6, (low[0] + high[0]) / 2, name, color=ink, va="center", fontweight="bold")


def _patches(colors: Sequence[str]) -> list[Rectangle]:
    return [Rectangle((0, 0), 1, 1, color=color) for color in colors]


def _described(candidate: Held) -> str:
    return (
        f"candidate {candidate.name}: a prompt of {candidate.held_tokens}, "
        f"{candidate.response_tokens} to come"
    )


def main() -> None:
    """Write the pictures, and the page with its tables."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/scheduling.md.")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the pictures go")
    parser.add_argument("--page", type=Path, default=HERE.parent / "scheduling.md", help="the page")
    parser.add_argument("--format", default="svg", choices=("svg", "png"), help="of the pictures")
    options = parser.parse_args()
    matplotlib.use("agg")
    matplotlib.rcParams.update(STYLE)
    runs = run_all()
    pictures = {
        "skyline": draw_skyline(),
        "nesting": draw_nesting(),
        "modes": draw_modes(runs),
        "risk": draw_risk(),
    }
    for name, figure in pictures.items():
        metadata = {"Date": None} if options.format == "svg" else {}
        path = options.folder / f"{name}.{options.format}"
        figure.savefig(path, metadata=metadata, dpi=110)
    options.page.write_text(refresh(options.page.read_text(), tables(runs)))


if __name__ == "__main__":
    main()
