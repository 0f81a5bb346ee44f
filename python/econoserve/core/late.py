"""Prompts that can keep their SLO no more, found without looking at the others."""

from enum import Enum

from sortedcontainers import SortedList

from econoserve.core.books import Books, TaskState
from econoserve.core.draft import Draft
from econoserve.core.order import Ordering

BATCH = 64
"""Late prompts handled in one plan; bounds its cost."""


class Late(Enum):
    """What becomes of a waiting prompt that cannot keep its SLO any more."""

    SERVE = "serve"
    """It keeps its place."""
    DEMOTE = "demote"
    """It goes on as best effort, behind those that can keep theirs, and ages there."""
    REJECT = "reject"
    """It is refused."""


class LateWatch:
    """Waiting prompts by the time at which their SLO is lost.

    Args:
        late: what becomes of them then.
        books: the live tasks.
        ordering: knows their latest start.
    """

    def __init__(self, late: Late, books: Books, ordering: Ordering) -> None:
        self._late = late
        self._books = books
        self._ordering = ordering
        self._entries: dict[str, tuple[float, int, str]] = {}
        self._sorted: SortedList = SortedList()

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, state: TaskState) -> None:
        """Watch a prompt, if it has an SLO.

        Args:
            state: a task in the PT queue.
        """
        started = state.task.generated_tokens > 0
        if self._late is Late.SERVE or started or not self._ordering.has_slo(state):
            return
        latest_s = self._ordering.latest_start_s(state, generating=False)
        entry = self._entries[state.task.rid] = (latest_s, state.number, state.task.rid)
        self._sorted.add(entry)

    def discard(self, rid: str) -> None:
        """Watch a prompt no more.

        Args:
            rid: request id; unknown ids are ignored.
        """
        entry = self._entries.pop(rid, None)
        if entry is not None:
            self._sorted.remove(entry)

    def handle(self, draft: Draft, now_s: float) -> None:
        """Demote or refuse the prompts that are late by now.

        Args:
            draft: the plan so far.
            now_s: the time.
        """
        for latest_s, _, rid in self._sorted.islice(0, BATCH):
            if latest_s >= now_s:
                return
            state = self._books[rid]
            if self._late is Late.DEMOTE:
                draft.demote(state)
            else:
                late_ms = (now_s - latest_s) * 1e3
                draft.reject(
                    state,
                    f"the SLO cannot be met any more: this request should have started "
                    f"{late_ms:.0f} ms ago. Send it later, give it a looser SLO, or let the "
                    "server demote late requests",
                )
