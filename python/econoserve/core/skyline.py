"""Mode ``skyline``: the exact test of whether the future occupancy of the KVC ever exceeds it.

Claim i holds a_i tokens now and decodes r_i more. At step k from now the claims still decoding
hold sum over {i: r_i >= k} of (a_i + k); between completions this only rises, so its peak is at a
completion: with the claims sorted by r descending, max_i (i * r_i + sum_{j <= i} a_j). (The peak
formula of LightLLM's Past-Future scheduler, ASPLOS'25; there it is used at admission only.)

In absolute steps a claim is a constant: it ends at step e and holds b + t at step t, where
b = a - now. So the skyline changes only where claims come, go or are predicted anew, and is kept
as arrays sorted by e. The second bound of ``future`` has the same shape, with b = -now.
"""

from operator import add, sub

import numpy as np

from econoserve.core.future import FutureLedger
from econoserve.core.ledger import Claim

SLACK = 64
"""Room for further columns, to copy arrays seldom."""


class SkylineLedger(FutureLedger):
    """Mode ``skyline``; keeps the decoding claims sorted by their end.

    See ``Ledger`` for the arguments.
    """

    def __init__(self, capacity_tokens: int, reserve_tokens: int = 0, lead_tokens: int = 8) -> None:
        super().__init__(capacity_tokens, reserve_tokens, lead_tokens)
        self._columns = np.zeros((3, SLACK), dtype=np.int64)
        self._size = 0

    def trial(self, used_tokens: int) -> "SkylineTrial":
        """See ``Ledger.trial``."""
        return SkylineTrial(self, used_tokens)

    def outcomes(self) -> tuple[np.ndarray, np.ndarray]:
        """The ends of all decoding claims, ascending, and their b.

        Returns:
            Two arrays (claims,), steps and tokens; not to be changed.
        """
        return self._columns[0, : self._size], self._columns[1, : self._size]

    def _index(self, rid: str, claim: Claim) -> None:
        if self._size == self._columns.shape[1]:
            self._columns = np.pad(self._columns, ((0, 0), (0, self._size)))
        columns, size = self._columns, self._size
        index = int(columns[0, :size].searchsorted(claim.ends[-1], side="right"))
        columns[:, index + 1 : size + 1] = columns[:, index:size]
        columns[:, index] = (claim.ends[-1], self.base_of(claim), claim.number)
        self._size += 1

    def _unindex(self, rid: str, claim: Claim) -> None:
        columns, size = self._columns, self._size
        index = int(columns[0, :size].searchsorted(claim.ends[-1]))
        while columns[2, index] != claim.number:
            index += 1
        columns[:, index : size - 1] = columns[:, index + 1 : size]
        self._size -= 1


class SkylineTrial:
    """See ``Trial``; one outcome per claim.

    Args:
        ledger: the claims.
        used_tokens: KVC in use.
    """

    def __init__(self, ledger: SkylineLedger, used_tokens: int) -> None:
        self._ledger = ledger
        self._now = ledger.step
        self._limits = ledger.limits_tokens(used_tokens)
        self._bounds = len(self._limits)
        ends, bases = ledger.outcomes()
        self._size = len(ends)
        # Ends, claims that decode until then, and their b for each bound; a column is added per
        # admission.
        self._columns = np.zeros((2 + self._bounds, self._size + SLACK), dtype=np.int64)
        self._columns[0, : self._size] = ends
        self._columns[1, : self._size] = np.arange(self._size, 0, -1)
        self._columns[2, : self._size] = bases[::-1].cumsum()[::-1]
        self._columns[3:, : self._size] = -self._now * self._columns[1, : self._size]
        self._claims: dict[str, tuple[tuple[int, ...], int]] = {}
        self._profile: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def headroom_tokens(self) -> int:
        """See ``Trial.headroom_tokens``."""
        free, _ = self._free_and_room()
        limit = max(self._limits)
        return int(min(limit, free.min())) if self._size else limit

    def fits(self, tokens: int, response: tuple[int, ...]) -> bool:
        """See ``Trial.fits``."""
        if not response:
            return tokens <= self.headroom_tokens
        return tokens <= self.room(response[-1] + 1) + 1

    def room(self, response_tokens: int) -> int:
        """The most KVC that a claim may hold now that is to decode so many tokens from now on.

        Args:
            response_tokens: its remaining length, 0 or more.

        Returns:
            Tokens; negative where there is no room for the response alone.
        """
        _, room = self._free_and_room()
        index = self._first(self._now + response_tokens)
        at_end = self._free_at(index, self._now + response_tokens) - response_tokens
        return int(min(at_end, room[index - 1])) if index else at_end

    def take(self, rid: str, tokens: int, response: tuple[int, ...]) -> str | None:
        """See ``Trial.take``."""
        if response:
            bases = (tokens - 1 - self._now,) * self._bounds
            self._add(rid, bases, self._now + 1 + response[-1])
        else:
            self._raise_limits(-tokens, -tokens)
        return None

    def count(self, response: tuple[int, ...], most: int) -> int:
        """See ``Trial.count``: m such responses hold m * k more at step k."""
        free, _ = self._free_and_room()
        length = max(response[-1], 1)
        index = self._first(self._now + length)
        fitting = self._free_at(index, self._now + length) // length
        if index:
            low = free[:index]
            if low.min() < 0:
                return 0
            ahead = np.maximum(self._columns[0, :index] - self._now, 1)
            fitting = min(fitting, int((low // ahead).min()))
        return max(min(fitting, most), 0)

    def start(self, rid: str, response: tuple[int, ...]) -> str | None:
        """See ``Trial.start``."""
        own, promised = self._ledger.own_tokens(rid), self._ledger[rid].waiting_promise_tokens
        self._raise_limits(own + promised, promised)
        bases = (own - self._now, -self._now)[: self._bounds]
        self._add(rid, bases, self._now + response[-1])
        return None

    def extend(self, rid: str, response: tuple[int, ...]) -> str | None:
        """See ``Trial.extend``."""
        bases, _ = self._drop(rid)
        self._add(rid, bases, self._now + response[-1])
        return None

    def release(self, rid: str) -> None:
        """See ``Trial.release``."""
        own, freed = self._ledger.own_tokens(rid), self._ledger.freed_tokens(rid)
        if self._ledger[rid].since is None and rid not in self._claims:
            promised = self._ledger.promised_to(rid)
            self._raise_limits(own + promised, freed + promised)
        else:
            self._drop(rid)
            self._raise_limits(0, freed)

    def _first(self, end: int) -> int:
        """Index of the first outcome that is not before a step."""
        return int(self._columns[0, : self._size].searchsorted(end))

    def _free_at(self, index: int, step: int) -> int:
        """KVC that is free at a step, which ``index`` belongs to."""
        if index == self._size:
            return max(self._limits)
        alive, *bases = self._columns[1:, index].tolist()
        return max(map(sub, self._limits, bases)) - alive * step

    def _free_and_room(self) -> tuple[np.ndarray, np.ndarray]:
        """Free KVC at each end, and the room for a claim that lives to that end."""
        if self._profile is None:
            ends, alive, *bases = self._columns[:, : self._size]
            free = self._limits[0] - bases[0]
            if self._bounds > 1:
                free = np.maximum(free, self._limits[1] - bases[1])
            free -= alive * ends
            self._profile = (free, np.minimum.accumulate(free - ends + self._now))
        return self._profile

    def _raise_limits(self, *tokens: int) -> None:
        self._limits = tuple(map(add, self._limits, tokens))
        self._profile = None

    def _add(self, rid: str, bases: tuple[int, ...], end: int) -> None:
        if self._size == self._columns.shape[1]:
            self._columns = np.pad(self._columns, ((0, 0), (0, SLACK)))
        index, columns = self._first(end), self._columns
        columns[:, index + 1 : self._size + 1] = columns[:, index : self._size]
        columns[0, index] = end
        columns[1:, index] = columns[1:, index + 1] if index < self._size else 0
        self._size += 1
        columns[1, : index + 1] += 1
        for row, base in enumerate(bases, start=2):
            columns[row, : index + 1] += base
        self._claims[rid] = (bases, end)
        self._profile = None

    def _drop(self, rid: str) -> tuple[tuple[int, ...], int]:
        """Let a decoding claim weigh nothing; its end stays as a point, which does no harm."""
        standing = self._claims.pop(rid, None)
        if standing is None:
            claim = self._ledger[rid]
            bases = (self._ledger.base_of(claim), -self._now)[: self._bounds]
            standing = (bases, claim.ends[-1])
        bases, end = standing
        index = int(self._columns[0, : self._size].searchsorted(end, side="right"))
        self._columns[1, :index] -= 1
        for row, base in enumerate(bases, start=2):
            self._columns[row, :index] -= base
        self._profile = None
        return standing
