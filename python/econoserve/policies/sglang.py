"""Stock SGLang: prefill first, chunked prompts, and a guess of how much will still be decoded.

An iteration computes prompts or decodes, never both. A prompt starts if its response could run to
its limit beside what the batch is expected to decode: the rest of everybody's limit times the new
token ratio, which decays with every decode iteration. Where it was too bold and the KVC is full,
the shortest responses are retracted, go to the end of the queue and are computed again, and the
ratio is set to what the others used so far. Who found no room is not tried again before somebody
leaves the batch.

Checked against sglang 0.5.23 as released (managers/scheduler.py; schedule_policy.py, PrefillAdder;
schedule_batch.py, retract_decode; mem_cache/prefill_budget.py; scheduler_components/
new_token_ratio_tracker.py) with its defaults: pages of one token, policy fcfs, no mixed chunks, no
priorities. Where this differs:

- Where the next chunk of a prompt finds no KVC, decodes are retracted for it; there an allocation
  fails. Where the only request finds none, there it is aborted; here it never fits to begin with.
- A retraction frees no prefix from the cache, which may stay in use. With prefix caching, what it
  frees is therefore understated: all cached tokens count as shared.
- The batch is as large as the machine allows. max_prefill_tokens is left out: a chunk is smaller.
- Decoding requests are parked while prompts are computed. Where the machine cannot park one, it
  decodes along.
"""

from dataclasses import dataclass, field

from econoserve.core.books import Books, Phase, TaskState
from econoserve.core.checks import check_least
from econoserve.core.plain import PlainLedger
from econoserve.core.policy import BookedPolicy
from econoserve.core.queues import Place
from econoserve.core.types import IterationPlan, Launch, Outcome, Preemption, Task, View


@dataclass(frozen=True, slots=True)
class SGLangConfig:
    """The policy's constants; the defaults are SGLang's.

    Attributes:
        capacity_tokens: size of the KVC.
        chunked_prefill_tokens: prompt tokens of one pass; 8192 is for GPUs of 60 to 160 GB (2048
            below 20 GB, 4096 below 60 GB, 16384 beyond).
        conservativeness: scales the first guess of the share that will be decoded.
        initial_ratio: that guess: the share of their limits that responses use.
        least_ratio_factor: the guess never decays below this share of the first one.
        decay_steps: decode iterations until it is there.
        retract_steps: decode steps that a retraction makes room for, in the guess after it.
        clip_tokens: a response counts as no longer than this.

    Raises:
        ValueError: a value is out of range.
    """

    capacity_tokens: int
    chunked_prefill_tokens: int = 8192
    conservativeness: float = 1.0
    initial_ratio: float = 0.7
    least_ratio_factor: float = 0.14
    decay_steps: int = 600
    retract_steps: int = 20
    clip_tokens: int = 4096

    def __post_init__(self) -> None:
        check_least(self, capacity_tokens=1, chunked_prefill_tokens=1, decay_steps=1)
        check_least(self, conservativeness=0, initial_ratio=0, retract_steps=0, clip_tokens=1)
        if not 0.0 <= self.least_ratio_factor <= 1.0:
            factor = self.least_ratio_factor
            raise ValueError(f"least_ratio_factor={factor}: give a share in [0, 1]")

    @property
    def first_ratio(self) -> float:
        """The guess at the start and after every idle moment."""
        return min(self.initial_ratio * self.conservativeness, 1.0)

    @property
    def least_ratio(self) -> float:
        """The guess after a long time without retractions."""
        return min(self.first_ratio * self.least_ratio_factor, 1.0)


@dataclass(frozen=True, slots=True)
class SGLangPlan(IterationPlan):
    """A plan that also says whether the batch is full; planning itself remembers nothing.

    Attributes:
        full_since: how many had left the batch when a prompt found no room in it, which holds
            until the next one leaves; ``None`` if it is not full.
    """

    full_since: int | None = None


@dataclass(slots=True)
class _PrefillPass:
    """What a prefill pass took so far.

    Attributes:
        budget_tokens: prompt tokens that it may still compute.
        free_tokens: KVC that is left now.
        future_tokens: KVC that is left once everybody decoded what is expected.
        batch_is_full: nobody else is tried, in this pass and the next ones.
        prompts: prompts in it, with their tokens.
    """

    budget_tokens: int
    free_tokens: int
    future_tokens: float
    batch_is_full: bool
    prompts: list[tuple[str, int]] = field(default_factory=list)

    def add(self, rid: str, tokens: int, pinned_tokens: int, response_tokens: int) -> None:
        """Take a chunk of a prompt, the cached prefix that it pins, and what it will decode."""
        self.prompts.append((rid, tokens))
        self.budget_tokens -= tokens
        self.free_tokens -= tokens + pinned_tokens + 1
        self.future_tokens -= tokens + pinned_tokens + 1 + response_tokens


class SGLang(BookedPolicy):
    """The policy; ``core.policy.Policy`` describes its methods.

    Args:
        config: its constants.

    Attributes:
        new_token_ratio: the share of the rest of their limits that responses are expected to use.
    """

    def __init__(self, config: SGLangConfig) -> None:
        self.config = config
        self.new_token_ratio = config.first_ratio
        self._departures = 0
        self._full_since: int | None = None
        self._queued = 0
        super().__init__(Books(PlainLedger(config.capacity_tokens), self._last, self._last))

    def plan(self, view: View) -> IterationPlan:
        """See ``Policy.plan``."""
        chosen = self._prefill(view)
        full_since = self._departures if chosen.batch_is_full else None
        if not chosen.prompts:
            return self._decode(view, full_since)
        parked = tuple((rid, Preemption.PARK) for rid in self.books.running)
        return SGLangPlan(tuple(chosen.prompts), preempt=parked, full_since=full_since)

    def on_launch(self, plan: IterationPlan, launch: Launch) -> None:
        """See ``Policy.on_launch``."""
        config, batch = self.config, self._batch()
        if any(how is Preemption.RECOMPUTE for _, how in plan.preempt):
            decoded = sum(state.generated_tokens for state in batch)
            decoded += config.retract_steps * len(batch)
            self.new_token_ratio = min(decoded / (sum(map(self._limit, batch)) + 1), 1.0)
        elif launch.decoded:
            decay = (config.first_ratio - config.least_ratio) / config.decay_steps
            self.new_token_ratio = max(self.new_token_ratio - decay, config.least_ratio)
        launched = {part.rid for part in launch.prefilled}
        # What found no room beside prompts that the machine left out may find it without them.
        if isinstance(plan, SGLangPlan) and launched.issuperset(rid for rid, _ in plan.prefill):
            self._full_since = plan.full_since
        super().on_launch(plan, launch)

    def requeue(self, task: Task) -> None:
        """See ``Policy.requeue``; but it goes to the end of the queue."""
        self._depart(task.rid)
        super().requeue(task)

    def remove(self, rid: str, outcome: Outcome) -> None:
        """See ``Policy.remove``; there may be room in the batch again."""
        self._depart(rid)
        super().remove(rid, outcome)
        if not len(self.books):
            self.new_token_ratio = self.config.first_ratio

    def _prefill(self, view: View) -> _PrefillPass:
        """Compose a prefill pass: the prompt under way, then waiting ones as they came."""
        config, batch, under_way = self.config, self._batch(), self.books.prefilling
        rows = min(view.max_running - len(batch), view.free_rows + len(under_way))
        full = bool(batch) and self._full_since == self._departures
        free = view.capacity_tokens - view.used_tokens
        expected = self.new_token_ratio * sum(map(self._clipped, map(self._left, batch)))
        chosen = _PrefillPass(config.chunked_prefill_tokens, free, free - expected, full)
        for rid, state in under_way.items():
            limit = min(chosen.budget_tokens, int(chosen.future_tokens))
            limit = limit if limit > 0 else chosen.budget_tokens
            tokens = min(state.prompt_left_tokens, limit, chosen.free_tokens)
            if tokens < 1:
                return chosen
            done = tokens == state.prompt_left_tokens
            chosen.add(rid, tokens, 0, self._clipped(self._limit(state)) if done else 0)
        for state in self.books.waiting:
            spent = chosen.budget_tokens < 1 and chosen.future_tokens > 0
            if spent or chosen.batch_is_full:
                break
            if len(chosen.prompts) < rows:
                self._start(state, view, chosen)
            else:
                chosen.batch_is_full = True
        return chosen

    def _start(self, state: TaskState, view: View, chosen: _PrefillPass) -> None:
        """Start a prompt if it and its response fit, and see whether there is room for more."""
        cached = view.cached_prefix(state.task.rid)
        prompt = state.task.prompt_tokens - cached.tokens
        total = prompt + self._clipped(self._left(state)) + 1
        alone = not (self.books.running or len(self.books.ready) or chosen.prompts)
        fits = total < chosen.future_tokens - cached.evictable_tokens
        room = chosen.free_tokens - cached.evictable_tokens
        tokens = min(prompt, chosen.budget_tokens, room)
        if tokens < 1 or not (fits or alone):
            chosen.batch_is_full = True
            return
        response = self._clipped(self._limit(state)) if tokens == prompt else 0
        chosen.add(state.task.rid, tokens, cached.evictable_tokens, response)
        chosen.batch_is_full = chosen.future_tokens <= 0

    def _decode(self, view: View, full_since: int | None) -> SGLangPlan:
        """Decode everything; retract the shortest responses until each finds its token."""
        kept = sorted(self._batch(), key=lambda state: (-state.generated_tokens, _prompt(state)))
        free = view.capacity_tokens - view.used_tokens
        last = 0 if self.books.prefilling else 1
        retracted = []
        while len(kept) > last and free < max(len(kept), 1 - last):
            state = kept.pop()
            free += self.ledger.held_by(state.task.rid) - state.cached_tokens
            retracted.append((state.task.rid, Preemption.RECOMPUTE))
        resume = tuple(state.task.rid for state in kept if state.phase is Phase.READY)
        return SGLangPlan(resume=resume, preempt=tuple(retracted), full_since=full_since)

    def _depart(self, rid: str) -> None:
        """Where somebody leaves the batch, there may be room in it again."""
        if rid in self.books and self.books[rid].phase in (Phase.READY, Phase.RUNNING):
            self._departures += 1

    def _last(self, state: TaskState) -> Place:
        """The end of the queue, for the retracted as for newcomers."""
        self._queued += 1
        return Place((), 0, self._queued)

    def _batch(self) -> list[TaskState]:
        return [*self.books.running.values(), *self.books.ready]

    def _limit(self, state: TaskState) -> int:
        """Most output tokens of a request, which SGLang limits to what the KVC can hold."""
        room = self.config.capacity_tokens - _prompt(state) - 2
        return max(min(state.task.prediction.cap_tokens, room), 1)

    def _left(self, state: TaskState) -> int:
        """Output tokens that are left of a request's limit."""
        return max(self._limit(state) - state.generated_tokens, 0)

    def _clipped(self, tokens: int) -> int:
        return min(tokens, self.config.clip_tokens)


def _prompt(state: TaskState) -> int:
    """Prompt tokens of a request, without what was generated before a retraction."""
    return state.task.prompt_tokens - state.task.generated_tokens
