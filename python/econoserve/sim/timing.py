"""How long an iteration takes on a piece of hardware, from published measurements.

Owns the models of time and what they are asked about. No policy sees them: policies learn from the
iterations that pass.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from econoserve.core.cost import IterationWork


@dataclass(frozen=True, slots=True)
class Pass:
    """What a forward pass computes, as far as its time depends on it.

    Attributes:
        prompts: prompts with tokens in it.
        prompt_tokens: those tokens.
        prompt_squares: over the prompts, (context after)^2 - (context before)^2: what attention
            costs. Of a whole prompt it is the square of its length, however it is cut.
        prefill_squared: as in ``IterationWork``, which the policies are told.
        decoding: requests that decode.
        context_tokens: their context, with the token that they take now.
        longest_tokens: the longest context among them; 0 stands for equal ones.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    prompt_squares: int = 0
    prefill_squared: int = 0
    decoding: int = 0
    context_tokens: int = 0
    longest_tokens: int = 0

    def work(self, sitting_out: int = 0) -> IterationWork:
        """The pass as a policy learns of it.

        Args:
            sitting_out: requests that run but do not decode in it.

        Returns:
            Its work.
        """
        return IterationWork(
            self.prompt_tokens,
            self.prefill_squared,
            self.decoding,
            self.context_tokens,
            sitting_out,
        )


class IterationTime(Protocol):
    """Time of a forward pass."""

    def seconds(self, work: Pass) -> float:
        """How long a pass takes.

        Args:
            work: what it computes.

        Returns:
            Seconds; 0 for an empty pass.
        """


@dataclass(frozen=True, slots=True)
class DistServeFit:
    """Separate fits of prefills and of decodes, as DistServe published them.

    Prefill: a + b sum(len) + c sum(len^2). Decode: a + b context + c requests, with one set of
    coefficients for small batches and one for large ones. DistServe never computes both at once.
    For a mixed pass we assume that decode tokens go through the linear layers as prompt tokens do
    (b of the prefill fit), and read their context besides (b of the decode fit); and that it takes
    no less than either part alone.

    Attributes:
        prefill_ms: a, b and c of prefills, in ms.
        small_decode_ms: a, b and c of decodes of small batches, in ms.
        large_decode_ms: the same of large ones.
        large_from: requests from which on a batch is large.
    """

    prefill_ms: tuple[float, float, float]
    small_decode_ms: tuple[float, float, float]
    large_decode_ms: tuple[float, float, float]
    large_from: int

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "DistServeFit":
        """From a profile.

        Args:
            fields: as in DistServe's files.

        Returns:
            The fit.

        Raises:
            KeyError: a field is missing.
            ValueError: one cannot be used; names it.
        """
        prefill, small, large = (
            _three(name, fields[name])
            for name in ("prefill", "decoding_smallbs", "decoding_largebs")
        )
        large_from = _finite(LARGE_FROM, fields[LARGE_FROM])
        if large_from < 0:
            raise ValueError(f"{LARGE_FROM}={fields[LARGE_FROM]!r}: give 0 or more requests")
        return cls(prefill, small, large, int(large_from))

    def seconds(self, work: Pass) -> float:
        """See ``IterationTime.seconds``."""
        decode_ms, per_context_ms = self._decode(work)
        if not work.prompt_tokens:
            return decode_ms / 1e3
        fixed_ms, per_token_ms, per_square_ms = self.prefill_ms
        mixed_ms = (
            fixed_ms
            + per_token_ms * (work.prompt_tokens + work.decoding)
            + per_square_ms * work.prompt_squares
            + per_context_ms * work.context_tokens
        )
        return max(mixed_ms, decode_ms) / 1e3

    def _decode(self, work: Pass) -> tuple[float, float]:
        """Time of the decodes alone, and of each token of their context, in ms."""
        if not work.decoding:
            return 0.0, 0.0
        large = work.decoding >= self.large_from
        fixed, per_context, per_request = self.large_decode_ms if large else self.small_decode_ms
        return fixed + per_context * work.context_tokens + per_request * work.decoding, per_context


LARGE_FROM = "decoding_large_small_bs_threshold"


def numbers(name: str, values: Any) -> tuple[float, ...]:
    """Numbers of a profile.

    Args:
        name: of their field.
        values: what it holds.

    Returns:
        The numbers.

    Raises:
        ValueError: it is no list, or holds what is no finite number; names the field.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name}={values!r}: give a list of numbers")
    return tuple(_finite(name, value) for value in values)


def _finite(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} has {value!r}: give finite numbers")
    return number


def _three(name: str, values: Any) -> tuple[float, float, float]:
    found = numbers(name, values)
    if len(found) != 3 or min(found) < 0 or max(found) == 0:
        raise ValueError(f"{name}={list(found)}: give three numbers, none negative, not all 0")
    return found
