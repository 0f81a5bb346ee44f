"""What the two skyline modes share: KVC that stays taken, and prefixes that several claims hold.

Prefixes that several claims share are counted once where their key says that they are the same,
and in full otherwise, which is never too little. Where that explains more than the pool says is in
use, a second bound is known: what is in use now and stays so, and what the claims still grow by.
At each step the lower of the two counts.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

from econoserve.core.ledger import Claim, Ledger


@dataclass(slots=True)
class _SharedPrefix:
    """A prefix in the cache and who holds it."""

    tokens: int
    holders: dict[str, None] = field(default_factory=dict)


class FutureLedger(Ledger):
    """A ledger that looks ahead; subclasses index the claims that decode.

    See ``Ledger`` for the arguments.
    """

    def __init__(self, capacity_tokens: int, reserve_tokens: int = 0, lead_tokens: int = 8) -> None:
        super().__init__(capacity_tokens, reserve_tokens, lead_tokens)
        self._waiting_tokens = 0
        self._shared: dict[Hashable, _SharedPrefix] = {}
        self._shared_tokens = 0
        self._copied_tokens = 0

    @property
    def waiting_tokens(self) -> int:
        """See ``Ledger.waiting_tokens``; prefixes that several claims share count once."""
        return self._waiting_tokens + self._shared_tokens

    def standing_tokens(self, used_tokens: int) -> int:
        """KVC that stays taken whatever the decoding claims do.

        Args:
            used_tokens: KVC in use, as the pool reports it.

        Returns:
            What claims that do not decode hold or are promised, prefixes that several claims
            share, and what no claim explains.
        """
        unexplained = max(used_tokens - (self.held_tokens - self._copied_tokens), 0)
        return self.waiting_tokens + unexplained

    def limits_tokens(self, used_tokens: int) -> tuple[int, ...]:
        """What the decoding claims may hold, and where it may be more, what they may grow by.

        Args:
            used_tokens: KVC in use, as the pool reports it.

        Returns:
            The KVC less the reserve and what stays taken; and, where claims share more than is
            known, the KVC less the reserve, what is in use and what waiting claims are promised.
        """
        available = self.capacity_tokens - self.reserve_tokens
        limit = available - self.standing_tokens(used_tokens)
        if self.held_tokens - self._copied_tokens <= used_tokens:
            return (limit,)
        return limit, available - used_tokens - self._totals.promised

    def freed_tokens(self, rid: str) -> int:
        """KVC that the pool has more of when a claim ends.

        Args:
            rid: a task with a claim.

        Returns:
            What it holds, less what it found in the prefix cache.
        """
        return self.held_by(rid) - self._claims[rid].pinned_tokens

    def own_tokens(self, rid: str) -> int:
        """KVC that a claim holds and does not share.

        Args:
            rid: a task with a claim.

        Returns:
            Tokens, now.
        """
        return self.held_by(rid) - self._shared_by(self._claims[rid])

    def base_of(self, claim: Claim) -> int:
        """What a decoding claim holds and does not share at step t, less t.

        Args:
            claim: a claim that decodes.

        Returns:
            Tokens.
        """
        return claim.held_tokens - self._shared_by(claim) - claim.since

    def pin(self, rid: str, tokens: int, key: Hashable) -> None:
        """See ``Ledger.pin``; finds out who shares the prefix."""
        super().pin(rid, tokens, key)
        if key is not None and tokens:
            prefix = self._shared.setdefault(key, _SharedPrefix(tokens))
            self._reshare(prefix, prefix.holders | {rid: None}, max(prefix.tokens, tokens))

    def close(self, rid: str) -> None:
        """See ``Ledger.close``."""
        claim = self._claims.get(rid)
        prefix = self._shared.get(claim.prefix_key) if claim is not None else None
        if prefix is not None and rid in prefix.holders:
            holders = {holder: None for holder in prefix.holders if holder != rid}
            self._reshare(prefix, holders, prefix.tokens)
            if not holders:
                del self._shared[claim.prefix_key]
        super().close(rid)

    def _index(self, rid: str, claim: Claim) -> None:
        """A claim decodes: take note of its ends and what it holds."""
        raise NotImplementedError

    def _unindex(self, rid: str, claim: Claim) -> None:
        """Undo ``_index``."""
        raise NotImplementedError

    def _reshare(self, prefix: _SharedPrefix, holders: dict[str, None], tokens: int) -> None:
        """Change who holds a prefix: with two or more it belongs to none of them."""
        changes = (len(prefix.holders) > 1) != (len(holders) > 1)
        moving = [*dict.fromkeys((*prefix.holders, *holders))] if changes else []
        for rid in moving:
            self._leave(rid, self._claims[rid])
        for sign, count, size in (
            (-1, len(prefix.holders), prefix.tokens),
            (1, len(holders), tokens),
        ):
            if count > 1:
                self._shared_tokens += sign * size
                self._copied_tokens += sign * size * (count - 1)
        prefix.holders, prefix.tokens = holders, tokens
        for rid in moving:
            self._enter(rid, self._claims[rid])

    def _shared_by(self, claim: Claim) -> int:
        if claim.prefix_key is None:
            return 0
        prefix = self._shared.get(claim.prefix_key)
        shared = prefix is not None and len(prefix.holders) > 1
        return claim.pinned_tokens if shared else 0

    def _leave(self, rid: str, claim: Claim) -> None:
        super()._leave(rid, claim)
        if claim.since is None:
            own = claim.held_tokens - self._shared_by(claim)
            self._waiting_tokens -= own + claim.waiting_promise_tokens
        else:
            self._unindex(rid, claim)

    def _enter(self, rid: str, claim: Claim) -> None:
        super()._enter(rid, claim)
        if claim.since is None:
            own = claim.held_tokens - self._shared_by(claim)
            self._waiting_tokens += own + claim.waiting_promise_tokens
        else:
            self._index(rid, claim)
