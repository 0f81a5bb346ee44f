"""The books: where every live task stands and what KVC it holds, as the launches say.

Owns the PT and GT queues and keeps the ledger's claims in step. It must never decide: a policy
reads it in ``plan`` and lets it record in ``on_launch``, ``on_tokens`` and ``remove``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sortedcontainers import SortedKeyList

from econoserve.core.ledger import ExactLedger
from econoserve.core.types import Launch, NeverFits, Prefilled, Task


class Phase(Enum):
    """Where a task stands."""

    WAITING = "waiting"
    """In the PT queue; holds no KVC."""
    PREFILLING = "prefilling"
    """Its prompt is partly in the KVC."""
    READY = "ready"
    """In the GT queue: its prompt is in the KVC, it does not run."""
    RUNNING = "running"
    """Decodes one token per iteration."""


@dataclass(slots=True, eq=False)
class TaskState:
    """A task and how far it is.

    Attributes:
        task: the request as it arrived.
        number: arrival order; breaks every tie.
        phase: where it stands.
        prefilled_tokens: prompt tokens in the KVC.
        cached_tokens: those of them that came from the prefix cache.
        decode_steps: decode iterations launched since its prompt was done.
        generated_tokens: output tokens known to exist, those before a recompute included.
    """

    task: Task
    number: int
    phase: Phase = Phase.WAITING
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    decode_steps: int = 0
    generated_tokens: int = 0
    queue_key: Any = None

    @property
    def prompt_left_tokens(self) -> int:
        """Prompt tokens that still need a forward pass."""
        return self.task.prompt_tokens - self.prefilled_tokens

    @property
    def response_left_tokens(self) -> int:
        """KVC its predicted response still needs.

        The last token of a response is never stored, but with overlap scheduling one more
        decode may be in flight when it ends, so a response takes as many tokens as it has.
        """
        predicted = self.task.prediction.given(self.generated_tokens)
        return max(predicted - self.task.generated_tokens - self.decode_steps, 0)


QueueKey = Callable[[TaskState], Any]


def _queue_key(state: TaskState) -> Any:
    return state.queue_key


class Books:
    """All live tasks by phase, with their claims.

    Args:
        ledger: receives every claim.
        pt_key: order of the PT queue, smallest first; static while a task waits there.
        gt_key: order of the GT queue, likewise.
    """

    def __init__(self, ledger: ExactLedger, pt_key: QueueKey, gt_key: QueueKey) -> None:
        self.ledger = ledger
        self.waiting: SortedKeyList = SortedKeyList(key=_queue_key)
        self.ready: SortedKeyList = SortedKeyList(key=_queue_key)
        self.prefilling: dict[str, TaskState] = {}
        self.running: dict[str, TaskState] = {}
        self._tasks: dict[str, TaskState] = {}
        self._arrivals = 0
        self._pt_key = pt_key
        self._gt_key = gt_key

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, rid: str) -> bool:
        return rid in self._tasks

    def __getitem__(self, rid: str) -> TaskState:
        return self._tasks[rid]

    def has_started(self, rid: str) -> bool:
        """Whether some of a task's prompt is in the KVC.

        Args:
            rid: id of a live task.

        Returns:
            ``False`` while it is in the PT queue.
        """
        return self._tasks[rid].phase is not Phase.WAITING

    def add(self, task: Task) -> TaskState:
        """Put a task into the PT queue.

        Args:
            task: the request.

        Returns:
            Its state.

        Raises:
            NeverFits: its prompt and one output token exceed the KVC.
            ValueError: its ``rid`` is known.
        """
        if task.rid in self._tasks:
            raise ValueError(f"rid={task.rid!r} is being served already: give each request its own")
        if task.prompt_tokens + 1 > self.ledger.capacity_tokens:
            raise NeverFits.of(task.prompt_tokens, self.ledger.capacity_tokens)
        self._arrivals += 1
        state = TaskState(task, self._arrivals, generated_tokens=task.generated_tokens)
        self._tasks[task.rid] = state
        state.queue_key = self._pt_key(state)
        self.waiting.add(state)
        return state

    def on_launch(self, launch: Launch) -> None:
        """Record what started; ids that are gone are ignored.

        Args:
            launch: the iteration as launched.
        """
        for rid in launch.parked:
            self._park(rid)
        for rid in launch.resumed:
            state = self._tasks.get(rid)
            if state is not None and state.phase is Phase.READY:
                self._leave(state)
                state.phase = Phase.RUNNING
                self.running[rid] = state
        for part in launch.prefilled:
            self._prefilled(part)
        for rid in launch.decoded:
            state = self._tasks.get(rid)
            if state is not None:
                state.decode_steps += 1
                self.ledger.take(rid, 1)

    def on_tokens(self, rid: str, tokens: int) -> None:
        """Count output tokens that came back.

        Args:
            rid: request id; unknown ids are ignored.
            tokens: how many.
        """
        state = self._tasks.get(rid)
        if state is not None:
            state.generated_tokens += tokens

    def remove(self, rid: str) -> None:
        """Forget a task and end its claim; unknown ids are ignored.

        Args:
            rid: request id.
        """
        state = self._tasks.pop(rid, None)
        if state is not None:
            self._leave(state)
            self.ledger.close(rid)

    def _park(self, rid: str) -> None:
        state = self._tasks.get(rid)
        if state is None or state.phase is not Phase.RUNNING:
            return
        self._leave(state)
        self.ledger.promise(rid, 0)
        self._enter_ready(state)

    def _prefilled(self, part: Prefilled) -> None:
        state = self._tasks.get(part.rid)
        if state is None:
            return
        if state.phase is Phase.WAITING:
            self._leave(state)
            state.phase = Phase.PREFILLING
            self.prefilling[part.rid] = state
            state.cached_tokens = part.cached_tokens
            state.prefilled_tokens = part.cached_tokens
            self.ledger.take(part.rid, part.cached_tokens)
        state.prefilled_tokens += part.tokens
        self.ledger.take(part.rid, part.tokens)
        if part.done:
            self._leave(state)
            self._enter_ready(state)

    def _enter_ready(self, state: TaskState) -> None:
        state.phase = Phase.READY
        state.queue_key = self._gt_key(state)
        self.ready.add(state)

    def _leave(self, state: TaskState) -> None:
        if state.phase is Phase.WAITING:
            self.waiting.remove(state)
        elif state.phase is Phase.READY:
            self.ready.remove(state)
        elif state.phase is Phase.PREFILLING:
            del self.prefilling[state.task.rid]
        else:
            del self.running[state.task.rid]
