"""Mode ``nested``: KVC pipelining as we read the abstract of EconoServe (arXiv 2411.06364).

A host that still has L tokens to come does not touch the second half of its promise for L / 2
steps, so a guest with at most L / 2 - buffer tokens to come uses it meanwhile; recursively, like
nesting dolls. When a guest is gone, the host's remaining promise can be shared again. A guest
that overstays is detached: the slots that it has become its own, and the host takes its next ones
from what is free or reserved, so nothing is ever copied. Slots are interchangeable, so all this
is arithmetic on counts.
"""

from collections.abc import Collection, Iterator
from enum import Enum
from itertools import islice

from sortedcontainers import SortedList

from econoserve.core.ledger import Claim, Ledger


class Nesting(Enum):
    """How far promises are shared; the bounds are of the mean use of a promise, at best."""

    ONE_LEVEL = "one-level"
    """A task with slots of its own takes one guest: 0.625."""
    CHAIN = "chain"
    """Guests take one guest each, too: 2/3."""
    TREE = "tree"
    """Whenever a guest is gone, the next one may come: 3/4."""


class NestedLedger(Ledger):
    """Mode ``nested``.

    Args:
        capacity_tokens: size of the KVC, at least 1.
        reserve_tokens: kept back from admissions.
        lead_tokens: see ``Ledger``.
        buffer_tokens: how much earlier than needed a guest must be gone.
        nesting: how far promises are shared.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        capacity_tokens: int,
        reserve_tokens: int = 0,
        lead_tokens: int = 8,
        buffer_tokens: int = 2,
        nesting: Nesting = Nesting.TREE,
    ) -> None:
        if buffer_tokens < 0:
            raise ValueError(f"buffer_tokens={buffer_tokens}: give 0 or more")
        super().__init__(capacity_tokens, reserve_tokens, lead_tokens)
        self.buffer_tokens = buffer_tokens
        self.nesting = nesting
        self._vacant: SortedList = SortedList()
        self._guest_tokens = 0

    def trial(self, used_tokens: int) -> "NestedTrial":
        """See ``Ledger.trial``."""
        return NestedTrial(self, used_tokens)

    def charge(self, rid: str) -> int:
        """What a claim adds to the KVC in use and promised, beyond what is used already.

        Args:
            rid: request id.

        Returns:
            What it is owed; for a guest minus what it took, as that lies in its host's promise.
        """
        claim = self._claims.get(rid)
        if claim is not None and claim.since is not None and claim.host is not None:
            return claim.hosted_since - self.step
        return self.promised_to(rid)

    def free_tokens(self, used_tokens: int) -> int:
        """KVC neither used nor promised nor reserved.

        Args:
            used_tokens: KVC in use, as the pool reports it.

        Returns:
            Tokens; negative when more is promised than is left.
        """
        charged = self.promised_tokens - self._guest_tokens
        return self.capacity_tokens - self.reserve_tokens - used_tokens - charged

    @property
    def hosted_tokens(self) -> int:
        """KVC that guests use of what was promised to others."""
        return sum(
            self.step - claim.hosted_since
            for claim in self._decoding.values()
            if claim.host is not None
        )

    def hosts(self, response_tokens: int) -> Iterator[tuple[int, int, str]]:
        """Claims that could host a response from now on, the tightest first.

        Args:
            response_tokens: its length.

        Yields:
            ``(end, number, rid)`` of each.
        """
        return self._vacant.irange((self._least_end(response_tokens), 0, ""))

    def start(self, rid: str) -> None:
        """See ``Ledger.start``; moves in with its host, if that still has room."""
        claim = self._open(rid)
        if claim.since is not None:
            return
        wanted, claim.host = claim.host, None
        super().start(rid)
        host = self._claims.get(wanted) if wanted is not None else None
        if host is None or not self._is_vacant(host):
            return
        if host.ends[0] >= self._least_end(claim.ends[0] - self.step):
            self._move_in(rid, claim, wanted, host)

    def promise(
        self,
        rid: str,
        prompt_tokens: int = 0,
        response: tuple[int, ...] = (),
        host: str | None = None,
    ) -> None:
        """See ``Ledger.promise``; a decoding claim that loses its host is detached."""
        claim = self._open(rid)
        if claim.since is not None:
            end = self.step + (response[-1] if response else 0)
            if claim.host is not None and (host is None or end > claim.until):
                self._detach(rid, claim)
            host = claim.host
            shrinks = end < claim.ends[0]
            if claim.guest is not None and shrinks:
                self._detach(claim.guest, self._claims[claim.guest])
        super().promise(rid, prompt_tokens, response, host)

    def advance(self, decoded: Collection[str]) -> None:
        """See ``Ledger.advance``; guests that overstay are detached."""
        suspects = [*self._passing.get(self.step, ())]
        if self._decoding.keys() != set(decoded):
            suspects = [rid for rid, claim in self._decoding.items() if claim.host is not None]
        super().advance(decoded)
        for rid in suspects:
            claim = self._claims[rid]
            if claim.host is not None and claim.ends[0] > claim.until:
                self._detach(rid, claim)

    def stop(self, rid: str) -> None:
        """See ``Ledger.stop``."""
        self._part(rid)
        super().stop(rid)

    def close(self, rid: str) -> None:
        """See ``Ledger.close``."""
        self._part(rid)
        super().close(rid)

    def _least_end(self, response_tokens: int) -> int:
        return self.step + 2 * (response_tokens + self.buffer_tokens)

    def _move_in(self, rid: str, claim: Claim, host_rid: str, host: Claim) -> None:
        self._leave(rid, claim)
        self._leave(host_rid, host)
        host.guest, host.has_hosted = rid, True
        claim.host, claim.hosted_since = host_rid, self.step
        claim.until = self.step + (host.ends[0] - self.step) // 2
        self._enter(host_rid, host)
        self._enter(rid, claim)

    def _detach(self, rid: str, claim: Claim) -> None:
        """A guest becomes the owner of its slots."""
        host_rid, host = claim.host, self._claims[claim.host]
        self._leave(rid, claim)
        self._leave(host_rid, host)
        claim.host = host.guest = None
        self._enter(host_rid, host)
        self._enter(rid, claim)

    def _part(self, rid: str) -> None:
        """A claim goes: its guest moves up to its host, or becomes an owner."""
        claim = self._claims.get(rid)
        if claim is None or claim.since is None:
            return
        guest_rid, host_rid = claim.guest, claim.host
        guest = self._claims[guest_rid] if guest_rid is not None else None
        if guest is not None:
            self._detach(guest_rid, guest)
        if host_rid is not None:
            until = claim.until
            self._detach(rid, claim)
            if guest is not None:
                self._leave(guest_rid, guest)
                self._leave(host_rid, host := self._claims[host_rid])
                guest.host, guest.until, host.guest = host_rid, until, guest_rid
                self._enter(host_rid, host)
                self._enter(guest_rid, guest)

    def _is_vacant(self, claim: Claim) -> bool:
        if claim.since is None or claim.guest is not None:
            return False
        if self.nesting is Nesting.TREE:
            return True
        fresh = not claim.has_hosted
        return fresh and (self.nesting is Nesting.CHAIN or claim.host is None)

    def _leave(self, rid: str, claim: Claim) -> None:
        super()._leave(rid, claim)
        if claim.since is None:
            return
        if self._is_vacant(claim):
            self._vacant.discard((claim.ends[0], claim.number, rid))
        if claim.host is not None:
            self._guest_tokens -= claim.ends[0] - claim.hosted_since

    def _enter(self, rid: str, claim: Claim) -> None:
        super()._enter(rid, claim)
        if claim.since is None:
            return
        if self._is_vacant(claim):
            self._vacant.add((claim.ends[0], claim.number, rid))
        if claim.host is not None:
            self._guest_tokens += claim.ends[0] - claim.hosted_since


class NestedTrial:
    """See ``Trial``; free KVC is one number, and hosts with room are taken tightest first.

    Args:
        ledger: the claims.
        used_tokens: KVC in use.

    Attributes:
        headroom_tokens: KVC neither used nor promised nor reserved.
    """

    def __init__(self, ledger: NestedLedger, used_tokens: int) -> None:
        self.headroom_tokens = ledger.free_tokens(used_tokens)
        self._ledger = ledger
        self._charges: dict[str, int] = {}
        self._taken: dict[str, None] = {}

    def fits(self, tokens: int, response: tuple[int, ...]) -> bool:
        """See ``Trial.fits``."""
        length = response[-1] if response else 0
        if tokens + length <= self.headroom_tokens:
            return True
        return tokens <= self.headroom_tokens and self._host(length + 1) is not None

    def take(self, rid: str, tokens: int, response: tuple[int, ...]) -> str | None:
        """See ``Trial.take``."""
        self.headroom_tokens -= tokens
        length = response[-1] if response else 0
        host = self._host(length + 1) if response else None
        return self._place(rid, host, length)

    def count(self, response: tuple[int, ...], most: int) -> int:
        """See ``Trial.count``."""
        if self.headroom_tokens < 0:
            return 0
        owners = self.headroom_tokens // max(response[-1], 1)
        if owners >= most:
            return most
        hosts = (rid for _, _, rid in self._ledger.hosts(response[-1]) if rid not in self._taken)
        return owners + sum(1 for _ in islice(hosts, most - owners))

    def start(self, rid: str, response: tuple[int, ...]) -> str | None:
        """See ``Trial.start``."""
        return self._place(rid, self._host(response[-1]), response[-1])

    def extend(self, rid: str, response: tuple[int, ...]) -> str | None:
        """See ``Trial.extend``; a guest stays one while it will be gone in time."""
        claim = self._ledger[rid]
        shrinks = self._ledger.step + response[-1] < claim.ends[-1]
        if claim.guest is not None and shrinks:
            self._charge(claim.guest, self._ledger.promised_to(claim.guest))
        if shrinks:
            self._taken[rid] = None
        if claim.host is not None and self._ledger.step + response[-1] <= claim.until:
            return claim.host
        return self._place(rid, None, response[-1])

    def release(self, rid: str) -> None:
        """See ``Trial.release``; its guest becomes an owner unless its own host takes it over."""
        claim = self._ledger[rid]
        self._charge(rid, 0)
        self._taken[rid] = None
        self.headroom_tokens += self._ledger.held_by(rid) - claim.pinned_tokens
        if claim.guest is not None and claim.host is None:
            self._charge(claim.guest, self._ledger.promised_to(claim.guest))

    def _place(self, rid: str, host: str | None, length: int) -> str | None:
        self._charge(rid, 0 if host is not None else length)
        if host is not None:
            self._taken[host] = None
        return host

    def _host(self, length: int) -> str | None:
        """The tightest vacant host for a response that is to fit."""
        for _, _, rid in self._ledger.hosts(length):
            if rid not in self._taken:
                return rid
        return None

    def _charge(self, rid: str, tokens: int) -> None:
        standing = self._charges.get(rid)
        if standing is None:
            standing = self._ledger.charge(rid)
        self.headroom_tokens -= tokens - standing
        self._charges[rid] = tokens
