"""Time of a pass as a sum of few terms, whose coefficients were fitted to measurements.

Owns that model; ``sim.fitting`` fits it.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from econoserve.sim.timing import Pass, numbers


@dataclass(frozen=True, slots=True)
class FittedTime:
    """Linear layers by the tokens in the pass, attention by what it reads and multiplies.

    Times are in seconds. ``alone`` holds what a pass that only decodes costs besides its tokens:
    per request, per token of context. ``beside`` holds the same for passes with prompts: fixed,
    per prompt, per prompt token and prompt token before it (``Pass.prompt_squares``), per
    decoding request, per token of context, and what each token of context costs more that belongs
    to requests beyond the first ``CROWD``.

    Attributes:
        tokens: numbers of tokens in a pass, ascending.
        tokens_s: what so many cost; between them, and on beyond the last two, on a line.
        alone_s: see above.
        beside_s: see above.
        uneven_requests: numbers of decoding requests for what follows, ascending.
        uneven_alone: if their contexts differ, the share of the way from their mean context to the
            longest that counts as context of all, too; in passes that only decode.
        uneven_beside: the same beside prompts.
    """

    tokens: tuple[float, ...]
    tokens_s: tuple[float, ...]
    alone_s: tuple[float, ...]
    beside_s: tuple[float, ...]
    uneven_requests: tuple[float, ...] = (1.0, 2.0)
    uneven_alone: tuple[float, ...] = (0.0, 0.0)
    uneven_beside: tuple[float, ...] = (0.0, 0.0)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "FittedTime":
        """From a profile.

        Args:
            fields: named as the attributes.

        Returns:
            The model.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or of another form.
        """
        names = ("tokens", "tokens_s", "alone_s", "beside_s")
        names += tuple(name for name in UNEVEN if name in fields)
        rows = {name: numbers(name, fields[name]) for name in names}
        for axis, others in AXES.items():
            at = rows.get(axis, (1.0, 2.0))
            if len(at) < 2 or any(a >= b for a, b in pairwise(at)):
                raise ValueError(f"{axis} {at}: give two or more ascending values")
            for name in others:
                if len(rows.get(name, at)) != len(at):
                    raise ValueError(f"{name} {rows[name]}: give one value for each of {axis}")
        for name, length in (("alone_s", 2), ("beside_s", 6)):
            if len(rows[name]) != length:
                raise ValueError(f"{name} {rows[name]}: give {length} values")
        return cls(**rows)

    def seconds(self, work: Pass) -> float:
        """See ``IterationTime.seconds``."""
        tokens = work.prompt_tokens + work.decoding
        if not tokens:
            return 0.0
        total_s = along(self.tokens, self.tokens_s, tokens)
        context = float(work.context_tokens)
        if work.decoding:
            shares = self.uneven_beside if work.prompt_tokens else self.uneven_alone
            requests = min(work.decoding, self.uneven_requests[-1])
            spread = max(work.longest_tokens * work.decoding - context, 0.0)
            context += along(self.uneven_requests, shares, requests) * spread
        if not work.prompt_tokens:
            per_request, per_context = self.alone_s
            return total_s + per_request * work.decoding + per_context * context
        fixed, per_prompt, per_square, per_request, per_context, crowded = self.beside_s
        return (
            total_s
            + fixed
            + per_prompt * work.prompts
            + per_square * work.prompt_squares
            + per_request * work.decoding
            + per_context * context
            + crowded * context * beyond(work.decoding)
        )


UNEVEN = ("uneven_requests", "uneven_alone", "uneven_beside")
"""Fields that may be missing: contexts then cost as if they were equal."""

CROWD = 64
"""Beside prompts, decoding more requests takes much longer on RTX GPUs, in measured tables."""

AXES = {"tokens": ("tokens_s",), "uneven_requests": ("uneven_alone", "uneven_beside")}


def beyond(requests: int) -> float:
    """The share of decoding requests that are beyond the first ``CROWD``.

    Args:
        requests: how many decode.

    Returns:
        A share in [0, 1).
    """
    return max(requests - CROWD, 0) / requests if requests else 0.0


def along(axis: Sequence[float], values: Sequence[float], value: float) -> float:
    """A value on the lines between points, on beyond the last two, and flat before the first.

    Args:
        axis: where the points are, ascending.
        values: at the points.
        value: where to look.

    Returns:
        What is there.
    """
    low = min(max(bisect_right(axis, value) - 1, 0), len(axis) - 2)
    share = max((value - axis[low]) / (axis[low + 1] - axis[low]), 0.0)
    return values[low] + (values[low + 1] - values[low]) * share
