"""The books: where every live task stands and what KVC it holds, as the launches say.

Owns the PT and GT queues and keeps the ledger's claims in step. It must never decide: a policy
reads it in ``plan`` and lets it record in ``on_launch``, ``on_tokens`` and ``remove``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from sortedcontainers import SortedList

from econoserve.core.ledger import Ledger
from econoserve.core.queues import GroupedQueue, Place
from econoserve.core.types import Launch, NeverFits, Prefilled, Task


class Phase(Enum):
    """Where a task stands."""

    WAITING = "waiting"
    """In the PT queue; holds no KVC."""
    PREFILLING = "prefilling"
    """Its prompt is partly in the KVC."""
    READY = "ready"
    """Its prompt is in the KVC, it does not run."""
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
        past_steps: decode steps that it took before it was last parked.
        generated_tokens: output tokens known to exist, those before a recompute included.
        offloaded_tokens: KVC that lies in host memory and comes back when it is resumed.
        response: equally likely lengths that its response still has, as predicted when it
            entered its queue; ascending.
        demoted: it lost its SLO and is best effort now.
        deferred: it leaves KVC free for others when it starts.
        place: where it waits, while it does.
    """

    task: Task
    number: int
    phase: Phase = Phase.WAITING
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    past_steps: int = 0
    generated_tokens: int = 0
    offloaded_tokens: int = 0
    response: tuple[int, ...] = ()
    demoted: bool = False
    deferred: bool = False
    place: Place | None = None

    @property
    def needed(self) -> tuple[int, ...]:
        """``response``, each length at least one token."""
        if self.response[0] > 0:
            return self.response
        return tuple(max(tokens, 1) for tokens in self.response)

    @property
    def response_tokens(self) -> int:
        """RL still to come, as predicted when it entered its queue: the middle outcome."""
        return self.response[len(self.response) // 2]

    @property
    def prompt_left_tokens(self) -> int:
        """Prompt tokens that still need a forward pass."""
        return self.task.prompt_tokens - self.prefilled_tokens


class Books:
    """All live tasks by phase, with their claims.

    Args:
        ledger: receives every claim.
        pt_place: order of the PT queue; static while a task waits there.
        gt_place: order of the GT queue, likewise.

    Attributes:
        waiting: the PT queue.
        ready: the GT queue: tasks whose response was promised nothing yet.
        starting: GTs whose response was promised before they run, by id.
        prefilling: tasks whose prompt is partly computed, by id.
        running: tasks that decode, by id.
        ready_responses: predicted remaining lengths of the GTs in the queue.
        running_tpots_s: TPOT objectives of those that decode.
    """

    def __init__(
        self,
        ledger: Ledger,
        pt_place: Callable[[TaskState], Place],
        gt_place: Callable[[TaskState], Place],
    ) -> None:
        self.ledger = ledger
        self.waiting = GroupedQueue(pt_place)
        self.ready = GroupedQueue(gt_place)
        self.prefilling: dict[str, TaskState] = {}
        self.starting: dict[str, TaskState] = {}
        self.running: dict[str, TaskState] = {}
        self.ready_responses: SortedList = SortedList()
        self.running_tpots_s: SortedList = SortedList()
        self._tasks: dict[str, TaskState] = {}
        self._arrivals = 0

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

    def response_left(self, state: TaskState, points: int = 1) -> tuple[int, ...]:
        """KVC that a task's response still needs, as predicted now.

        The last token of a response is never stored, but with overlap scheduling one more
        decode may be in flight when it ends, so a response takes as many tokens as it has.

        Args:
            state: a live task.
            points: how many equally likely lengths to give.

        Returns:
            Remaining lengths in tokens, ascending, each at least 0.
        """
        done = state.task.generated_tokens + state.past_steps
        done += self.ledger.steps_of(state.task.rid)
        outcomes = state.task.prediction.outcomes(state.generated_tokens, points)
        return tuple(max(tokens - done, 0) for tokens in outcomes)

    def add(self, task: Task) -> TaskState:
        """Put a task into the PT queue.

        Args:
            task: the request.

        Returns:
            Its state.

        Raises:
            NeverFits: its prompt and one output token exceed the KVC.
            ValueError: its ``rid`` is known, or its prompt is empty.
        """
        if task.rid in self._tasks:
            raise ValueError(f"rid={task.rid!r} is being served already: give each request its own")
        if task.prompt_tokens < 1:
            raise ValueError(f"prompt_tokens={task.prompt_tokens}: a prompt has 1 token or more")
        if task.prompt_tokens + 1 > self.ledger.capacity_tokens:
            raise NeverFits.of(task.prompt_tokens, self.ledger.capacity_tokens)
        self._arrivals += 1
        state = TaskState(task, self._arrivals, generated_tokens=task.generated_tokens)
        self._enter_waiting(state)
        return state

    def requeue(self, task: Task) -> None:
        """Put a task that gave up its KVC into the PT queue again, not as a newcomer.

        Args:
            task: a live request, with what it generated counted as prompt.
        """
        before = self._tasks[task.rid]
        self.remove(task.rid)
        state = TaskState(
            task,
            before.number,
            generated_tokens=task.generated_tokens,
            demoted=before.demoted,
            deferred=before.deferred,
        )
        self._enter_waiting(state)

    def on_launch(self, launch: Launch) -> None:
        """Record what started; ids that are gone are ignored.

        Args:
            launch: the iteration as launched.
        """
        for rid in launch.parked:
            self._park(rid)
        for rid in launch.offloaded:
            self._offload(rid, lost_tokens=int(rid in launch.dropped))
        for rid in launch.resumed:
            if rid not in self.running:
                self._resume(rid)
        if launch.decoded:
            self.ledger.advance(launch.decoded)
        for part in launch.prefilled:
            self._prefilled(part)

    def on_tokens(self, rid: str, tokens: int) -> None:
        """Count output tokens that came back.

        Args:
            rid: request id; unknown ids are ignored.
            tokens: how many.
        """
        state = self._tasks.get(rid)
        if state is not None:
            state.generated_tokens += tokens

    def on_step(self, rids: Iterable[str]) -> None:
        """Count one output token of each of these.

        Args:
            rids: request ids; unknown ids are ignored.
        """
        tasks = self._tasks
        for rid in rids:
            state = tasks.get(rid)
            if state is not None:
                state.generated_tokens += 1

    def remove(self, rid: str) -> None:
        """Forget a task and end its claim; unknown ids are ignored.

        Args:
            rid: request id.
        """
        state = self._tasks.pop(rid, None)
        if state is not None:
            self._leave(state)
            self.ledger.close(rid)

    def demote(self, rid: str) -> None:
        """Let a waiting task go on as best effort; others are ignored.

        Args:
            rid: request id.
        """
        state = self._tasks.get(rid)
        if state is not None and state.phase is Phase.WAITING:
            self.waiting.remove(state)
            state.demoted = True
            self.waiting.add(state)

    def _park(self, rid: str) -> None:
        state = self._tasks.get(rid)
        if state is None or state.phase is not Phase.RUNNING:
            return
        self._leave(state)
        state.past_steps += self.ledger.steps_of(rid)
        self.ledger.stop(rid)
        self._enter_ready(state)

    def _offload(self, rid: str, lost_tokens: int) -> None:
        state = self._tasks.get(rid)
        if state is None or state.phase not in (Phase.RUNNING, Phase.READY):
            return
        if state.offloaded_tokens:
            return
        self._leave(state)
        state.past_steps += self.ledger.steps_of(rid) - lost_tokens
        state.offloaded_tokens = self.ledger.held_by(rid) - lost_tokens
        self.ledger.close(rid)
        self._enter_ready(state)

    def _resume(self, rid: str) -> None:
        state = self._tasks.get(rid)
        if state is None or state.phase is not Phase.READY:
            return
        self._leave(state)
        if state.offloaded_tokens:
            self.ledger.take(rid, state.offloaded_tokens)
            state.offloaded_tokens = 0
        state.phase = Phase.RUNNING
        self.running[rid] = state
        if state.task.slo.tpot_s is not None:
            self.running_tpots_s.add(state.task.slo.tpot_s)
        self.ledger.start(rid)

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
            self.ledger.pin(part.rid, part.cached_tokens, part.prefix_key)
        state.prefilled_tokens += part.tokens
        self.ledger.take(part.rid, part.tokens)
        if part.done:
            self._leave(state)
            if self.ledger[part.rid].response:
                self.ledger.start(part.rid)
            self._enter_ready(state)

    def _enter_waiting(self, state: TaskState) -> None:
        self._tasks[state.task.rid] = state
        state.response = self.response_left(state, self.ledger.points)
        self.waiting.add(state)

    def _enter_ready(self, state: TaskState) -> None:
        state.phase = Phase.READY
        rid = state.task.rid
        if rid in self.ledger and self.ledger[rid].since is not None:
            self.starting[rid] = state
            return
        state.response = self.response_left(state, self.ledger.points)
        self.ready.add(state)
        self.ready_responses.add(state.response[-1])

    def _leave(self, state: TaskState) -> None:
        if state.phase is Phase.WAITING:
            self.waiting.remove(state)
        elif state.phase is Phase.READY and state.task.rid in self.starting:
            del self.starting[state.task.rid]
        elif state.phase is Phase.READY:
            self.ready.remove(state)
            self.ready_responses.remove(state.response[-1])
        elif state.phase is Phase.PREFILLING:
            del self.prefilling[state.task.rid]
        else:
            del self.running[state.task.rid]
            if state.task.slo.tpot_s is not None:
                self.running_tpots_s.remove(state.task.slo.tpot_s)
