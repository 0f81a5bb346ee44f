"""What a forward pass computes, as the cost model counts it."""

from econoserve.core.cost import IterationWork
from econoserve.core.policy import BookedPolicy
from econoserve.core.types import Launch


def work_of(launch: Launch, policy: BookedPolicy) -> IterationWork:
    """Count the work of a launched iteration.

    Args:
        launch: the iteration.
        policy: knows the tasks in it; told of the launch already.

    Returns:
        The work, for ``Policy.on_iteration``.
    """
    books = policy.books
    squared = 0
    for part in launch.prefilled:
        known = part.rid in books
        context = books[part.rid].prefilled_tokens if known else part.cached_tokens
        squared += part.tokens * max(context, part.tokens)
    return IterationWork(
        prefill_tokens=sum(part.tokens for part in launch.prefilled),
        prefill_squared=squared,
        decoding=len(launch.decoded),
        context_tokens=policy.ledger.decoding_tokens if launch.decoded else 0,
        sitting_out=0 if launch.decoded else len(books.running),
    )
