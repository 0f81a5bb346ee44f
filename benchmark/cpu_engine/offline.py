"""Decode step times: an offline engine per system, all up at once, one measured at a time.

Owns the conversation with ``worker`` and what a step time is.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmark.cpu_engine.models import FIRST_ORDINARY_TOKEN
from benchmark.cpu_engine.processes import Worker
from benchmark.cpu_engine.systems import (
    VLLM_BLOCK_TOKENS,
    System,
    offline_environment_of,
    offline_job,
)

WORKER = Path(__file__).with_name("worker.py")
START_TIMEOUT_S = 300.0
KVC_TOKENS = 48_000
PROMPT_TOKENS = VLLM_BLOCK_TOKENS + 1
"""All but the last token is in every system's prefix cache after the first run: vLLM caches whole
blocks, and the last token is always computed."""


@dataclass(frozen=True, slots=True)
class Span:
    """The output tokens whose steps are timed.

    Attributes:
        first: output tokens of the shorter run.
        last: output tokens of the longer run.
    """

    first: int
    last: int

    @property
    def steps(self) -> int:
        """Decode steps by which the two runs differ."""
        return self.last - self.first

    @property
    def mean_context_tokens(self) -> float:
        """Tokens that a request attends to, on average over these steps."""
        return PROMPT_TOKENS + (self.first + self.last) / 2


def random_prompts(count: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Prompts that share no prefix worth caching.

    Args:
        count: how many.
        vocabulary: size of the vocabulary.
        seed: of the draw.

    Returns:
        Token ids, without special tokens.
    """
    draw = random.Random(seed)
    return [
        [draw.randrange(FIRST_ORDINARY_TOKEN, vocabulary) for _ in range(PROMPT_TOKENS)]
        for _ in range(count)
    ]


class OfflineEngine:
    """A system's offline engine in a process of its own.

    Args:
        system: the system.
        model: the model's folder.
        prompts: what is generated from; a batch takes the first of them.
        log: file for what it prints.
    """

    def __init__(self, system: System, model: Path, prompts: list[list[int]], log: Path) -> None:
        self.process = Worker(
            f"{system.name}, offline",
            [system.python, "-P", str(WORKER)],
            offline_environment_of(system),
            log,
        )
        self._backend = system.attention_backend
        try:
            self.process.send({**offline_job(system, model, KVC_TOKENS), "prompts": prompts})
        except BaseException:
            self.process.stop()
            raise

    def __enter__(self) -> Self:
        """Return the engine; leaving the block ends it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the engine and all its processes."""
        self.process.stop()

    def wait_until_ready(self) -> dict[str, Any]:
        """Wait for the engine to start.

        Returns:
            Facts about it: ``start_s`` and versions.

        Raises:
            Failed: it did not start, or runs another attention backend than it should.
        """
        facts = self.process.receive(START_TIMEOUT_S)
        found = facts.get("attention_backend")
        if found != self._backend:
            raise self.process.failure(
                f"attention_backend={found}: this system is measured with {self._backend}"
            )
        return facts

    def run(self, batch: int, output_tokens: int, timeout_s: float) -> dict[str, Any]:
        """Generate once.

        Args:
            batch: requests.
            output_tokens: exact length of each response.
            timeout_s: limit.

        Returns:
            ``seconds``, and ``cached_tokens`` of the prompts.

        Raises:
            Failed: it died, took too long, or returned another number of tokens.
        """
        self.process.send({"batch": batch, "output_tokens": output_tokens})
        answer = self.process.receive(timeout_s)
        if answer["output_tokens"] != batch * output_tokens:
            raise self.process.failure(
                f"{answer['output_tokens']} output tokens instead of {batch * output_tokens}"
            )
        return answer

    def step_ms(self, batch: int, span: Span, timeout_s: float) -> tuple[float, dict[str, Any]]:
        """Time of one decode step.

        Args:
            batch: requests in it.
            span: which output tokens.
            timeout_s: limit for each of the two runs.

        Returns:
            Milliseconds, and the seconds behind them.

        Raises:
            Failed: see ``run``; or the prompts were not in the prefix cache.
        """
        runs = [self.run(batch, tokens, timeout_s) for tokens in (span.first, span.last)]
        for run in runs:
            if run["cached_tokens"] != batch * (PROMPT_TOKENS - 1):
                raise self.process.failure(
                    f"{run['cached_tokens']} prompt tokens were cached instead of "
                    f"{batch * (PROMPT_TOKENS - 1)}, so the runs differ by more than decode steps"
                )
        short_s, long_s = (run["seconds"] for run in runs)
        return (long_s - short_s) / span.steps * 1e3, {"short_s": short_s, "long_s": long_s}
