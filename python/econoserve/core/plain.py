"""A ledger without promises, for policies that take KVC as they go."""

from econoserve.core.exact import ExactLedger

NEVER = 1 << 62


class PlainLedger(ExactLedger):
    """Counts what is held; nothing is ever promised, predicted anew or due."""

    @property
    def promised_tokens(self) -> int:
        """Always 0."""
        return 0

    def promised_to(self, rid: str) -> int:
        """Always 0.

        Args:
            rid: request id.

        Returns:
            0.
        """
        return 0

    def _ends(self, response: tuple[int, ...]) -> tuple[int, ...]:
        return (NEVER,)
