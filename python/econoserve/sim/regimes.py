"""Time of a pass by the coefficients of EconoServe's own cost model, fitted to timed iterations.

Owns the sum: one set of coefficients for passes that only decode, one for those with prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from econoserve.sim.timing import Pass, numbers

COEFFICIENTS = 5


@dataclass(frozen=True, slots=True)
class TwoRegimes:
    """T = c0 + c1 * P + c2 * sum(L^2) + c3 * B + c4 * KV, as in ``econoserve.core.cost``.

    A pass with prompts takes no less than its decodes alone.

    Attributes:
        decode_s: c0 to c4 of passes that only decode, in seconds; they may use CUDA graphs.
        mixed_s: c0 to c4 of passes with prompts, in seconds.
    """

    decode_s: tuple[float, ...]
    mixed_s: tuple[float, ...]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "TwoRegimes":
        """From a profile.

        Args:
            fields: named as the attributes.

        Returns:
            The coefficients.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or of another form.
        """
        return cls(*(_coefficients(name, fields[name]) for name in ("decode_s", "mixed_s")))

    def seconds(self, work: Pass) -> float:
        """See ``IterationTime.seconds``."""
        decode_s = 0.0
        if work.decoding:
            decode_s = _sum(self.decode_s, (1, 0, 0, work.decoding, work.context_tokens))
        if not work.prompt_tokens:
            return decode_s
        amounts = (
            1,
            work.prompt_tokens,
            work.prefill_squared,
            work.decoding,
            work.context_tokens,
        )
        return max(_sum(self.mixed_s, amounts), decode_s)


def _coefficients(name: str, values: Sequence[float]) -> tuple[float, ...]:
    found = numbers(name, values)
    if len(found) != COEFFICIENTS or min(found) < 0 or max(found) == 0:
        raise ValueError(f"{name}={list(found)}: give five numbers, none negative, not all 0")
    return found


def _sum(coefficients_s: Sequence[float], amounts: Sequence[float]) -> float:
    return sum(c * x for c, x in zip(coefficients_s, amounts, strict=True))
