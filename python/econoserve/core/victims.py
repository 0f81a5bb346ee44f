"""Who gives way when the KVC is full although everybody kept within predictions, or did not.

Owns the choice of victims: least cost to restore times damage to the SLO, for the KVC it frees.
"""

from dataclasses import dataclass

from econoserve.core.books import Books, TaskState
from econoserve.core.cost import CostModel
from econoserve.core.draft import Draft
from econoserve.core.order import Ordering
from econoserve.core.types import Preemption


@dataclass(frozen=True, slots=True)
class VictimConfig:
    """What a preemption costs; ours, not the paper's.

    Attributes:
        offload_s_per_token: time to move one token's KVC to the host or back (its bytes over
            the bandwidth); ``None`` where that cannot be done.
        patience_s: slack at which the damage to an SLO is half of what it is without slack.
        lost_damage: damage to a task whose SLO is lost already, as a share of the worst.

    Raises:
        ValueError: a value is out of range.
    """

    offload_s_per_token: float | None = None
    patience_s: float = 5.0
    lost_damage: float = 0.2

    def __post_init__(self) -> None:
        moving_s = self.offload_s_per_token
        if moving_s is not None and not moving_s > 0:
            raise ValueError(f"offload_s_per_token={moving_s}: give more than 0 seconds, or None")
        if not self.patience_s > 0:
            raise ValueError(f"patience_s={self.patience_s}: give more than 0 seconds")
        if not 0 <= self.lost_damage <= 1:
            raise ValueError(f"lost_damage={self.lost_damage}: give a share between 0 and 1")


class Victims:
    """Chooses who gives way.

    Args:
        config: what a preemption costs.
        books: the live tasks.
        cost: estimates the time to compute a context again.
        ordering: knows the deadlines.
    """

    def __init__(
        self, config: VictimConfig, books: Books, cost: CostModel, ordering: Ordering
    ) -> None:
        self.config = config
        self._books = books
        self._cost = cost
        self._ordering = ordering

    def relieve(self, draft: Draft, now_s: float) -> None:
        """Preempt until every task that decodes, or else one that is under way, can take a token.

        Nobody is preempted while tokens are left, whatever was promised: responses often end
        before they need what they were promised.

        Args:
            draft: the plan so far.
            now_s: the time.
        """
        books = self._books
        stuck = not draft.decoding and (books.starting or books.prefilling)
        needed = 1 if stuck else 0
        if draft.free_tokens >= needed:
            return
        holders = [*books.running.values(), *books.starting.values(), *books.ready]
        order = sorted(
            (holder for holder in holders if not holder.offloaded_tokens),
            key=lambda state: (not state.task.parkable, self._harm(state, now_s), -state.number),
        )
        # The last one runs on: the KVC holds any single request to its end (see ``Task``).
        last = 0 if books.prefilling else 1
        for state in order[: len(order) - last]:
            if draft.free_tokens >= needed:
                return
            draft.preempt(state, self._cheapest(state))

    def make_room(self, draft: Draft, head: TaskState, tokens: int) -> None:
        """With nothing running, parked tasks give way, last first, so that one can go on.

        Args:
            draft: the plan so far.
            head: the one in the GT queue that is to go on.
            tokens: KVC that it needs.
        """
        for state in reversed(self._books.ready):
            if min(draft.trial.headroom_tokens, draft.free_tokens) >= tokens:
                return
            if state is not head and not draft.is_out(state) and not state.offloaded_tokens:
                draft.preempt(state, self._cheapest(state))

    def _cheapest(self, state: TaskState) -> Preemption:
        held = self._books.ledger.held_by(state.task.rid)
        per_token_s = self.config.offload_s_per_token
        movable = per_token_s is not None and state.task.parkable
        if movable and 2 * held * per_token_s < self._cost.prefill_s(held):
            return Preemption.OFFLOAD
        return Preemption.RECOMPUTE

    def _harm(self, state: TaskState, now_s: float) -> float:
        """Seconds to restore it times damage, for each token that it frees now or would take."""
        config = self.config
        held = self._books.ledger.held_by(state.task.rid)
        restore_s = self._cost.prefill_s(held)
        if config.offload_s_per_token is not None and state.task.parkable:
            restore_s = min(restore_s, 2 * held * config.offload_s_per_token)
        slack_s = self._ordering.latest_start_s(state, generating=True) - now_s
        lost = slack_s < 0 or state.demoted
        damage = config.lost_damage if lost else config.patience_s / (config.patience_s + slack_s)
        left = self._books.response_left(state)[-1]
        return restore_s * damage / (held - state.cached_tokens + left + 1)
