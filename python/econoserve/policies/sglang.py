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
- A retraction frees no prefix from the cache, which may stay in use.
- The batch is as large as the machine allows. max_prefill_tokens is left out: a chunk is smaller.
- Decoding requests are parked while prompts are computed. Where the machine cannot park one, it
  decodes along.
"""

from dataclasses import dataclass, field

from econoserve.core.books import Books, Phase, TaskState
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
        for name in ("chunked_prefill_tokens", "decay_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")

    @property
    def first_ratio(self) -> float:
        """The guess at the start and after every idle moment."""
        return min(self.initial_ratio * self.conservativeness, 1.0)

    @property
    def least_ratio(self) -> float:
        """The guess after a long time without retractions."""
        return min(self.first_ratio * self.least_ratio_factor, 1.0)


@dataclass(slots=True)
class _PrefillPass:
    """What a prefill pass took so far.

    Attributes:
        budget_tokens: prompt tokens that it may still compute.
        free_tokens: KVC that is left now.
        future_tokens: KVC that is left once everybody decoded what is expected.
        prompts: prompts in it, with their tokens.
    """

    budget_tokens: int
    free_tokens: int
    future_tokens: float
    prompts: list[tuple[str, int]] = field(default_factory=list)

    def add(self, rid: str, tokens: int, pinned_tokens: int, response_tokens: int) -> None:
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
        self._batch_is_full = False
        super().__init__(Books(PlainLedger(config.capacity_tokens), _place, _place))

    def plan(self, view: View) -> IterationPlan:
        """See ``Policy.plan``."""
        if prompts := self._prefill(view):
            parked = tuple((rid, Preemption.PARK) for rid in self.books.running)
            return IterationPlan(prefill=tuple(prompts), preempt=parked)
        return self._decode(view)

    def on_launch(self, plan: IterationPlan, launch: Launch) -> None:
        """See ``Policy.on_launch``."""
        config, batch = self.config, self._batch()
        if any(how is Preemption.RECOMPUTE for _, how in plan.preempt):
            decoded = sum(state.generated_tokens for state in batch)
            decoded += config.retract_steps * len(batch)
            self.new_token_ratio = min(decoded / (sum(map(self._limit, batch)) + 1), 1.0)
            self._batch_is_full = False
        else:
            if launch.decoded:
                decay = (config.first_ratio - config.least_ratio) / config.decay_steps
                self.new_token_ratio = max(self.new_token_ratio - decay, config.least_ratio)
            # Who waits although the pass had tokens left found no room.
            taken = {rid for rid, _ in plan.prefill} | {part.rid for part in launch.prefilled}
            left = any(state.task.rid not in taken for state in self.books.waiting)
            spent = sum(tokens for _, tokens in plan.prefill) >= config.chunked_prefill_tokens
            self._batch_is_full = left and not spent
        super().on_launch(plan, launch)

    def requeue(self, task: Task) -> None:
        """See ``Policy.requeue``; but it goes to the end of the queue."""
        self.books.remove(task.rid)
        self.books.add(task)

    def remove(self, rid: str, outcome: Outcome) -> None:
        """See ``Policy.remove``; there may be room in the batch again."""
        if rid in self.books and self.books[rid].phase in (Phase.READY, Phase.RUNNING):
            self._batch_is_full = False
        super().remove(rid, outcome)
        if not len(self.books):
            self.new_token_ratio = self.config.first_ratio

    def _prefill(self, view: View) -> list[tuple[str, int]]:
        """Compose a prefill pass: the prompt under way, then waiting ones as they came."""
        config, batch, under_way = self.config, self._batch(), self.books.prefilling
        rows = min(view.max_running - len(batch), view.free_rows + len(under_way))
        shut = not self.books.waiting or rows <= 0 or (self._batch_is_full and batch)
        if shut and not under_way:
            return []
        free = view.capacity_tokens - view.used_tokens
        expected = self.new_token_ratio * sum(map(self._clipped, map(self._left, batch)))
        chosen = _PrefillPass(config.chunked_prefill_tokens, free, free - expected)
        for rid, state in under_way.items():
            limit = min(chosen.budget_tokens, int(chosen.future_tokens))
            limit = limit if limit > 0 else chosen.budget_tokens
            tokens = min(state.prompt_left_tokens, limit, chosen.free_tokens)
            if tokens < 1:
                return []
            done = tokens == state.prompt_left_tokens
            chosen.add(rid, tokens, 0, self._clipped(self._limit(state)) if done else 0)
        for state in self.books.waiting:
            full = chosen.budget_tokens < 1 or len(chosen.prompts) >= rows
            if full or not self._start(state, view, chosen):
                break
        return chosen.prompts

    def _start(self, state: TaskState, view: View, chosen: _PrefillPass) -> bool:
        """Start a prompt if it and its response fit; whether there may be room for another."""
        cached = view.cached_prefix(state.task.rid)
        prompt = state.task.prompt_tokens - cached.tokens
        total = prompt + self._clipped(self._left(state)) + 1
        alone = not (self.books.running or len(self.books.ready) or chosen.prompts)
        if total >= chosen.future_tokens - cached.evictable_tokens and not alone:
            return False
        room = chosen.free_tokens - cached.evictable_tokens
        tokens = min(prompt, chosen.budget_tokens, room)
        if tokens < 1:
            return False
        response = self._clipped(self._limit(state)) if tokens == prompt else 0
        chosen.add(state.task.rid, tokens, cached.evictable_tokens, response)
        return tokens == prompt and min(chosen.future_tokens, chosen.free_tokens) > 0

    def _decode(self, view: View) -> IterationPlan:
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
        return IterationPlan(resume=resume, preempt=tuple(retracted))

    def _batch(self) -> list[TaskState]:
        return [*self.books.running.values(), *self.books.ready]

    def _limit(self, state: TaskState) -> int:
        """Most output tokens of a request, which SGLang limits to what the KVC can hold."""
        room = self.config.capacity_tokens - _prompt(state) - 2
        return max(min(state.task.prediction.cap_tokens, room), 1)

    def _left(self, state: TaskState) -> int:
        return max(self._limit(state) - state.generated_tokens, 0)

    def _clipped(self, tokens: int) -> int:
        return min(tokens, self.config.clip_tokens)


def _place(state: TaskState) -> Place:
    return Place((), 0, state.number)


def _prompt(state: TaskState) -> int:
    """Prompt tokens of a request, without what was generated before a retraction."""
    return state.task.prompt_tokens - state.task.generated_tokens
