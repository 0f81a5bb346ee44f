"""How hard the goodput stage presses: arrivals and SLO, from what stock SGLang does.

Owns the two rules. Neither depends on how long a run takes.
"""

from typing import Any

LOAD_FACTOR = 1.5
"""Arrivals per second, as a multiple of what stock SGLang sustains with the same KVC."""

SLO_TOKENS = 1024
"""The SLO is the time in which so many tokens are decoded one after another with few beside them:
three times a mean response, so that a long wait breaks it and a crowded batch does not."""

RAMP = 0.25
"""Share of the window that is left out at its begin, while the batch fills."""


def sustained_requests_per_s(answers: list[dict[str, Any]]) -> float:
    """Requests per second that a system completes while others always wait.

    All requests arrived at once. While some of them have no token yet, the KVC is full; after that
    the batch runs down, which says nothing about a server under load. So tokens are counted until
    the last request has its first token, and divided by the mean length of a response. Those of a
    response are taken to come evenly between its first and its last.

    Args:
        answers: of a burst, all served; see ``scheduler_comparison.worker``.

    Returns:
        Requests per second.

    Raises:
        ValueError: no tokens came within the window: the burst was too small for the KVC.
    """
    end_s = max(one["ttft_s"] for one in answers)
    begin_s = RAMP * end_s
    tokens = sum(one["output_tokens"] * _share(one, begin_s, end_s) for one in answers)
    if tokens == 0 or end_s <= begin_s:
        raise ValueError(
            f"requests={len(answers)}: all began at once, none waited; give more, or less KVC"
        )
    mean_tokens = sum(one["output_tokens"] for one in answers) / len(answers)
    return tokens / (end_s - begin_s) / mean_tokens


def _share(answer: dict[str, Any], begin_s: float, end_s: float) -> float:
    """Share of a response that came within a window."""
    first_s, last_s = answer["ttft_s"], answer["jct_s"]
    if last_s <= first_s:
        return float(begin_s <= last_s <= end_s)
    within_s = min(last_s, end_s) - max(first_s, begin_s)
    return max(within_s, 0.0) / (last_s - first_s)


def slo_ms(tpot_ms: float, scale: float) -> float:
    """The SLO from arrival to last token.

    Args:
        tpot_ms: time per output token with few requests beside, on stock SGLang.
        scale: factor on all lengths.

    Returns:
        Milliseconds.
    """
    return SLO_TOKENS * scale * tpot_ms
