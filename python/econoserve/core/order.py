"""Who goes first: urgency, then held KVC, then length.

Owns deadlines and the places in the queues that follow from them. A deadline never moves while a
task waits, so waiting makes every task the most urgent one in the end.
"""

import math
from dataclasses import dataclass
from enum import Enum

from econoserve.core.books import TaskState
from econoserve.core.checks import choice_of
from econoserve.core.cost import CostModel, IterationWork
from econoserve.core.ledger import Ledger
from econoserve.core.queues import Place


class Order(Enum):
    """What a queue is ordered by."""

    ARRIVAL = "arrival"
    """One task after the other, as they came."""
    ARRIVAL_GROUPS = "arrival-groups"
    """Tasks that came in the same window together, by length bucket."""
    URGENCY = "urgency"
    """Window of the latest start, then held KVC (larger first), then length bucket."""


class LengthOrder(Enum):
    """Which of two equally urgent tasks goes first."""

    LONGER = "longer"
    SHORTER = "shorter"


@dataclass(frozen=True, slots=True)
class OrderConfig:
    """The constants of an order; ours, not the paper's.

    ``order`` and ``length_order`` may be given by value, too: ``OrderConfig("arrival")``.

    Attributes:
        order: what counts. A variant by name (``make_policy``) sets it, whatever is given here.
        length_order: which length goes first within a window.
        window_s: latest starts closer than this count as equal.
        group_ratio: lengths within this ratio form a group, above 1.
        best_effort_s: deadline assumed for requests without an SLO, from arrival.
        demoted_s: deadline assumed for requests that lost their SLO, from arrival.

    Raises:
        ValueError: a value is out of range.
    """

    order: Order = Order.URGENCY
    length_order: LengthOrder = LengthOrder.SHORTER
    window_s: float = 1.0
    group_ratio: float = 1.15
    best_effort_s: float = 10.0
    demoted_s: float = 600.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", choice_of("order", self.order, Order))
        length_order = choice_of("length_order", self.length_order, LengthOrder)
        object.__setattr__(self, "length_order", length_order)
        if self.group_ratio <= 1.0:
            raise ValueError(f"group_ratio={self.group_ratio}: give a ratio above 1")
        for name in ("window_s", "best_effort_s", "demoted_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give more than 0 seconds")


class Ordering:
    """Places tasks in the PT and the GT queue.

    Args:
        config: the order's constants.
        cost: estimates service times.
        ledger: knows who holds KVC.

    Attributes:
        mixes: whether prompts were computed beside decodes when they were computed last.
    """

    def __init__(self, config: OrderConfig, cost: CostModel, ledger: Ledger) -> None:
        self.config = config
        self._cost = cost
        self._ledger = ledger
        self.mixes = True
        self._sign = 1 if config.length_order is LengthOrder.SHORTER else -1
        self._bucket_scale = 1.0 / math.log(config.group_ratio)

    @property
    def strict(self) -> bool:
        """Whether nobody may pass a task that does not fit."""
        return self.config.order is not Order.URGENCY

    @property
    def shorter_first(self) -> bool:
        """Whether shorter tasks go before longer ones of the same window."""
        return self._sign == 1

    def latest_start_s(self, state: TaskState, generating: bool) -> float:
        """When a task must run at the latest to keep its SLO.

        Args:
            state: the task.
            generating: of its GT, else of its PT.

        Returns:
            Time: its deadline less its predicted service time. Without an SLO, or after losing
            it, a deadline that is assumed.
        """
        task, slo = state.task, state.task.slo
        if state.demoted:
            return task.arrival_s + self.config.demoted_s
        prefill_s = 0.0 if generating else self._cost.prefill_s(state.prompt_left_tokens)
        starts = []
        if slo.e2e_s is not None:
            service_s = prefill_s + state.response_tokens * self._step_s()
            starts.append(slo.e2e_s - service_s)
        if not generating and slo.ttft_s is not None:
            # The first token comes at the end of a pass, with decode tokens in it or without.
            beside = (len(self._ledger), self._ledger.decoding_tokens) if self.mixes else (0, 0)
            pass_s = self._cost.base_s(True, *beside)
            starts.append(slo.ttft_s - prefill_s - pass_s)
        if generating and slo.tpot_s is not None:
            allowed_s = (slo.ttft_s or 0.0) + slo.tpot_s * task.prediction.tokens
            starts.append(allowed_s - state.response_tokens * self._step_s())
        return task.arrival_s + min(starts, default=self.config.best_effort_s)

    def has_slo(self, state: TaskState) -> bool:
        """Whether a waiting prompt can be late.

        Args:
            state: the task.

        Returns:
            ``True`` if it has an SLO that bounds its start, and did not lose it.
        """
        slo = state.task.slo
        return not state.demoted and (slo.e2e_s is not None or slo.ttft_s is not None)

    def pt_place(self, state: TaskState) -> Place:
        """Where a prompt waits.

        Args:
            state: the task.

        Returns:
            Its place in the PT queue.
        """
        return self._place(state, state.task.prompt_tokens, generating=False)

    def gt_place(self, state: TaskState) -> Place:
        """Where a GT waits.

        Args:
            state: the task.

        Returns:
            Its place in the GT queue.
        """
        return self._place(state, state.response_tokens, generating=True)

    def starves(self, group: tuple[float, ...], now_s: float, patience_s: float) -> bool:
        """Whether a group waited so long that nobody may pass it any more.

        Args:
            group: its key.
            now_s: the time.
            patience_s: how long after its latest start.

        Returns:
            ``True`` if it did.
        """
        timed = self.config.order is not Order.ARRIVAL
        return timed and now_s > (group[0] + 1) * self.config.window_s + patience_s

    def rank_of(self, length_tokens: float) -> float:
        """The least rank of a task that is no longer than this.

        Args:
            length_tokens: the longest that is of use.

        Returns:
            A rank within a group; where shorter ones go first, that of the shortest.
        """
        return -math.inf if self.shorter_first else -length_tokens

    def _place(self, state: TaskState, length: int, generating: bool) -> Place:
        config = self.config
        if config.order is Order.ARRIVAL:
            return Place((state.number, 0, 0), 0, state.number)
        bucket = self._sign * int(math.log(max(length, 1)) * self._bucket_scale)
        if config.order is Order.ARRIVAL_GROUPS:
            # What is offloaded is admitted otherwise, so it forms groups of its own.
            offloaded = int(state.offloaded_tokens > 0)
            group = (state.task.arrival_s // config.window_s, offloaded, bucket)
        else:
            # Held KVC by powers of two: what is about equal is decided by length.
            held = self._ledger.held_by(state.task.rid).bit_length()
            window = self.latest_start_s(state, generating) // config.window_s
            group = (window, -held, bucket)
        return Place(group, self._sign * length, state.number)

    def _step_s(self) -> float:
        """A decode iteration of a middling batch."""
        return self._cost.seconds(IterationWork(decoding=32, context_tokens=32 * 512))
