"""How long the scheduler's own work takes, for reports; nothing that decides may look at it."""

import time


class Stopwatch:
    """Adds up the time of parts, each in a ``with``; parts must not lie within each other.

    Attributes:
        total_s: so far.
    """

    __slots__ = ("_began_s", "total_s")

    def __init__(self) -> None:
        self.total_s = self._began_s = 0.0

    def __enter__(self) -> None:
        self._began_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.total_s += time.perf_counter() - self._began_s
