"""What is known of a response's length before it ends: a distribution, never the truth.

Owns the conditioning on survival. It must not learn: predictors do.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LengthPrediction:
    """A predicted response-length distribution; the only way a length enters the scheduler.

    Attributes:
        quantiles_tokens: ascending RL at evenly spaced probability levels; empty where nothing is
            known.
        level: the probability that a promise of one length is meant to cover, in (0, 1].
        cap_tokens: the request's limit on output tokens; no prediction exceeds it. 0 counts as 1:
            a prompt's pass produces a token in any case.

    Raises:
        ValueError: a value is out of range.
    """

    quantiles_tokens: tuple[int, ...]
    level: float
    cap_tokens: int

    def __post_init__(self) -> None:
        known = self.quantiles_tokens
        if list(known) != sorted(known) or (known and not known[0] >= 1):
            raise ValueError(f"quantiles_tokens={known}: give lengths of 1 or more, ascending")
        if not 0.0 < self.level <= 1.0:
            raise ValueError(f"level={self.level}: give a probability in (0, 1]")
        if self.cap_tokens < 0:
            raise ValueError(f"cap_tokens={self.cap_tokens}: give 0 or more")

    @property
    def tokens(self) -> int:
        """RL predicted at arrival, at least 1."""
        return self.given(0)

    def given(self, generated_tokens: int) -> int:
        """RL predicted once ``generated_tokens`` are out and the response has not ended.

        Args:
            generated_tokens: output tokens produced so far.

        Returns:
            The RL at ``level`` of the distribution conditioned on survival: more than
            ``generated_tokens`` unless the cap allows no more. Beyond all that was ever seen,
            the known part doubles.
        """
        known = self.quantiles_tokens
        survivors = len(known) - bisect_right(known, generated_tokens)
        if survivors:
            rank = max(math.ceil(self.level * survivors), 1)
            return self._clip(known[len(known) - survivors + rank - 1], generated_tokens)
        return self._clip(max(2 * generated_tokens, generated_tokens + 16), generated_tokens)

    def outcomes(self, generated_tokens: int, points: int) -> tuple[int, ...]:
        """Equally likely RLs once ``generated_tokens`` are out and the response has not ended.

        Args:
            generated_tokens: output tokens produced so far.
            points: how many outcomes; with 1 it is the RL at ``level``.

        Returns:
            Ascending RLs: the middles of ``points`` equal slices of the distribution
            conditioned on survival.
        """
        if points == 1:
            return (self.given(generated_tokens),)
        known = self.quantiles_tokens
        first = bisect_right(known, generated_tokens)
        survivors = len(known) - first
        if not survivors:
            return (self.given(generated_tokens),) * points
        return tuple(
            self._clip(known[first + (2 * point + 1) * survivors // (2 * points)], generated_tokens)
            for point in range(points)
        )

    @cached_property
    def mean_tokens(self) -> float:
        """Mean RL at arrival."""
        lengths = [self._clip(tokens, 0) for tokens in self.quantiles_tokens]
        return sum(lengths) / len(lengths) if lengths else float(self.tokens)

    @cached_property
    def variance_tokens2(self) -> float:
        """Variance of the RL at arrival, in tokens squared."""
        lengths = [self._clip(tokens, 0) for tokens in self.quantiles_tokens]
        mean = self.mean_tokens
        return sum((length - mean) ** 2 for length in lengths) / len(lengths) if lengths else 0.0

    def _clip(self, tokens: int, generated_tokens: int) -> int:
        return min(max(tokens, generated_tokens + 1), max(self.cap_tokens, 1))
