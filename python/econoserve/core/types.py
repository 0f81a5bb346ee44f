"""What a policy is told and what it answers; messages are frozen, times in seconds, KVC in tokens.

Owns the vocabulary shared by the engine, the simulator and the policies. It must hold no
decision and no state of a run.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum


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
    RECOMPUTE = "recompute"
    """Gives its KVC back and is prefilled again (prompt and generated tokens)."""


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
class LengthPrediction:
    """A predicted response-length distribution; the only way a length enters the scheduler.

    Attributes:
        quantiles_tokens: ascending RL at evenly spaced probability levels.
        level: the probability that a claim is meant to cover, in (0, 1].
        cap_tokens: the request's limit on output tokens; no prediction exceeds it.
    """

    quantiles_tokens: tuple[int, ...]
    level: float
    cap_tokens: int

    @property
    def tokens(self) -> int:
        """RL predicted at arrival, at least 1."""
        return self.given(0)

    def given(self, generated_tokens: int) -> int:
        """RL predicted once ``generated_tokens`` are out and the response has not ended.

        Args:
            generated_tokens: output tokens produced so far.

        Returns:
            The RL at ``level`` of the distribution conditioned on survival: more than
            ``generated_tokens`` unless the cap allows no more. Beyond all that was ever seen,
            the known part doubles.
        """
        cap = max(self.cap_tokens, 1)
        survivors = len(self.quantiles_tokens) - bisect_right(
            self.quantiles_tokens, generated_tokens
        )
        if survivors:
            rank = max(math.ceil(self.level * survivors), 1)
            expected = self.quantiles_tokens[len(self.quantiles_tokens) - survivors + rank - 1]
        else:
            expected = max(2 * generated_tokens, generated_tokens + 16)
        return min(max(expected, generated_tokens + 1), cap)


@dataclass(frozen=True, slots=True)
class Task:
    """One request as it arrives.

    Attributes:
        rid: request id, unique while the request lives.
        arrival_s: when it arrived, on the clock of ``View.now_s``.
        prompt_tokens: tokens to prefill (prompt, and what was generated before a recompute).
        prediction: the response-length prediction.
        slo: its objectives.
        parkable: whether its GT may wait with its KVC outside the batch; ``False`` reserves the
            whole response before the prompt starts.
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
        tokens: prompt tokens that need no prefill.
        evictable_tokens: those of them that no running task holds; admitting the prompt pins
            them, which takes that much from the free KVC.
    """

    tokens: int = 0
    evictable_tokens: int = 0


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
    """

    now_s: float
    capacity_tokens: int
    used_tokens: int
    free_rows: int
    max_running: int
    cached_prefix: Callable[[str], CachedPrefix] = no_cached_prefix


@dataclass(frozen=True, slots=True)
class IterationPlan:
    """One iteration's decisions. Everything running and not preempted decodes one token.

    Attributes:
        prefill: ``(rid, tokens)`` in the order to run; at most one leaves its prompt unfinished,
            and it is the last, or the continued one and first.
        resume: GTs that join the running batch.
        preempt: tasks that leave it or give up their KVC, and how.
        promises: ``(rid, tokens)``: KVC still to come that a task is owed from now on.
    """

    prefill: tuple[tuple[str, int], ...] = ()
    resume: tuple[str, ...] = ()
    preempt: tuple[tuple[str, Preemption], ...] = ()
    promises: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt's part of a launched iteration.

    Attributes:
        rid: request id.
        tokens: prompt tokens in the forward pass.
        cached_tokens: prompt tokens found in the prefix cache; counted on the first part only.
        done: whether the prompt is complete and its GT may start.
    """

    rid: str
    tokens: int
    cached_tokens: int
    done: bool


@dataclass(frozen=True, slots=True)
class Launch:
    """What really started, reported back so that the policy's books match the machine.

    Attributes:
        prefilled: prompt parts in the forward pass.
        resumed: GTs that joined the running batch.
        parked: GTs that left it and keep their KVC.
        decoded: tasks that took one KVC token each to decode.
    """

    prefilled: tuple[Prefilled, ...] = ()
    resumed: tuple[str, ...] = ()
    parked: tuple[str, ...] = ()
    decoded: tuple[str, ...] = ()
