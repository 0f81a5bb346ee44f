"""The KVC ledger: who was promised how much of the KV cache, in tokens.

A token-level pool hands out interchangeable slots, so a claim is a promise about counts, not
addresses. The ledger never takes a slot; it only says whether a promise can be kept.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Claim:
    """One task's share of the KVC.

    Attributes:
        held_tokens: KVC it holds by the ledger's count; a shared prefix counts for each holder.
        promised_tokens: KVC still to come that the ledger guarantees.
    """

    held_tokens: int = 0
    promised_tokens: int = 0


class ExactLedger:
    """Exact allocation: what is used plus everything promised never exceeds the capacity.

    The first mode of the design, after the exact-allocation of EconoServe (arXiv 2411.06364): if
    no response outlives its promise, no allocation fails. What is *used* comes from the pool, so
    a prefix shared by several tasks is counted once.

    Args:
        capacity_tokens: size of the KVC, at least 1.
        reserve_tokens: kept back from admissions, left for responses that outlive their
            prediction.
    """

    def __init__(self, capacity_tokens: int, reserve_tokens: int = 0) -> None:
        if capacity_tokens < 1:
            raise ValueError(f"capacity_tokens={capacity_tokens}: a KVC holds at least 1 token")
        if not 0 <= reserve_tokens < capacity_tokens:
            raise ValueError(
                f"reserve_tokens={reserve_tokens}: give 0 or more and less than the capacity "
                f"of {capacity_tokens}"
            )
        self.capacity_tokens = capacity_tokens
        self.reserve_tokens = reserve_tokens
        self._claims: dict[str, Claim] = {}
        self._promised_tokens = 0
        self._held_tokens = 0

    def __contains__(self, rid: str) -> bool:
        return rid in self._claims

    def __len__(self) -> int:
        return len(self._claims)

    def __getitem__(self, rid: str) -> Claim:
        return self._claims[rid]

    @property
    def promised_tokens(self) -> int:
        """KVC promised and not yet taken, over all claims."""
        return self._promised_tokens

    @property
    def held_tokens(self) -> int:
        """KVC held over all claims; shared prefixes count once per holder."""
        return self._held_tokens

    def free_tokens(self, used_tokens: int) -> int:
        """KVC that is neither used nor promised, the reserve included.

        Args:
            used_tokens: KVC in use, as the pool reports it.

        Returns:
            Tokens; negative when promises exceed what is left.
        """
        return self.capacity_tokens - used_tokens - self._promised_tokens

    def admissible_tokens(self, used_tokens: int) -> int:
        """KVC that a new promise may take: what is free, less the reserve.

        Args:
            used_tokens: KVC in use, as the pool reports it.

        Returns:
            Tokens; zero or negative when nothing may be admitted.
        """
        return self.free_tokens(used_tokens) - self.reserve_tokens

    def promise(self, rid: str, tokens: int) -> None:
        """Set what a claim is still owed, opening the claim if there is none.

        Args:
            rid: request id.
            tokens: KVC still to come, 0 or more; replaces the former promise.
        """
        claim = self._claims.setdefault(rid, Claim())
        self._promised_tokens += tokens - claim.promised_tokens
        claim.promised_tokens = tokens

    def take(self, rid: str, tokens: int) -> None:
        """Move tokens from promised to held; beyond the promise they are held all the same.

        Args:
            rid: request id, with or without a claim.
            tokens: KVC taken from the pool or pinned in the prefix cache.
        """
        claim = self._claims.setdefault(rid, Claim())
        spent = min(tokens, claim.promised_tokens)
        claim.promised_tokens -= spent
        self._promised_tokens -= spent
        claim.held_tokens += tokens
        self._held_tokens += tokens

    def close(self, rid: str) -> None:
        """End a claim; what it held and was owed is free again.

        Args:
            rid: request id; without a claim nothing happens.
        """
        claim = self._claims.pop(rid, None)
        if claim is not None:
            self._promised_tokens -= claim.promised_tokens
            self._held_tokens -= claim.held_tokens
