"""The modes of the KVC ledger, by name, and the ledger's constants."""

from dataclasses import dataclass
from enum import Enum

from econoserve.core.checks import check_least, check_share, choice_of
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

    ``mode`` and ``nesting`` may be given by value, too: ``KvcConfig(mode="skyline")``.

    Attributes:
        mode: what it admits. A variant by name (``make_policy``) sets it, whatever is given here.
        reserve_fraction: share of the KVC kept for responses that outlive their prediction, in
            every mode; in [0, 1).
        lead_tokens: a response is predicted anew so many tokens before its promise ends, 0 or
            more; in every mode but ``risk``, which predicts anew once most outcomes are over.
        buffer_tokens: how much earlier than needed a guest must be gone, 0 or more; ``nested``
            only.
        nesting: how far promises are shared; ``nested`` only.
        risk: probability of finding the KVC full that an admission may cause, in (0, 1);
            ``risk`` only.
        points: equally likely lengths that stand for a distribution, at least 2; ``risk`` only.

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
        object.__setattr__(self, "mode", choice_of("mode", self.mode, KvcMode))
        object.__setattr__(self, "nesting", choice_of("nesting", self.nesting, Nesting))
        check_share("reserve_fraction", self.reserve_fraction)
        check_least(self, lead_tokens=0, buffer_tokens=0, points=2)
        if not 0.0 < self.risk < 1.0:
            raise ValueError(f"risk={self.risk}: give a probability between 0 and 1")

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
