"""Orca (OSDI'22): iteration-level scheduling, KVC reserved for the longest possible response.

Each iteration decodes every running request and adds whole prompts in order of arrival, as long
as the batch has a place and the KVC of a full-length response is free. What was reserved is never
short, so nobody is ever preempted.

Checked against Algorithm 1 of the paper and two re-implementations: microsoft/sarathi-serve
96f9911 (core/scheduler/orca_scheduler.py, core/block_space_manager/orca_block_space_manager.py)
and microsoft/vidur 7d47513 (orca_replica_scheduler.py). Those reserve the longest context of the
model for each request; the paper reserves what the request may take by its own limit, which is
less and the default here; ``reserve_tokens`` is for the former. The paper does not page the KVC,
so nothing is rounded up to blocks.
"""

from dataclasses import dataclass

from econoserve.core.books import Books, TaskState
from econoserve.core.checks import check_least
from econoserve.core.paged import arrival_place, unfinished_prompts
from econoserve.core.plain import PlainLedger
from econoserve.core.policy import BookedPolicy
from econoserve.core.types import IterationPlan, View


@dataclass(frozen=True, slots=True)
class OrcaConfig:
    """The policy's constants.

    Attributes:
        capacity_tokens: size of the KVC.
        reserve_tokens: KVC reserved for each request at least, such as the model's longest
            context; a request's prompt and its limit on output tokens always are.
        max_seqs: most requests in one batch.

    Raises:
        ValueError: a value is out of range.
    """

    capacity_tokens: int
    reserve_tokens: int = 0
    max_seqs: int = 128

    def __post_init__(self) -> None:
        check_least(self, capacity_tokens=1, reserve_tokens=0, max_seqs=1)


class Orca(BookedPolicy):
    """The policy; ``core.policy.Policy`` describes its methods.

    Args:
        config: its constants.
    """

    def __init__(self, config: OrcaConfig) -> None:
        self.config = config
        super().__init__(Books(PlainLedger(config.capacity_tokens), arrival_place, arrival_place))

    def plan(self, view: View) -> IterationPlan:
        """See ``Policy.plan``."""
        books = self.books
        holders = [*books.prefilling.values(), *books.ready, *books.running.values()]
        return IterationPlan(
            prefill=tuple(self._prompts(view, holders)),
            resume=tuple(state.task.rid for state in books.ready),
        )

    def _prompts(self, view: View, holders: list[TaskState]) -> list[tuple[str, int]]:
        """Whole prompts, first those that the machine cut short; nobody passes another."""
        parts = unfinished_prompts(self.books)
        free = view.capacity_tokens - sum(self._reserved(state, view) for state in holders)
        places = min(self.config.max_seqs, view.max_running) - len(holders)
        places = min(places, view.free_rows)
        for state in self.books.waiting:
            needed = self._reserved(state, view)
            if places < 1 or needed > free:
                break
            cached = view.cached_prefix(state.task.rid)
            parts.append((state.task.rid, state.task.prompt_tokens - cached.tokens))
            free -= needed
            places -= 1
        return parts

    def _reserved(self, state: TaskState, view: View) -> int:
        """KVC kept for a request from its first iteration to its last.

        A request that could outgrow the KVC gets all of it.
        """
        task = state.task
        own_tokens = task.prompt_tokens - task.generated_tokens + task.prediction.cap_tokens
        return min(max(own_tokens, self.config.reserve_tokens), view.capacity_tokens)
