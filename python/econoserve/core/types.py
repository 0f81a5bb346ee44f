"""What a policy is told and what it answers; messages are frozen, times in seconds, KVC in tokens.

Owns the vocabulary shared by the engine, the simulator and the policies. It must hold no
decision and no state of a run.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum

from econoserve.core.lengths import LengthPrediction


class NeverFits(ValueError):
    """A task whose prompt is larger than the whole KVC; no schedule can serve it."""

    @classmethod
    def of(cls, prompt_tokens: int, capacity_tokens: int) -> "NeverFits":
        """The error for a prompt.

        Args:
            prompt_tokens: its length.
            capacity_tokens: size of the KVC.

        Returns:
            An error that names both and the fix.
        """
        return cls(
            f"prompt_tokens={prompt_tokens} and one output token exceed the KV cache of "
            f"{capacity_tokens} tokens: shorten the prompt or raise --max-total-tokens"
        )


class Preemption(Enum):
    """How a preempted task gives up the batch."""

    PARK = "park"
    """Leaves the batch and keeps its KVC; resumed without recomputation."""
    OFFLOAD = "offload"
    """Leaves the batch, its KVC moves to host memory and comes back when it is resumed."""
    RECOMPUTE = "recompute"
    """Gives its KVC back and is prefilled again (prompt and generated tokens)."""


class Outcome(Enum):
    """How a task ended."""

    FINISHED = "finished"
    """Its response is complete."""
    ABORTED = "aborted"
    """Its sender gave it up, or it failed."""
    REJECTED = "rejected"
    """It was refused, by plan."""


@dataclass(frozen=True, slots=True)
class Slo:
    """Service-level objectives of one request, each in seconds, ``None`` where not stated.

    Attributes:
        ttft_s: time to first token, from arrival.
        tpot_s: time per output token after the first.
        e2e_s: completion of the whole response, from arrival.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One request as it arrives.

    Whoever runs the policy ends a response where prompt and response fill the KVC, so that any
    request can be served alone.

    Attributes:
        rid: request id, unique while the request lives.
        arrival_s: when it arrived, on the clock of ``View.now_s``.
        prompt_tokens: tokens to prefill (prompt, and what was generated before a recompute), at
            least 1.
        prediction: the response-length prediction.
        slo: its objectives.
        parkable: whether its GT may wait with its KVC outside the batch; ``False`` reserves the
            whole response before the prompt starts, and lets it give way only after all others.
        generated_tokens: output tokens already produced, for a task that returns after a
            recompute.
    """

    rid: str
    arrival_s: float
    prompt_tokens: int
    prediction: LengthPrediction
    slo: Slo = field(default_factory=Slo)
    parkable: bool = True
    generated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What of a waiting prompt lies in the prefix cache.

    Attributes:
        tokens: prompt tokens that need no prefill; at least one of a prompt's does.
        evictable_tokens: those of them that no running task holds; admitting the prompt pins
            them, which takes that much from the free KVC.
        key: names the prefix; tasks with equal keys hold the same tokens, which then count
            once. ``None`` where that is not known: each task's copy counts.
    """

    tokens: int = 0
    evictable_tokens: int = 0
    key: Hashable = None


def unknown_release(rid: str) -> int | None:
    """What a world without shared prefixes says of how much a task would give back.

    Args:
        rid: request id, ignored.

    Returns:
        ``None``: what it holds, less what it found in the prefix cache.
    """
    return None


def always_startable(rid: str) -> bool:
    """Whether a prompt may start, in a world that holds nothing against any.

    Args:
        rid: request id, ignored.

    Returns:
        ``True``.
    """
    return True


def no_cached_prefix(rid: str) -> CachedPrefix:
    """The prefix cache of a world without one.

    Args:
        rid: request id, ignored.

    Returns:
        An empty prefix.
    """
    return CachedPrefix()


@dataclass(frozen=True, slots=True)
class View:
    """What a policy sees of the machine when it plans an iteration.

    Attributes:
        now_s: the time, the same on every tensor-parallel rank.
        capacity_tokens: size of the KVC.
        used_tokens: KVC that cannot be had: held by tasks or pinned by them in the prefix
            cache. Shared tokens count once; evictable cache counts as free.
        free_rows: further requests that may hold KVC.
        max_running: most requests in one batch.
        cached_prefix: what of a waiting prompt is cached; asked only for prompts about to start.
        released: KVC that would be free if a task gave up its own, less than it holds where others
            use its prompt, too; ``None`` where that is not known. Asked only for victims.
        startable: whether a waiting prompt may start now, whatever its KVC: ``False`` where it
            needs something else that others hold, such as a place for its LoRA adapter.
    """

    now_s: float
    capacity_tokens: int
    used_tokens: int
    free_rows: int
    max_running: int
    cached_prefix: Callable[[str], CachedPrefix] = no_cached_prefix
    released: Callable[[str], int | None] = unknown_release
    startable: Callable[[str], bool] = always_startable


@dataclass(frozen=True, slots=True)
class Promise:
    """KVC still to come that a task is owed from now on.

    Attributes:
        rid: the task.
        prompt_tokens: for the rest of its prompt.
        response_tokens: equally likely remaining response lengths, ascending; one where a
            promise is of one length, none where its response was promised nothing yet.
        host: the task whose unused promise it uses meanwhile (KVC pipelining), if any.
    """

    rid: str
    prompt_tokens: int = 0
    response_tokens: tuple[int, ...] = ()
    host: str | None = None


@dataclass(frozen=True, slots=True)
class IterationPlan:
    """One iteration's decisions. Everything running and not preempted decodes one token, unless
    the plan pauses.

    Attributes:
        prefill: ``(rid, tokens)`` in the order to run; at most one leaves its prompt unfinished,
            and it is the last, or the continued one and first.
        resume: GTs that join the running batch.
        preempt: tasks that leave it or give up their KVC, and how.
        reject: ``(rid, reason)``: waiting tasks to refuse now; the reason is for their sender.
        demote: tasks that lost their SLO and go on as best effort.
        promises: what is owed from now on.
        pauses: what runs sits this iteration out, which computes only prompts; it keeps its place
            in the batch.
    """

    prefill: tuple[tuple[str, int], ...] = ()
    resume: tuple[str, ...] = ()
    preempt: tuple[tuple[str, Preemption], ...] = ()
    reject: tuple[tuple[str, str], ...] = ()
    demote: tuple[str, ...] = ()
    promises: tuple[Promise, ...] = ()
    pauses: bool = False


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt's part of a launched iteration.

    Attributes:
        rid: request id.
        tokens: prompt tokens in the forward pass.
        cached_tokens: prompt tokens found in the prefix cache; counted on the first part only.
        done: whether the prompt is complete and its GT may start.
        prefix_key: ``CachedPrefix.key`` of those cached tokens.
    """

    rid: str
    tokens: int
    cached_tokens: int
    done: bool
    prefix_key: Hashable = None


@dataclass(frozen=True, slots=True)
class Launch:
    """What really started, reported back so that the policy's books match the machine.

    Attributes:
        prefilled: prompt parts in the forward pass.
        resumed: GTs that joined the running batch.
        parked: GTs that left it and keep their KVC.
        offloaded: GTs that left it, their KVC now in host memory.
        dropped: those of the offloaded ones whose token in flight was lost and is decoded again.
        decoded: tasks that took one KVC token each to decode.
    """

    prefilled: tuple[Prefilled, ...] = ()
    resumed: tuple[str, ...] = ()
    parked: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    decoded: tuple[str, ...] = ()
