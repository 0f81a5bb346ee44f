"""A queue of tasks in groups: what is alike waits, and is admitted, together.

Owns the order. Keys are static while a task waits, so that every change costs the logarithm of
the queue's length and nothing is ever sorted again.
"""

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

from sortedcontainers import SortedDict, SortedKeyList


class Place(NamedTuple):
    """Where a task waits.

    Attributes:
        group: key of its group, smallest first; groups of one queue compare with each other.
        rank: order within the group, smallest first.
        number: breaks ties.
    """

    group: tuple[Any, ...]
    rank: float
    number: int


class GroupedQueue:
    """Tasks in groups; iterates over the tasks in order.

    Args:
        place: where a task belongs; asked once, when it is added. The tasks remember it in
            their attribute ``place``.
    """

    def __init__(self, place: Callable[[Any], Place]) -> None:
        self._place = place
        self._groups: SortedDict = SortedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Any]:
        for group in self._groups.values():
            yield from group

    def __reversed__(self) -> Iterator[Any]:
        for group in reversed(self._groups.values()):
            yield from reversed(group)

    def add(self, state: Any) -> None:
        """Let a task wait.

        Args:
            state: the task; must not wait here already.
        """
        state.place = self._place(state)
        group = self._groups.get(state.place.group)
        if group is None:
            group = self._groups[state.place.group] = SortedKeyList(key=attrgetter("place"))
        group.add(state)
        self._size += 1

    def remove(self, state: Any) -> None:
        """Let a task wait no more.

        Args:
            state: a task that waits here.
        """
        group = self._groups[state.place.group]
        group.remove(state)
        self._size -= 1
        if not group:
            del self._groups[state.place.group]

    def groups(self) -> Iterator[tuple[tuple[Any, ...], SortedKeyList]]:
        """The groups in order.

        Yields:
            Key, and the tasks in order.
        """
        yield from self._groups.items()

    def level(self, prefix: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """The keys of the groups that start alike.

        Args:
            prefix: the first parts of a key; the rest must be numbers.

        Returns:
            Keys in order.
        """
        low, high = (*prefix, float("-inf")), (*prefix, float("inf"))
        return list(self._groups.irange(low, high))

    def after(self, prefix: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The first group beyond those that start alike.

        Args:
            prefix: the first parts of a key; empty for the first group of all.

        Returns:
            Its key, or ``None``.
        """
        if not self._size:
            return None
        low = (*prefix, float("inf")) if prefix else None
        return next(self._groups.irange(low), None)

    def __getitem__(self, key: tuple[Any, ...]) -> SortedKeyList:
        return self._groups[key]


def from_rank(group: SortedKeyList, rank: Callable[[], float]) -> Iterator[Any]:
    """Members of a group in order, without those before a bound that may rise meanwhile.

    Args:
        group: tasks in order.
        rank: the least rank that is of use now; asked before each step.

    Yields:
        Tasks.
    """
    index, key = 0, group[0].place.group
    while index < len(group):
        state, least = group[index], rank()
        if state.place.rank < least:
            index = group.bisect_key_left((key, least))
        else:
            yield state
            index += 1
