"""Mode ``skyline`` with risk: one pooled margin for all that is uncertain, instead of padding each.

A claim's length is a few equally likely outcomes. At step t it is still decoding with probability
p, given that it is now, and then holds b + t. So the occupancy has the mean sum p * (b + t) and,
claims being independent, the variance sum p * (1 - p) * (b + t)^2. A plan is admitted while mean +
z(eps) * standard deviation stays within the KVC at every step, eps being the risk that an
allocation finds the KVC full. Where lengths are certain this is the skyline, but for the grid. All
of it is ours, not the paper's.

The steps are a grid, drawn anew now and then. What lies between two points of it is counted as if
all that decodes at the first still did at the second, so a coarse grid only ever admits less.
"""

import math
from bisect import bisect_right
from functools import cached_property
from heapq import heappop, heappush
from statistics import NormalDist

import numpy as np

from econoserve.core.future import FutureLedger
from econoserve.core.ledger import Claim

CELLS = 32
"""Grid points taken from the claims' own ends."""

HORIZONS = np.unique((1.5 ** np.arange(30)).astype(np.int64))
"""Grid points ahead of now, for claims whose ends are none of those."""

REGRID_STEPS = 16
"""Steps for which a grid is used."""

REGRID_SHARE = 4
"""It is drawn anew before, too, when one claim in so many came since."""

ROWS = 64
"""Claims that the arrays are made for at first."""

MARGIN = 1e-6
"""Tokens by which rounding may exceed the KVC."""


class RiskLedger(FutureLedger):
    """Mode ``skyline`` with a risk level; keeps one row per decoding claim.

    Args:
        capacity_tokens: size of the KVC, at least 1.
        reserve_tokens: kept back from admissions.
        lead_tokens: see ``Ledger``.
        risk: probability of finding the KVC full that an admission may cause, in (0, 1).
        points: outcomes per length, at least 2.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        capacity_tokens: int,
        reserve_tokens: int = 0,
        lead_tokens: int = 8,
        risk: float = 0.1,
        points: int = 8,
    ) -> None:
        if not 0.0 < risk < 1.0:
            raise ValueError(f"risk={risk}: give a probability between 0 and 1")
        if points < 2:
            raise ValueError(f"points={points}: give 2 outcomes or more")
        super().__init__(capacity_tokens, reserve_tokens, lead_tokens)
        self.points = points
        self.z = NormalDist().inv_cdf(1 - risk)
        self._outcomes = np.full((points, ROWS), -1, dtype=np.int32)
        self._bases = np.zeros(ROWS)
        self._free_rows = list(range(ROWS))
        self._top_row = 0
        self._grid = np.zeros(0, dtype=np.int64)
        self._survival = np.zeros((ROWS, 0))
        self._squares = np.zeros((ROWS, 0))
        self._before = np.zeros(0, dtype=np.int64)
        self._drawn_at = -REGRID_STEPS
        self._fresh = 0

    def trial(self, used_tokens: int) -> "RiskTrial":
        """See ``Ledger.trial``."""
        # Once a plan, asked for or not: the grid must not depend on what was asked before.
        many = self._fresh * REGRID_SHARE >= self._totals.decoding > 0
        if many or self.step - self._drawn_at >= REGRID_STEPS:
            self._draw_grid()
        return RiskTrial(self, used_tokens)

    def occupancy(self, bounds: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """What the decoding claims will hold, on the grid that the last trial found or drew.

        There must have been a trial.

        Args:
            bounds: 1, or 2 to learn also by how much they will grow (see ``limits_tokens``).

        Returns:
            Grid points not yet past (steps), and an array (bounds, 2, points): mean (tokens) and
            variance (tokens squared) of either at each.
        """
        grid, rows = self.ahead() + self.step, self._top_row
        first = len(self._grid) - len(grid)
        alive = np.add.reduce(self._outcomes[:, :rows] >= self.step, axis=0, dtype=np.int32)
        share = self.points / np.maximum(alive, 1)
        bases = self._bases[:rows]
        powers = np.empty((3, rows))
        powers[0] = share
        powers[1] = share * bases
        powers[2] = powers[1] * bases
        # Sums over the claims of p, p * b and p * b^2, and the same of p * (1 - p).
        sums = powers @ self._survival[:rows, first:]
        spread = sums - (powers * share) @ self._squares[:rows, first:]
        moments = np.empty((bounds, 2, len(grid)))
        moments[0, 0] = sums[0] * grid + sums[1]
        moments[0, 1] = (spread[0] * grid + 2 * spread[1]) * grid + spread[2]
        # Up to the first point everything decodes that does now.
        moments[0, :, 0] = self._totals.decoding * grid[0] + np.add.reduce(bases), 0.0
        if bounds > 1:
            ahead = grid - self.step
            moments[1] = sums[0] * ahead, spread[0] * ahead * ahead
            moments[1, :, 0] = self._totals.decoding * ahead[0], 0.0
        return grid, np.maximum(moments, 0.0, out=moments)

    def ahead(self) -> np.ndarray:
        """The grid points that are not passed.

        Returns:
            Steps from now to each, ascending.
        """
        return self._grid[self._grid.searchsorted(self.step) :].astype(float) - self.step

    def _draw_grid(self) -> None:
        """Choose the grid's points, and work out which share of each row's outcomes they pass."""
        ends = np.unique(self._outcomes[self._outcomes >= self.step])
        if len(ends) > CELLS:
            ends = ends[np.arange(1, CELLS + 1) * len(ends) // CELLS - 1]
        self._grid = np.sort(np.concatenate((ends, self.step + HORIZONS)))
        # The last step before each cell.
        self._before = np.concatenate(([self.step - 1], self._grid[:-1]))
        self._drawn_at, self._fresh = self.step, 0
        self._survival = np.zeros((len(self._bases), len(self._grid)))
        survival = self._survival[: self._top_row]
        for outcome in self._outcomes[:, : self._top_row]:
            survival += outcome[:, None] > self._before
        survival /= self.points
        self._squares = self._survival * self._survival

    def _index(self, rid: str, claim: Claim) -> None:
        if not self._free_rows:
            self._grow()
        claim.slot = heappop(self._free_rows)
        self._top_row = max(self._top_row, claim.slot + 1)
        self._outcomes[:, claim.slot] = claim.ends
        self._bases[claim.slot] = self.base_of(claim)
        self._fresh += 1
        over = np.array(claim.ends).searchsorted(self._before, side="right")
        self._survival[claim.slot] = survival = 1 - over / len(claim.ends)
        self._squares[claim.slot] = survival * survival

    def _unindex(self, rid: str, claim: Claim) -> None:
        self._outcomes[:, claim.slot] = -1
        self._bases[claim.slot] = 0.0
        self._survival[claim.slot] = self._squares[claim.slot] = 0.0
        heappush(self._free_rows, claim.slot)
        while self._top_row and self._outcomes[-1, self._top_row - 1] < 0:
            self._top_row -= 1

    def _grow(self) -> None:
        rows = len(self._bases)
        self._outcomes = np.pad(self._outcomes, ((0, 0), (0, rows)), constant_values=-1)
        self._bases = np.pad(self._bases, (0, rows))
        self._survival = np.pad(self._survival, ((0, rows), (0, 0)))
        self._squares = np.pad(self._squares, ((0, rows), (0, 0)))
        self._free_rows = list(range(rows, 2 * rows))


class RiskTrial:
    """See ``Trial``; the mean and the variance of the occupancy on a grid of future steps.

    They are worked out when they are first asked for: most plans admit nobody and ask nothing. The
    ledger must not change between the trial and its last answer.

    Args:
        ledger: the claims.
        used_tokens: KVC in use.
    """

    def __init__(self, ledger: RiskLedger, used_tokens: int) -> None:
        self._ledger = ledger
        self._z = ledger.z
        self._used_tokens = used_tokens
        self._extended: dict[str, tuple[int, ...]] = {}
        self._known: dict[tuple[tuple[int, ...], int], np.ndarray] = {}
        self._peak: tuple[int, float] | None = None

    @cached_property
    def _moments(self) -> np.ndarray:
        """Of each bound: the mean above its limit, and the variance."""
        limits = self._ledger.limits_tokens(self._used_tokens)
        _, moments = self._ledger.occupancy(len(limits))
        moments[:, 0] -= np.array(limits)[:, None]
        return moments

    @cached_property
    def _ahead(self) -> np.ndarray:
        """Steps from now to each grid point."""
        return self._ledger.ahead()

    @cached_property
    def _cells(self) -> np.ndarray:
        """Steps from now to the last one before each cell."""
        return np.concatenate(([-1.0], self._ahead[:-1]))

    @property
    def headroom_tokens(self) -> int:
        """See ``Trial.headroom_tokens``."""
        return math.floor(-self._fullest[1])

    def fits(self, tokens: int, response: tuple[int, ...]) -> bool:
        """See ``Trial.fits``."""
        if not response:
            return tokens <= self.headroom_tokens
        if self._overfills(tokens - 1, response):
            return False
        moments = self._moments + self._future(tokens - 1, response, 1)
        return self._above(moments).max() <= 0

    def take(self, rid: str, tokens: int, response: tuple[int, ...]) -> str | None:
        """See ``Trial.take``."""
        if response:
            self._add(self._future(tokens - 1, response, 1))
        else:
            self._raise_limits(-tokens, -tokens)
        return None

    def count(self, response: tuple[int, ...], most: int) -> int:
        """See ``Trial.count``; what they hold is counted already, so they only add growth."""
        future = self._future(0, response, 0)
        low, high, trying = 0, most, most
        while low < high:
            if self._above(self._moments + trying * future).max() <= 0:
                low = trying
            else:
                high = trying - 1
            trying = 1 if low == 0 and trying == most else (low + high + 1) // 2
        return low

    def start(self, rid: str, response: tuple[int, ...]) -> str | None:
        """See ``Trial.start``."""
        own, promised = self._ledger.own_tokens(rid), self._ledger[rid].waiting_promise_tokens
        self._raise_limits(own + promised, promised)
        self._add(self._future(self._held(own), response, 0))
        return None

    def extend(self, rid: str, response: tuple[int, ...]) -> str | None:
        """See ``Trial.extend``."""
        self.release(rid)
        self._extended[rid] = response
        self._raise_limits(0, -self._ledger.freed_tokens(rid))
        self._add(self._future(self._held(self._ledger.own_tokens(rid)), response, 0))
        return None

    def release(self, rid: str) -> None:
        """See ``Trial.release``; the outcomes that the ledger knows are taken out."""
        claim, own = self._ledger[rid], self._ledger.own_tokens(rid)
        freed = self._ledger.freed_tokens(rid)
        if claim.since is None:
            promised = claim.waiting_promise_tokens
            self._raise_limits(own + promised, freed + promised)
            return
        self._raise_limits(0, freed)
        left = self._extended.pop(rid, None)
        if left is not None:
            self._add(-self._future(self._held(own), left, 0))
            return
        left = tuple(end - self._ledger.step for end in claim.ends if end >= self._ledger.step)
        self._add(-self._moments_of(self._alive(left, 0), self._held(own) + self._ahead))
        # Its outcomes that are over since the grid was drawn count more by now; not below 0.
        np.maximum(self._moments[:, 1], 0.0, out=self._moments[:, 1])

    @property
    def _fullest(self) -> tuple[int, float]:
        """The cell in which the KVC is fullest, margin included, and how far above the limit."""
        if self._peak is None:
            above = self._above(self._moments)
            cell = int(above.argmax())
            self._peak = cell, float(above[cell])
        return self._peak

    def _overfills(self, tokens: int, response: tuple[int, ...]) -> bool:
        """Whether a new claim is too much where the KVC is fullest already: most refusals are."""
        cell, _ = self._fullest
        alive = 1 - bisect_right(response, self._cells[cell] - 1) / len(response)
        size = tokens + min(float(self._ahead[cell]), response[-1] + 1)
        own = alive * size
        spread = own * (size - own)
        return all(
            mean + own + self._z * math.sqrt(variance + spread) > MARGIN
            for mean, variance in self._moments[:, :, cell].tolist()
        )

    def _held(self, own: int) -> np.ndarray:
        """What a claim holds already, for each bound: in the second it is in the limit."""
        return np.array([[own], [0]])[: len(self._moments)]

    def _future(
        self, tokens: int | np.ndarray, response: tuple[int, ...], delay: int
    ) -> np.ndarray:
        """What a claim adds to the moments that holds so much now, of each bound or of all."""
        size = tokens + np.minimum(self._ahead, response[-1] + delay)
        return self._moments_of(self._alive(response, delay), size)

    @staticmethod
    def _moments_of(alive: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Mean and variance of a claim of a size that is there with a probability."""
        moments = np.empty((*size.shape[:-1], 2, len(alive)))
        mean = np.multiply(alive, size, out=moments[..., 0, :])
        np.multiply(mean, size - mean, out=moments[..., 1, :])
        return moments

    def _alive(self, response: tuple[int, ...], delay: int) -> np.ndarray:
        """Probability of each cell to begin before the response ends."""
        alive = self._known.get((response, delay))
        if alive is None:
            over = np.array(response).searchsorted(self._cells - delay, side="right")
            alive = self._known[response, delay] = 1 - over / len(response)
        return alive

    def _raise_limits(self, *tokens: int) -> None:
        for moments, more in zip(self._moments, tokens, strict=False):
            moments[0] -= more
        self._peak = None

    def _add(self, moments: np.ndarray) -> None:
        self._moments = self._moments + moments
        self._peak = None

    def _above(self, moments: np.ndarray) -> np.ndarray:
        """By how much the KVC is too small in each cell for the chosen risk, by the lower bound."""
        above = moments[:, 0] + self._z * np.sqrt(moments[:, 1]) - MARGIN
        return above[0] if len(above) == 1 else above.min(axis=0)
