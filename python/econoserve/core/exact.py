"""Exact allocation: what is used plus everything promised never exceeds the capacity."""

from dataclasses import dataclass, field

from econoserve.core.ledger import Ledger


class ExactLedger(Ledger):
    """Mode ``exact``, after the exact-allocation of EconoServe (arXiv 2411.06364).

    If no response outlives its promise, no allocation fails. What is *used* comes from the pool,
    so a prefix shared by several tasks counts once.
    """

    def trial(self, used_tokens: int) -> "ExactTrial":
        """See ``Ledger.trial``."""
        return ExactTrial(self, used_tokens)


@dataclass(slots=True)
class ExactTrial:
    """See ``Trial``; free KVC is a single number.

    Attributes:
        ledger: the claims.
        used_tokens: KVC in use.
        headroom_tokens: KVC neither used nor promised nor reserved.
    """

    ledger: Ledger
    used_tokens: int
    headroom_tokens: int = field(init=False)
    _promises: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ledger = self.ledger
        free = ledger.capacity_tokens - self.used_tokens - ledger.promised_tokens
        self.headroom_tokens = free - ledger.reserve_tokens

    def fits(self, tokens: int, response: tuple[int, ...]) -> bool:
        """See ``Trial.fits``."""
        return tokens + (response[-1] if response else 0) <= self.headroom_tokens

    def take(self, rid: str, tokens: int, response: tuple[int, ...]) -> str | None:
        """See ``Trial.take``."""
        self.headroom_tokens -= tokens
        self._promise(rid, response[-1] if response else 0)
        return None

    def count(self, response: tuple[int, ...], most: int) -> int:
        """See ``Trial.count``."""
        return min(max(self.headroom_tokens, 0) // max(response[-1], 1), most)

    def start(self, rid: str, response: tuple[int, ...]) -> str | None:
        """See ``Trial.start``."""
        self._promise(rid, response[-1])
        return None

    def extend(self, rid: str, response: tuple[int, ...]) -> str | None:
        """See ``Trial.extend``."""
        self._promise(rid, response[-1])
        return None

    def release(self, rid: str) -> None:
        """See ``Trial.release``; a prefix from the cache may stay in use by others."""
        self._promise(rid, 0)
        self.headroom_tokens += self.ledger.held_by(rid) - self.ledger[rid].pinned_tokens

    def _promise(self, rid: str, tokens: int) -> None:
        standing = self._promises.get(rid)
        if standing is None:
            standing = self.ledger.promised_to(rid)
        self.headroom_tokens -= tokens - standing
        self._promises[rid] = tokens
