"""How the tables write figures; what there is not is ``None``, and shown as ``-``."""

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from benchmark.paper.claims import Range, Value, geometric_mean
from benchmark.paper.grid import EXACT
from benchmark.paper.known import Capacity


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], words: int = 1) -> str:
    """A Markdown table.

    Args:
        headers: of the columns.
        rows: cells as text.
        words: columns at the left that hold words; the others are figures.

    Returns:
        Its lines.
    """
    align = ("left",) * words + ("right",) * (len(headers) - words)
    return tabulate(
        rows, headers, tablefmt="github", colalign=align, disable_numparse=True, missingval="-"
    )


def mean(values: Sequence[float]) -> str | None:
    """The geometric mean, and of how many settings it is."""
    return f"{geometric_mean(values):.2f} (of {len(values)})" if values else None


def range_cells(found: Range | None, form: str) -> list[str | None]:
    """Least, middle, greatest, where that is, and of how many; ``form`` is ratio or share."""
    if found is None:
        return [None] * 5
    least, most = _value(found.least, form), _value(found.most, form)
    middle = _value(Value(found.median, ""), form)
    return [least, middle, most, found.most.where, str(found.count)]


def span(found: Range | None, form: str) -> str | None:
    """Least, middle and greatest in one cell; ``form`` is ratio or share."""
    if found is None:
        return None
    middle = _value(Value(found.median, ""), form)
    return f"{_value(found.least, form)} / {middle} / {_value(found.most, form)}"


def system(policy: str, predictor: str) -> str:
    """A policy, and whether it knew the lengths."""
    return f"{policy}, exact" if predictor == EXACT else policy


def rate(found: Capacity | None) -> str | None:
    """A capacity in requests per second."""
    return None if found is None else three(found.rate_rps)


def three(value: float | None) -> str | None:
    """Three digits."""
    return None if value is None else f"{value:.3g}"


def two(value: float | None) -> str | None:
    """Two decimals."""
    return None if value is None else f"{value:.2f}"


def seconds(value: float | None) -> str | None:
    """Seconds, with a decimal below 100."""
    if value is None:
        return None
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def share(value: float | None) -> str | None:
    """A share in per cent."""
    return None if value is None else f"{100 * value:.1f} %"


def _value(value: Value, form: str) -> str:
    text = f"{value.value:.2f}x" if form == "ratio" else share(value.value)
    return f"{value.reach.value}{text}"
