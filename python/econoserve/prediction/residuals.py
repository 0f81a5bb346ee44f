"""How far lengths are from what an estimate said, and how far to believe the estimate for it.

Owns the histogram of the errors of one estimator, on the grid of lengths, and its weight against
another prediction. It must not know where the estimate comes from.
"""

import numpy as np

from econoserve.prediction import grid
from econoserve.prediction.predictor import State

CENTER = grid.BUCKETS
"""The cell of an error of zero."""

SPREAD = 2 * grid.BUCKETS + 1

MEMORY = 500.0
"""Errors after which most of what was known is forgotten."""

ASSUMED = 8.0
"""Errors that the one assumed at first counts for."""

STEP = 0.01
"""Of the weight, once much was seen."""

LEAST, MOST = 0.002, 0.998


class Residuals:
    """Errors of an estimate, in buckets of the grid, and its weight."""

    __slots__ = ("counts", "uses", "weight")

    def __init__(self) -> None:
        away = np.arange(SPREAD) - CENTER
        # Log-normal with sigma of 8 buckets, a factor of 2.4, and now and then anything.
        errors = np.exp(-0.5 * (away / 8.0) ** 2) + 1e-3
        self.counts = errors / errors.sum() * ASSUMED
        self.weight = 0.5
        self.uses = 0.0

    def density(self, estimate: int) -> np.ndarray:
        """What the estimate says.

        Args:
            estimate: the estimated length's bucket, from 0.

        Returns:
            A padded histogram that sums to 1.
        """
        density = np.zeros(grid.WIDTH)
        inside = density[grid.PAD : grid.PAD + grid.BUCKETS]
        smooth = np.correlate(self.counts, grid.KERNELS[0], "same")
        first = CENTER - estimate
        inside[:] = smooth[first : first + grid.BUCKETS]
        inside += 1e-9
        density /= inside.sum()
        return density

    def mix(self, other: np.ndarray, estimate: int) -> np.ndarray:
        """The estimate's distribution mixed with another one.

        Args:
            other: a padded histogram that sums to about 1.
            estimate: the estimated length's bucket, from 0.

        Returns:
            A padded histogram.
        """
        return (1.0 - self.weight) * other + self.weight * self.density(estimate)

    def learn(self, other: np.ndarray, estimate: int, bucket: int, voice: float = 1.0) -> None:
        """Learn from a length.

        Args:
            other: the other prediction, a padded histogram.
            estimate: the estimated length's bucket, from 0.
            bucket: the true length's bucket, from 0.
            voice: how much it counts, up to 1.
        """
        mine = self.weight * self.density(estimate)[grid.PAD + bucket]
        theirs = (1.0 - self.weight) * other[grid.PAD + bucket] / other.sum()
        self.uses += voice
        step = voice * max(1.0 / (self.uses + 10.0), STEP)
        self.weight += step * (mine / (mine + theirs + 1e-12) - self.weight)
        self.weight = min(max(self.weight, LEAST), MOST)
        self.counts *= 1.0 - voice / MEMORY
        self.counts[CENTER + bucket - estimate] += voice

    def state(self) -> State:
        """What it has learned.

        Returns:
            Arrays and numbers.
        """
        return {"counts": self.counts.copy(), "weight": self.weight, "uses": self.uses}

    def restore(self, state: State) -> None:
        """Take over what another one has learned.

        Args:
            state: from ``state``.

        Raises:
            ValueError, KeyError, TypeError: it is not such a state.
        """
        if state["counts"].shape != (SPREAD,):
            raise ValueError(f"errors of shape {state['counts'].shape}: give {SPREAD}")
        self.counts = np.array(state["counts"], float)
        self.weight, self.uses = float(state["weight"]), float(state["uses"])
