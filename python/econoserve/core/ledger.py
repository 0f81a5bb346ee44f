"""The KVC ledger: who holds how much of the KV cache and who was promised more, in tokens.

A token-level pool hands out interchangeable slots, so a claim is a promise about counts over
time, not about addresses. The ledger never takes a slot; a *trial* of it says whether a further
promise can be kept. This module owns the claims, which are the same in every mode; each mode has a
module of its own.

Time in the ledger is counted in decode steps: every decoding claim grows by one token a step, so
in absolute steps a claim's future does not change while it decodes, and a step costs nothing.
"""

from collections.abc import Collection, Hashable
from dataclasses import dataclass

from econoserve.core.trial import Trial


@dataclass(slots=True, eq=False)
class Claim:
    """One task's share of the KVC.

    Attributes:
        number: order of opening; breaks ties.
        held_tokens: KVC it holds, as of step ``since`` if it decodes; a shared prefix counts for
            each holder.
        pinned_tokens: those of them that came from the prefix cache.
        prefix_key: names that prefix; see ``CachedPrefix.key``.
        prompt_tokens: promised for the rest of its prompt.
        response: while it does not decode, what was promised for its response: equally likely
            remaining lengths, ascending.
        since: the step at which it began to decode; ``None`` while it does not.
        ends: while it decodes, the steps at which its response may end: equally likely,
            ascending, the last of them not passed.
        review: the step at which its response should be predicted anew.
        slot: row in a mode's own index of the claims that decode.
        host: the task whose promise it uses (this and the rest: mode ``nested``).
        guest: the task that uses its promise.
        has_hosted: whether it ever had a guest.
        until: the step by which its host needs the slots itself.
        hosted_since: the step at which it became a guest.
    """

    number: int
    held_tokens: int = 0
    pinned_tokens: int = 0
    prefix_key: Hashable = None
    prompt_tokens: int = 0
    response: tuple[int, ...] = ()
    since: int | None = None
    ends: tuple[int, ...] = ()
    review: int = -1
    slot: int = -1
    host: str | None = None
    guest: str | None = None
    has_hosted: bool = False
    until: int = 0
    hosted_since: int = 0

    @property
    def waiting_promise_tokens(self) -> int:
        """KVC promised to a claim that does not decode."""
        return self.prompt_tokens + (self.response[-1] if self.response else 0)


@dataclass(slots=True)
class _Totals:
    """Sums over the claims; those that decode are relative to step 0."""

    held: int = 0
    promised: int = 0
    decoding: int = 0
    decoding_held: int = 0
    decoding_ends: int = 0


class Ledger:
    """The claims and the decode clock; subclasses say what may be admitted.

    Args:
        capacity_tokens: size of the KVC, at least 1.
        reserve_tokens: kept back from admissions, left for responses that outlive their
            prediction.
        lead_tokens: a response is predicted anew so many steps before its promise ends.

    Raises:
        ValueError: a size is impossible; names it and the fix.
    """

    points = 1
    """Outcomes of a response length that a promise in this mode is made of."""

    def __init__(self, capacity_tokens: int, reserve_tokens: int = 0, lead_tokens: int = 8) -> None:
        if capacity_tokens < 1:
            raise ValueError(f"capacity_tokens={capacity_tokens}: a KVC holds at least 1 token")
        if not 0 <= reserve_tokens < capacity_tokens:
            raise ValueError(
                f"reserve_tokens={reserve_tokens}: give 0 or more and less than the capacity "
                f"of {capacity_tokens}"
            )
        if lead_tokens < 0:
            raise ValueError(f"lead_tokens={lead_tokens}: give 0 or more")
        self.capacity_tokens = capacity_tokens
        self.reserve_tokens = reserve_tokens
        self.lead_tokens = lead_tokens
        self.step = 0
        self._claims: dict[str, Claim] = {}
        self._decoding: dict[str, Claim] = {}
        self._passing: dict[int, dict[str, None]] = {}
        self._reviews: dict[int, dict[str, None]] = {}
        self._totals = _Totals()
        self._opened = 0

    def __contains__(self, rid: str) -> bool:
        return rid in self._claims

    def __len__(self) -> int:
        return len(self._claims)

    def __getitem__(self, rid: str) -> Claim:
        return self._claims[rid]

    @property
    def held_tokens(self) -> int:
        """KVC held over all claims; shared prefixes count once per holder."""
        return self._totals.held + self.decoding_tokens

    @property
    def promised_tokens(self) -> int:
        """KVC promised and not yet taken, over all claims, by their latest outcome."""
        totals = self._totals
        return totals.promised + totals.decoding_ends - totals.decoding * self.step

    @property
    def waiting_tokens(self) -> int:
        """KVC of claims that do not decode (parked and unfinished prompts), promises included."""
        return self._totals.held + self._totals.promised

    @property
    def decoding_tokens(self) -> int:
        """KVC that decoding claims hold."""
        return self._totals.decoding_held + self._totals.decoding * self.step

    def steps_of(self, rid: str) -> int:
        """Steps that a task has decoded since it began to.

        Args:
            rid: request id.

        Returns:
            Steps; 0 unless it decodes.
        """
        claim = self._decoding.get(rid)
        return 0 if claim is None else self.step - claim.since

    def held_by(self, rid: str) -> int:
        """KVC that a task holds.

        Args:
            rid: request id.

        Returns:
            Tokens; 0 without a claim.
        """
        claim = self._claims.get(rid)
        return 0 if claim is None else claim.held_tokens + self.steps_of(rid)

    def promised_to(self, rid: str) -> int:
        """KVC that a task is still owed, by its latest outcome.

        Args:
            rid: request id.

        Returns:
            Tokens; 0 without a claim.
        """
        claim = self._claims.get(rid)
        if claim is None:
            return 0
        return claim.ends[-1] - self.step if claim.ends else claim.waiting_promise_tokens

    def due(self) -> list[str]:
        """Decoding claims whose response should be predicted anew.

        Returns:
            Request ids in the order in which they became due: those whose promise ends within
            the lead, once, and those that have outlived theirs.
        """
        due = dict(self._reviews.get(self.step, ()))
        due.update(self._passing.get(self.step, ()))
        return list(due)

    def promise(
        self,
        rid: str,
        prompt_tokens: int = 0,
        response: tuple[int, ...] = (),
        host: str | None = None,
    ) -> None:
        """Replace what a claim is owed, opening the claim if there is none.

        Args:
            rid: request id.
            prompt_tokens: for the rest of its prompt, 0 or more.
            response: equally likely remaining lengths, ascending; may be empty unless it decodes.
            host: the task whose promise it uses from its start on.
        """
        claim = self._open(rid)
        self._leave(rid, claim)
        claim.prompt_tokens, claim.host = prompt_tokens, host
        if claim.since is None:
            claim.response = response
        else:
            claim.ends = self._ends(response)
            claim.review = self._review(claim)
        self._enter(rid, claim)

    def pin(self, rid: str, tokens: int, key: Hashable) -> None:
        """Count a prefix that lies in the cache as held by a task.

        Args:
            rid: request id, with or without a claim.
            tokens: its length.
            key: names the prefix; see ``CachedPrefix.key``.
        """
        claim = self._open(rid)
        self._leave(rid, claim)
        claim.held_tokens += tokens
        claim.pinned_tokens, claim.prefix_key = tokens, key
        self._enter(rid, claim)

    def take(self, rid: str, tokens: int) -> None:
        """Move prompt tokens from promised to held; beyond the promise they are held all the same.

        Args:
            rid: request id, with or without a claim.
            tokens: KVC taken from the pool.
        """
        claim = self._open(rid)
        self._leave(rid, claim)
        claim.held_tokens += tokens
        claim.prompt_tokens = max(claim.prompt_tokens - tokens, 0)
        self._enter(rid, claim)

    def start(self, rid: str) -> None:
        """A task decodes from this step on; what it was promised ends accordingly.

        Args:
            rid: request id; one that decodes already goes on.
        """
        claim = self._open(rid)
        if claim.since is not None:
            return
        self._leave(rid, claim)
        claim.since = self.step
        claim.ends = self._ends(claim.response)
        claim.review = max(self._review(claim), self.step + 1)
        claim.prompt_tokens, claim.response = 0, ()
        self._enter(rid, claim)

    def stop(self, rid: str) -> None:
        """A task decodes no more and keeps what it holds; it is promised nothing.

        Args:
            rid: request id, with or without a claim.
        """
        claim = self._claims.get(rid)
        if claim is not None and claim.since is not None:
            self._leave(rid, claim)
            claim.held_tokens += self.step - claim.since
            claim.since, claim.ends, claim.host = None, (), None
            self._enter(rid, claim)

    def advance(self, decoded: Collection[str]) -> None:
        """One decode step: each of these tasks took a token; the others stay as they are.

        Args:
            decoded: request ids; those without a decoding claim are ignored.
        """
        if self._decoding.keys() != (took := set(decoded)):
            for rid in [rid for rid in self._decoding if rid not in took]:
                self._delay(rid)
        passed = self._passing.get(self.step, {})
        outlived = [(rid, self._claims[rid]) for rid in passed if rid in took]
        for rid, claim in outlived:
            self._leave(rid, claim)
        self._reviews.pop(self.step, None)
        self.step += 1
        for rid, claim in outlived:
            claim.ends = (self.step,)
            self._enter(rid, claim)

    def close(self, rid: str) -> None:
        """End a claim; what it held and was owed is free again.

        Args:
            rid: request id; without a claim nothing happens.
        """
        claim = self._claims.get(rid)
        if claim is not None:
            self._leave(rid, claim)
            del self._claims[rid]

    def trial(self, used_tokens: int) -> Trial:
        """Begin to plan; no claim changes, but a mode may work out again what it keeps of them.

        Args:
            used_tokens: KVC in use, as the pool reports it: shared prefixes once.

        Returns:
            A trial of this mode.
        """
        raise NotImplementedError

    def _ends(self, response: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.step + max(tokens, 0) for tokens in response) or (self.step,)

    def _review(self, claim: Claim) -> int:
        """When to predict its response anew: ahead of its promise, or after most outcomes."""
        return claim.ends[len(claim.ends) * 3 // 4] - self.lead_tokens

    def _open(self, rid: str) -> Claim:
        claim = self._claims.get(rid)
        if claim is None:
            self._opened += 1
            claim = self._claims[rid] = Claim(self._opened)
            self._enter(rid, claim)
        return claim

    def _delay(self, rid: str) -> None:
        """A decoding claim sits this step out: everything about it is one step later."""
        claim = self._claims[rid]
        self._leave(rid, claim)
        claim.since += 1
        claim.ends = tuple(end + 1 for end in claim.ends)
        claim.review += 1
        claim.hosted_since += 1
        self._enter(rid, claim)

    def _leave(self, rid: str, claim: Claim) -> None:
        """Take a claim out of the sums and indices, before it changes."""
        totals = self._totals
        if claim.since is None:
            totals.held -= claim.held_tokens
            totals.promised -= claim.waiting_promise_tokens
            return
        totals.decoding -= 1
        totals.decoding_held -= claim.held_tokens - claim.since
        totals.decoding_ends -= claim.ends[-1]
        del self._decoding[rid]
        _discard(self._passing, claim.ends[-1], rid)
        _discard(self._reviews, claim.review, rid)

    def _enter(self, rid: str, claim: Claim) -> None:
        """Put a claim into the sums and indices, after it changed."""
        totals = self._totals
        if claim.since is None:
            totals.held += claim.held_tokens
            totals.promised += claim.waiting_promise_tokens
            return
        totals.decoding += 1
        totals.decoding_held += claim.held_tokens - claim.since
        totals.decoding_ends += claim.ends[-1]
        self._decoding[rid] = claim
        self._passing.setdefault(claim.ends[-1], {})[rid] = None
        if claim.review >= self.step:
            self._reviews.setdefault(claim.review, {})[rid] = None


def _discard(index: dict[int, dict[str, None]], step: int, rid: str) -> None:
    rids = index.get(step)
    if rids is not None:
        rids.pop(rid, None)
        if not rids:
            del index[step]
