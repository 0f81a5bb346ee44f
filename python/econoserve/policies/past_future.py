"""LightLLM's Past-Future scheduler (ASPLOS'25): admit while the sampled future fits the KVC.

Requests start as they came, while the peak that the batch will reach stays below the capacity less
a reserve. The lengths of responses are drawn from those that ended last, for running ones from
those longer than what they generated, up to the request's limit; of several such futures the worst
counts. Where the KVC is full all the same, the last to come is paused: it returns to the front of
the queue and is computed again.

Checked against the paper's artifact, WuSiYu/lightllm-ae d93ff69 (lightllm-server-pastfuture:
router/req_queue.py, router/manager.py, router/pause_strategy.py, io_struct.py), its port in
ModelTC/lightllm pull request 1048, and ModelTC/lightllm fc72ffa for how prompts are computed.
Where this differs:

- As in LightLLM now, decodes and chunks of prompts share an iteration, and any number of prompts
  starts in one; the artifact started one after every two decodes. Chunks wait for no decodes.
- Random numbers come from a generator seeded with the number of iterations so far.
- One prompt at a time may be unfinished.
- A response takes as many tokens as it has: one more than there, for the step in flight at its end.
- Nobody starts where somebody is paused. With nothing running, the first prompt starts in any case.
- A pause frees no prefix from the cache, which may stay in use. With prefix caching, what it
  frees is therefore understated: all cached tokens count as shared.
- The batch is as large as the machine allows. Aborted responses teach nothing.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from econoserve.core.books import Books, Phase, TaskState
from econoserve.core.checks import check_least, check_share
from econoserve.core.paged import arrival_place, came
from econoserve.core.plain import PlainLedger
from econoserve.core.policy import BookedPolicy
from econoserve.core.types import IterationPlan, Launch, Outcome, Preemption, View


@dataclass(frozen=True, slots=True)
class PastFutureConfig:
    """The policy's constants; the defaults are the artifact's, those of a pass LightLLM's.

    Attributes:
        capacity_tokens: size of the KVC.
        window_requests: responses that are remembered (pull request 1048: 200).
        initial_response_tokens: length that half a window of responses is assumed to have had.
        most_futures: futures sampled for one plan.
        least_samples: fewer futures are sampled where the batch alone gives so many lengths.
        reserved_fraction: share of the KVC that the future must leave free.
        chunked_prefill_tokens: prompt tokens of one request in one pass.
        max_batch_tokens: tokens of one pass; a prompt beyond it waits.
        seed: of the random draws.

    Raises:
        ValueError: a value is out of range.
    """

    capacity_tokens: int
    window_requests: int = 40
    initial_response_tokens: int = 1024
    most_futures: int = 5
    least_samples: int = 200
    reserved_fraction: float = 0.05
    chunked_prefill_tokens: int = 4096
    max_batch_tokens: int = 8448
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, capacity_tokens=1, window_requests=2, initial_response_tokens=1)
        check_least(self, most_futures=1, least_samples=0, seed=0)
        check_least(self, chunked_prefill_tokens=1, max_batch_tokens=1)
        check_share("reserved_fraction", self.reserved_fraction)


def peak_tokens(held: np.ndarray, left: np.ndarray) -> np.ndarray:
    """The most KVC that a batch will hold at once, if nothing joins it.

    Args:
        held: KVC that each request holds, or will as soon as its prompt is done; (requests,).
        left: tokens that each will still decode, in each future; (futures, requests).

    Returns:
        Tokens, for each future. With the requests sorted by what is left, most first, it is the
        maximum over i of i * left_i plus what the first i hold.
    """
    order = np.argsort(-left, axis=1, kind="stable")
    rank = np.arange(1, left.shape[1] + 1)
    return (np.take_along_axis(left, order, 1) * rank + np.cumsum(held[order], axis=1)).max(axis=1)


class PastFuture(BookedPolicy):
    """The policy; ``core.policy.Policy`` describes its methods.

    Args:
        config: its constants.

    Attributes:
        past: lengths of the responses that ended last, in tokens, the oldest first.
    """

    def __init__(self, config: PastFutureConfig) -> None:
        self.config = config
        half = [config.initial_response_tokens] * (config.window_requests // 2)
        self.past = deque(half, maxlen=config.window_requests)
        self._iterations = 0
        super().__init__(Books(PlainLedger(config.capacity_tokens), arrival_place, arrival_place))

    def remove(self, rid: str, outcome: Outcome) -> None:
        """See ``Policy.remove``; learns the length of a finished response."""
        if rid in self.books and outcome is Outcome.FINISHED:
            self.past.append(self.books[rid].generated_tokens)
        super().remove(rid, outcome)

    def on_launch(self, plan: IterationPlan, launch: Launch) -> None:
        """See ``Policy.on_launch``."""
        self._iterations += 1
        super().on_launch(plan, launch)

    def plan(self, view: View) -> IterationPlan:
        """See ``Policy.plan``."""
        batch = sorted([*self.books.running.values(), *self.books.ready], key=came)
        free = view.capacity_tokens - view.used_tokens
        under_way = self.books.prefilling
        paused = []
        # The last one goes on: the KVC holds any single request to its end.
        while free < len(batch) + len(under_way) and len(batch) > (0 if under_way else 1):
            state = batch.pop()
            free += self.ledger.held_by(state.task.rid) - state.cached_tokens
            paused.append((state.task.rid, Preemption.RECOMPUTE))
        free -= len(batch)
        prompts = []
        for rid, state in under_way.items():
            tokens = min(state.prompt_left_tokens, self.config.chunked_prefill_tokens, free)
            if tokens > 0:
                prompts.append((rid, tokens))
                free -= tokens
        if not paused and self.books.waiting:
            prompts += self._admit(view, [*batch, *under_way.values()], dict(prompts), free)
        resume = tuple(state.task.rid for state in batch if state.phase is Phase.READY)
        return IterationPlan(tuple(prompts), resume, tuple(paused))

    def _admit(
        self, view: View, batch: list[TaskState], under_way: dict[str, int], free: int
    ) -> list[tuple[str, int]]:
        """Waiting prompts to start, as they came, while the future of the batch fits."""
        config, prompts = self.config, []
        unfinished = [state for state in batch if state.phase is Phase.PREFILLING]
        budget = config.max_batch_tokens - len(batch) + len(unfinished) - sum(under_way.values())
        cut = any(
            state.prompt_left_tokens > under_way.get(state.task.rid, 0) for state in unfinished
        )
        rows = min(view.free_rows, view.max_running - len(batch))
        limit = config.capacity_tokens * (1 - config.reserved_fraction)
        draw = np.random.default_rng((config.seed, self._iterations))
        past = np.array(self.past)
        held, left = self._futures(batch, past, draw)
        for state in self.books.waiting:
            cached = view.cached_prefix(state.task.rid)
            prompt = state.task.prompt_tokens - cached.tokens
            alone = not batch and not prompts
            most = min(budget, free - cached.evictable_tokens)
            tokens = min(prompt, config.chunked_prefill_tokens, most if alone else prompt)
            if len(prompts) >= rows or not 1 <= tokens <= most or (tokens < prompt and cut):
                break
            figures = self._figures([state])
            lengths = draw.choice(past, (len(left), 1))
            held = np.append(held, figures[0])
            left = np.column_stack((left, _left(figures, lengths)))
            if not alone and peak_tokens(held, left).max() >= limit:
                break
            prompts.append((state.task.rid, tokens))
            free -= tokens + cached.evictable_tokens
            budget -= tokens
            if tokens < prompt:
                break
        return prompts

    def _futures(
        self, batch: list[TaskState], past: np.ndarray, draw: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """KVC that the batch holds; what it will still decode in each of the sampled futures."""
        figures = self._figures(batch)
        held, out, limits, _ = figures
        if not batch:
            return held, np.empty((1, 0))
        futures = min(self.config.most_futures, self.config.least_samples // len(batch) + 1)
        # A length lies anywhere between what is out, the longer ones of the past, and the limit.
        past = np.sort(past)
        first = np.searchsorted(past, out, side="right")
        longer = len(past) - first
        gaps = longer + (np.where(longer > 0, past[-1], out) < limits)
        at = draw.random((futures, len(batch))) * gaps
        point = at.astype(int)

        def length(index: np.ndarray) -> np.ndarray:
            known = past[np.clip(first + index - 1, 0, len(past) - 1)]
            return np.where(index == 0, out, np.where(index <= longer, known, limits))

        lengths = length(point) + (length(point + 1) - length(point)) * (at - point)
        return held, _left(figures, np.rint(lengths))

    def _figures(self, states: list[TaskState]) -> np.ndarray:
        """KVC held once the prompt is done, tokens generated, most of them, prompt; by request."""
        rows = []
        for state in states:
            task = state.task
            prompt = task.prompt_tokens - task.generated_tokens
            limit = min(task.prediction.cap_tokens, self.config.capacity_tokens - prompt)
            held = max(self.ledger.held_by(task.rid), task.prompt_tokens)
            rows.append((held, state.generated_tokens, limit, prompt))
        return np.array(rows, dtype=float).reshape(-1, 4).T


def _left(figures: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """What responses of these lengths will still decode; (futures, requests)."""
    held, out, limits, prompts = figures
    return np.maximum(prompts + np.minimum(limits, np.maximum(out, lengths)) - held, 0)
