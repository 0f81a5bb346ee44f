"""What every mode of the KVC ledger answers while a plan is made."""

from typing import Protocol


class Trial(Protocol):
    """The ledger as it would be after the decisions of one plan; the ledger does not change.

    ``tokens`` is KVC that a task takes soon and keeps; ``response`` are equally likely lengths
    that it then decodes, one token a step, empty if it is promised no response.
    """

    @property
    def headroom_tokens(self) -> int:
        """KVC that a task without a response could be promised."""

    def fits(self, tokens: int, response: tuple[int, ...]) -> bool:
        """Whether a new claim can be admitted that decodes from the next step on."""

    def take(self, rid: str, tokens: int, response: tuple[int, ...]) -> str | None:
        """Admit a new claim, checked or not; returns its host, if it has one."""

    def count(self, response: tuple[int, ...], most: int) -> int:
        """How many held claims may start such a response now, counted up to ``most``."""

    def start(self, rid: str, response: tuple[int, ...]) -> str | None:
        """Let a held claim decode from this step on; returns its host, if it has one."""

    def extend(self, rid: str, response: tuple[int, ...]) -> str | None:
        """Replace what a decoding claim was promised, checked or not; returns its host."""

    def release(self, rid: str) -> None:
        """End a claim."""
