"""Who gave how much to an experience that several users share.

Owns the bound on what one user can do to the others: of what they share, nobody gives much more
than the others do on average, and experience that is only others' is believed as far as many
of them agree.
"""

SLOTS = 64
"""Users told apart in one experience, by the lowest bits of their fingerprints: a power of two."""

SHARE = 1 / 16
"""How far a single other user is believed where one has given nothing oneself."""

LOWEST = SLOTS - 1

FAIR = 1.5
"""Nobody gives more than so many times what the others gave on average."""

ALONE = 64.0
"""Weight that a user who was alone keeps when a second one comes."""

MEMORY = 2000.0
"""Weight at which all is halved, so that who no longer comes is forgotten."""


class Shares:
    """The weight that each user has in one experience.

    Args:
        user: the first who gives.
        given: what that one gave.
    """

    __slots__ = ("_given", "_total")

    def __init__(self, user: int, given: float) -> None:
        self._given = {user & LOWEST: given}
        self._total = given

    def weight(self, user: int) -> float:
        """How much the next observation of a user counts; it is noted as given.

        Args:
            user: who gives it.

        Returns:
            From 0 to 1.
        """
        weight = self.voice(user)
        slot, given = user & LOWEST, self._given
        given[slot] = given.get(slot, 0.0) + weight
        self._total += weight
        if self._total > MEMORY:
            self._given = {slot: mass / 2 for slot, mass in given.items() if mass > 0.25}
            self._total = sum(self._given.values())
        return weight

    def voice(self, user: int) -> float:
        """How much an observation of a user would count now.

        Args:
            user: who would give it.

        Returns:
            From 0 to 1: less, the more this one gave compared with the others' mean.
        """
        mine = self._given.get(user & LOWEST)
        others = len(self._given) - 1
        if not mine or not others:
            return 1.0
        room = FAIR * (self._total - mine) / others + 1.0 - mine
        if room >= 1.0:
            return 1.0
        return room if room > 0.0 else 0.0

    def trust(self, user: int) -> float:
        """How far this experience may be believed for a user.

        Args:
            user: for whom something is predicted.

        Returns:
            1 for who gave to it; for others less, the more of it is one user's.
        """
        if user & LOWEST in self._given:
            return 1.0
        return min(1.0, SHARE * self._total / max(self._given.values()))

    def items(self) -> list[tuple[int, float]]:
        """What was given, by slot.

        Returns:
            Pairs, in the order in which they came.
        """
        return list(self._given.items())

    @classmethod
    def of(cls, items: list[tuple[int, float]]) -> "Shares":
        """Shares as they were.

        Args:
            items: from ``items``, at least one.

        Returns:
            The shares.
        """
        shares = cls(*items[0])
        shares._given = dict(items)
        shares._total = sum(shares._given.values())
        return shares
