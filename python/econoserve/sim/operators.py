"""Time of a pass as the sum of its operators, from measured tables.

Owns the interpolation: linear between the points of a table, and on beyond its last two.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from econoserve.sim.fitted import UNEVEN, along
from econoserve.sim.timing import Pass, numbers


@dataclass(frozen=True, slots=True)
class OperatorTables:
    """Tables of operators, in microseconds.

    Attention was measured with one prompt chunk beside decodes of equal context. Several whole
    prompts in a pass count as prompts of their mean length, weighted by tokens: one beside the
    decodes, the others by themselves, so that what both cost each other counts once. Requests that
    decode count as having their mean context.

    Attributes:
        layers: layers of the model.
        tokens: tokens in a pass at which linear layers were measured, ascending.
        layer_us: time of a layer without attention.
        once_us: time of what runs once in a pass.
        sequences: numbers of sequences that give a token, ascending.
        sequence_us: time of the output layer and of sampling.
        attention_axes: prompt tokens, their context before, decoding requests, context of each.
        attention_us: time of attention in a layer, in the order of the axes' product.
        uneven_requests: numbers of decoding requests for what follows, ascending.
        uneven_alone: if their contexts differ, how far attention lies between its time at their
            mean context and that at the longest; where nothing but decodes is in the pass.
        uneven_beside: the same beside prompts.
    """

    layers: int
    tokens: tuple[float, ...]
    layer_us: tuple[float, ...]
    once_us: tuple[float, ...]
    sequences: tuple[float, ...]
    sequence_us: tuple[float, ...]
    attention_axes: tuple[tuple[float, ...], ...]
    attention_us: tuple[float, ...]
    uneven_requests: tuple[float, ...] = (1.0, 2.0)
    uneven_alone: tuple[float, ...] = (0.0, 0.0)
    uneven_beside: tuple[float, ...] = (0.0, 0.0)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "OperatorTables":
        """From a profile.

        Args:
            fields: named as the attributes.

        Returns:
            The tables.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or of another form.
        """
        names = ("tokens", "layer_us", "once_us", "sequences", "sequence_us")
        names += tuple(name for name in UNEVEN if name in fields)
        rows = {name: numbers(name, fields[name]) for name in names}
        axes = tuple(numbers("attention_axes", axis) for axis in fields["attention_axes"])
        size = 1
        for axis in (*axes, rows["tokens"], rows["sequences"]):
            if len(axis) < 2 or any(a >= b for a, b in pairwise(axis)):
                raise ValueError(f"axis {axis}: give two or more ascending values")
        for axis in axes:
            size *= len(axis)
        attention = numbers("attention_us", fields["attention_us"])
        if len(axes) != 4 or len(attention) != size:
            raise ValueError(f"attention_us has {len(attention)} values: give one for each point")
        return cls(int(fields["layers"]), **rows, attention_axes=axes, attention_us=attention)

    def seconds(self, work: Pass) -> float:
        """See ``IterationTime.seconds``."""
        tokens = work.prompt_tokens + work.decoding
        if not tokens:
            return 0.0
        layer_us = along(self.tokens, self.layer_us, tokens) + self._attention(work)
        once_us = along(self.tokens, self.once_us, tokens)
        once_us += along(self.sequences, self.sequence_us, work.prompts + work.decoding)
        return (self.layers * layer_us + once_us) / 1e6

    def _attention(self, work: Pass) -> float:
        context = work.context_tokens / work.decoding if work.decoding else 0.0
        equal = self._equal(work, context)
        if work.longest_tokens <= context:
            return equal
        shares = self.uneven_beside if work.prompt_tokens else self.uneven_alone
        share = along(self.uneven_requests, shares, min(work.decoding, self.uneven_requests[-1]))
        return equal + share * max(self._equal(work, work.longest_tokens) - equal, 0.0)

    def _equal(self, work: Pass, context: float) -> float:
        """Attention where all decode with the same context."""
        if not work.prompt_tokens:
            return self._grid((0.0, 0.0, work.decoding, context))
        mean_squares = work.prompt_squares / work.prompt_tokens
        before = (mean_squares - work.prompt_tokens) / 2
        if before >= 0:
            return self._grid((work.prompt_tokens, before, work.decoding, context))
        prompts = work.prompt_tokens / mean_squares
        first = self._grid((mean_squares, 0.0, work.decoding, context))
        return first + (prompts - 1) * self._grid((mean_squares, 0.0, 0.0, 0.0))

    def _grid(self, point: Sequence[float]) -> float:
        corners = [(0, 1.0)]
        for axis, value in zip(self.attention_axes, point, strict=True):
            low, share = _place(axis, value)
            size = len(axis)
            corners = [
                (index * size + low + step, weight * part)
                for index, weight in corners
                for step, part in ((0, 1.0 - share), (1, share))
                if part
            ]
        return sum(self.attention_us[index] * weight for index, weight in corners)


def _place(axis: Sequence[float], value: float) -> tuple[int, float]:
    """The interval of a value, and how far into it the value lies; above 1 beyond the last."""
    low = min(max(bisect_right(axis, value) - 1, 0), len(axis) - 2)
    return low, max((value - axis[low]) / (axis[low + 1] - axis[low]), 0.0)
