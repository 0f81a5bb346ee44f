"""The modes of the KVC ledger, by name."""

from dataclasses import dataclass
from enum import Enum

from econoserve.core.exact import ExactLedger
from econoserve.core.ledger import Ledger
from econoserve.core.nested import NestedLedger, Nesting
from econoserve.core.risk import RiskLedger
from econoserve.core.skyline import SkylineLedger


class KvcMode(Enum):
    """What the ledger admits."""

    EXACT = "exact"
    """Everything promised fits at once."""
    NESTED = "nested"
    """Guests use the half of a promise that its owner does not touch yet."""
    SKYLINE = "skyline"
    """The occupancy that follows from all promises never exceeds the KVC.

    It admits all that ``exact`` and ``nested`` admit.
    """
    RISK = "risk"
    """The same of the occupancy's distribution, up to a risk."""


@dataclass(frozen=True, slots=True)
class KvcConfig:
    """The ledger's constants; ours, not the paper's.

    Attributes:
        mode: what it admits.
        reserve_fraction: share of the KVC kept for responses that outlive their prediction.
        lead_tokens: a response is predicted anew so many tokens before its promise ends.
        buffer_tokens: how much earlier than needed a guest must be gone (``nested``).
        nesting: how far promises are shared (``nested``).
        risk: probability of finding the KVC full that an admission may cause (``risk``).
        points: equally likely lengths that stand for a distribution (``risk``).

    Raises:
        ValueError: a value is out of range.
    """

    mode: KvcMode = KvcMode.RISK
    reserve_fraction: float = 0.02
    lead_tokens: int = 8
    buffer_tokens: int = 2
    nesting: Nesting = Nesting.TREE
    risk: float = 0.1
    points: int = 8

    def __post_init__(self) -> None:
        if not 0.0 <= self.reserve_fraction < 1.0:
            raise ValueError(f"reserve_fraction={self.reserve_fraction}: give 0 or more, below 1")

    def ledger(self, capacity_tokens: int) -> Ledger:
        """A ledger of this mode.

        Args:
            capacity_tokens: size of the KVC.

        Returns:
            The empty ledger.
        """
        sizes = (capacity_tokens, int(capacity_tokens * self.reserve_fraction))
        if self.mode is KvcMode.EXACT:
            return ExactLedger(*sizes, self.lead_tokens)
        if self.mode is KvcMode.NESTED:
            return NestedLedger(*sizes, self.lead_tokens, self.buffer_tokens, self.nesting)
        if self.mode is KvcMode.SKYLINE:
            return SkylineLedger(*sizes, self.lead_tokens)
        # A response is predicted anew when it has outlived most outcomes; no need to be earlier.
        return RiskLedger(*sizes, 0, self.risk, self.points)
