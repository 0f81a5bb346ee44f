"""Plots of simulated runs, as SVG that stands in a page and takes the page's colours.

Owns how they look. matplotlib is imported when the first one is drawn: nothing else needs it.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Result = Mapping[str, Any]
"""A run's settings and figures, as ``econoserve simulate --output json`` prints them."""

INK, MUTED = "#010101", "#020202"
SERIES = tuple(f"#03030{number}" for number in range(8))
COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(SERIES)},
}
"""What stands for the page's colours while a plot is drawn."""

MARKERS = "osD^vPX*"
SPREAD = 10.0
"""Figures whose greatest is so many times the least go on a logarithmic axis. Ours."""

LINES = ("-", "--", ":", "-.")

STYLE = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "path.simplify_threshold": 0.2,
}


class ReportError(RuntimeError):
    """A page that cannot be made."""


@dataclass(frozen=True, slots=True)
class Look:
    """How a policy's line is told apart, in colour and without.

    Attributes:
        number: of the policy on the page, from 0.
    """

    number: int

    def line(self, label: str) -> dict[str, Any]:
        """Arguments for a line.

        Args:
            label: the policy's name.

        Returns:
            Arguments of ``Axes.plot``.
        """
        dashes = LINES[self.number // len(SERIES) % len(LINES)]
        return {"color": self.colour, "linestyle": dashes, "linewidth": 1.5, "label": label}

    @property
    def colour(self) -> str:
        """Of lines and bars."""
        return SERIES[self.number % len(SERIES)]

    @property
    def marker(self) -> str:
        """Of measured points."""
        return MARKERS[self.number % len(MARKERS)]


Looks = Mapping[str, Look]


def check_matplotlib() -> None:
    """See whether plots can be drawn.

    Raises:
        ReportError: they cannot; says what to install.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ReportError("plots need matplotlib: pip install 'econoserve[report]'") from None


def svg(draw: Callable[["Figure"], None], size: tuple[float, float], name: str) -> str:
    """Draw a figure.

    Args:
        draw: draws on the empty figure.
        size: width and height in inches.
        name: unique on the page, of letters, digits and hyphens.

    Returns:
        An ``svg`` element; the same for the same drawing.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # What is defined in one drawing is not to be found by another on the same page.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in COLOURS.items():
        text = text.replace(colour, variable)
    return text


def against_rate(
    panels: Mapping[str, str], runs: Sequence[Result], looks: Looks
) -> Callable[["Figure"], None]:
    """Figures of the policies against the rate; on a logarithmic axis where they differ much.

    Args:
        panels: titles by the figure's name, left to right.
        runs: of one setting.
        looks: of the policies.

    Returns:
        What draws it.
    """

    def draw(figure: "Figure") -> None:
        for axes, (name, title) in zip(_row(figure, len(panels)), panels.items(), strict=True):
            for policy in policies(runs):
                points = sorted(
                    (run["rate_rps"], run[name])
                    for run in runs
                    if run["policy"] == policy and run.get(name) is not None
                )
                look = looks[policy]
                axes.plot(
                    [rate for rate, _ in points],
                    [value for _, value in points],
                    marker=look.marker,
                    markersize=4,
                    **look.line(policy),
                )
            axes.set(title=title, xlabel="arrivals per second")
            values = [run[name] for run in runs if run.get(name) is not None]
            if min(values, default=0) > 0 and max(values) / min(values) > SPREAD:
                axes.set_yscale("log")
                _plain(axes.yaxis)
            else:
                axes.set_ylim(bottom=0)
        _legend(figure)

    return draw


def jct_distribution(runs: Sequence[Result], looks: Looks) -> Callable[["Figure"], None]:
    """Share of the served requests by JCT.

    Args:
        runs: with ``jct_percentiles_s``, one of each policy.
        looks: of the policies.

    Returns:
        What draws it.
    """

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for run in runs:
            pairs = run["jct_percentiles_s"]
            shares = [percent / 100 for percent, _ in pairs]
            seconds = [value for _, value in pairs]
            axes.plot(seconds, shares, **looks[run["policy"]].line(run["policy"]))
        axes.set(xlabel="JCT in seconds", ylabel="share of requests", xscale="log", ylim=(0, 1))
        _plain(axes.xaxis)
        _legend(figure)

    return draw


def by_demand(runs: Sequence[Result], looks: Looks) -> Callable[["Figure"], None]:
    """SSR of each tenth of the requests by their demand of KVC-time.

    Args:
        runs: with ``ssr_by_demand``, one of each policy.
        looks: of the policies.

    Returns:
        What draws it.
    """

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for run in runs:
            look, values = looks[run["policy"]], run["ssr_by_demand"]
            points = [(part + 1, ssr) for part, ssr in enumerate(values) if ssr is not None]
            axes.plot(
                [part for part, _ in points],
                [ssr for _, ssr in points],
                marker=look.marker,
                markersize=4,
                **look.line(run["policy"]),
            )
        axes.set(xlabel="tenth of the requests, least demand first", ylabel="SSR", ylim=(0, 1.02))
        axes.set_xticks(range(1, 11))
        _legend(figure)

    return draw


def over_time(runs: Sequence[Result]) -> Callable[["Figure"], None]:
    """KVC, requests and forward size over time, a row for each run.

    Args:
        runs: with ``series``, one of each policy.

    Returns:
        What draws it.
    """

    def draw(figure: "Figure") -> None:
        rows = figure.subplots(len(runs), 3, squeeze=False, sharex=True, sharey="col")
        for (kvc, requests, forward), run in zip(rows, runs, strict=True):
            series, whole = run["series"], run["capacity_tokens"]
            time_s = series["time_s"]
            held = [tokens / whole for tokens in series["kvc_held_tokens"]]
            used = [tokens / whole for tokens in series["kvc_used_tokens"]]
            kvc.fill_between(time_s, held, color=SERIES[0], alpha=0.25, linewidth=0, label="held")
            kvc.plot(time_s, used, color=SERIES[0], linewidth=1, label="in the forward pass")
            kvc.set(ylabel=run["policy"], ylim=(0, 1.02))
            requests.plot(time_s, series["running"], color=SERIES[2], linewidth=1, label="decoding")
            requests.plot(
                time_s, series["waiting"], color=SERIES[1], linewidth=1, label="waiting, no KVC"
            )
            forward.plot(
                time_s, series["forward_tokens"], color=SERIES[0], linewidth=1, label="computed"
            )
            if any(target is not None for target in series["tfs_tokens"]):
                targets = [target or float("nan") for target in series["tfs_tokens"]]
                forward.plot(
                    time_s, targets, color=SERIES[1], linestyle="--", linewidth=1, label="TFS"
                )
        titles = ("KVC, share of all", "requests", "forward size, tokens")
        for axes, title in zip(rows[0], titles, strict=True):
            axes.set_title(title)
            axes.legend(fontsize=7.5)
        for axes in rows[-1]:
            axes.set_xlabel("seconds")

    return draw


def bars(
    panels: Mapping[str, str], runs: Sequence[Result], looks: Looks
) -> Callable[["Figure"], None]:
    """Figures of several policies side by side.

    Args:
        panels: titles by the figure's name, left to right.
        runs: one of each policy, left to right.
        looks: of the policies.

    Returns:
        What draws it.
    """

    def draw(figure: "Figure") -> None:
        names = [run["policy"] for run in runs]
        for axes, (name, title) in zip(_row(figure, len(panels)), panels.items(), strict=True):
            values = [run[name] for run in runs]
            drawn = axes.bar(names, values, color=[looks[name].colour for name in names])
            axes.bar_label(drawn, fmt="%.3g", fontsize=8, color=INK)
            axes.set_title(title)
            axes.grid(False, axis="x")

    return draw


def policies(runs: Sequence[Result]) -> list[str]:
    """Whose runs they are.

    Args:
        runs: of any policies.

    Returns:
        The policies, each once, in the order of the runs.
    """
    return list(dict.fromkeys(run["policy"] for run in runs))


def _plain(axis: "Axis") -> None:
    """Label a logarithmic axis with numbers as they are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _row(figure: "Figure", count: int) -> list["Axes"]:
    return list(figure.subplots(1, count, squeeze=False)[0])


def _legend(figure: "Figure") -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
