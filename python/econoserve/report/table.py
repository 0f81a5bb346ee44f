"""The table of runs: which figures, and how they are written."""

from collections.abc import Mapping
from typing import Any

COLUMNS = {
    "policy": "policy",
    "rate_rps": "rate",
    "gpus": "GPUs",
    "requests": "requests",
    "throughput_rps": "served/s",
    "goodput_rps": "goodput/s",
    "ssr": "SSR",
    "mean_jct_s": "mean JCT s",
    "p99_jct_s": "p99 JCT s",
    "mean_ttft_s": "mean TTFT s",
    "mean_tpot_s": "mean TPOT s",
    "preemptions": "preempted",
    "kvc_utilisation": "KVC held",
    "kvc_useful_utilisation": "useful",
    "kvc_useful_utilisation_backlog": "in backlog",
    "wall_s": "wall s",
}
"""Figures of the table, and their headings."""


def cells(result: Mapping[str, Any]) -> list[str]:
    """A run's line.

    Args:
        result: its settings and figures.

    Returns:
        A cell for each of ``COLUMNS``; ``-`` for what was not measured.
    """
    return [cell(result.get(name)) for name in COLUMNS]


def cell(value: Any) -> str:
    """A figure as text.

    Args:
        value: a number or a word; ``None`` if it was not measured.

    Returns:
        The text.
    """
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
