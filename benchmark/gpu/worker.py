"""An engine in a process of its own that does what it is asked, one thing at a time.

Owns the engine and its clock. Started by ``pair`` with the file descriptor of a pipe: the first
message says which engine to start, each later one what to measure.
"""

import asyncio
import os
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from benchmark.scheduler_comparison.worker import (
    ECONOSERVE,
    engine_for,
    flush,
    scheduler_state,
    send_all,
)
from benchmark.scheduler_comparison.workload import Request

WARM_TOKENS = 8
LEAST_PER_PROMPT = 12
"""Tokens that others decode for each prompt beside them, at first; twice as many if too few."""

MOST_TOKENS = 2000


class Together(NamedTuple):
    """What came of requests that decoded together.

    Attributes:
        seconds: from the moment when all decoded to their end.
        mixed: iterations with prompts in that time.
        outlived: they were still decoding when the last prompt was done.
    """

    seconds: float
    mixed: int
    outlived: bool


class Bench:
    """What can be measured of a running engine.

    Args:
        job: says which system, with which arguments, and what requests state.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.engine = engine_for(job)

    def burst(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        """Answer requests whose lengths are hidden from the scheduler.

        Args:
            requests: as ``Request.to_json`` wrote them.

        Returns:
            ``answers``, one per request, and by how much EconoServe's ``counters`` rose.
        """
        from benchmark.scheduler_comparison.processor import EndOnTime

        flush(self.engine)
        before = self._totals()
        work = [Request.from_json(one) for one in requests]
        answers = self.engine.loop.run_until_complete(
            send_all(self.engine, work, self.job, EndOnTime.to_str())
        )
        after = self._totals()
        return {"answers": answers, "counters": {key: after[key] - before[key] for key in after}}

    def decode(self, running: int, context_tokens: int, new_tokens: int) -> dict[str, Any]:
        """Time iterations that only decode.

        Args:
            running: requests that decode together.
            context_tokens: prompt tokens of each.
            new_tokens: iterations that are timed.

        Returns:
            ``iteration_ms``; ``scheduling_ms``, what EconoServe's planning and bookkeeping took of
            it, ``None`` of stock SGLang.
        """
        prompts = [self._prompt(number, context_tokens) for number in range(running)]

        def seconds(tokens: int) -> float:
            params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
            began_s = time.perf_counter()
            self.engine.generate(input_ids=prompts, sampling_params=params)
            return time.perf_counter() - began_s

        # The prompts are in the prefix cache after the first time.
        seconds(WARM_TOKENS)
        marks = [self._scheduling_s()]
        short_s = seconds(WARM_TOKENS)
        marks.append(self._scheduling_s())
        long_s = seconds(WARM_TOKENS + new_tokens)
        marks.append(self._scheduling_s())
        own_ms = None
        if None not in marks:
            own_ms = (marks[2] - 2 * marks[1] + marks[0]) / new_tokens * 1e3
        return {"iteration_ms": (long_s - short_s) / new_tokens * 1e3, "scheduling_ms": own_ms}

    def _scheduling_s(self) -> float | None:
        return self._totals().get("scheduling_s")

    def mixed(
        self, running: int, context_tokens: int, prompt_tokens: int, prompts: int
    ) -> dict[str, Any]:
        """Time what prompts add to the iterations that compute them beside others that decode.

        The same requests decode once alone and once with prompts beside them, as many tokens each.
        Time and iterations are counted from the moment when all of them decode.

        Args:
            running: requests that decode meanwhile, at least 1.
            context_tokens: prompt tokens of each of those.
            prompt_tokens: tokens of each prompt beside them.
            prompts: how many, one after another.

        Returns:
            ``alone_ms`` of an iteration without a prompt, ``added_ms`` by each iteration with one,
            how many those were (``iterations``), the prompt ``tokens`` of each, and ``decoded``,
            the tokens of each request that decodes. Where no iteration was mixed, ``added_ms`` and
            ``tokens`` are ``None``.

        Raises:
            RuntimeError: the requests that decode end before the last prompt, however long.
        """

        def run(tokens: int, beside: int) -> Together:
            flush(self.engine)
            work = self._together(running, context_tokens, tokens, [prompt_tokens] * beside)
            return self.engine.loop.run_until_complete(work)

        run(2 * WARM_TOKENS, 1)
        tokens = WARM_TOKENS + LEAST_PER_PROMPT * prompts
        while not (beside := run(tokens, prompts)).outlived:
            tokens *= 2
            if tokens > MOST_TOKENS:
                raise RuntimeError(
                    f"prompts={prompts} of prompt_tokens={prompt_tokens} outlast {tokens // 2} "
                    "decode iterations: give fewer or shorter ones"
                )
        alone = run(tokens, 0)
        iterations = beside.mixed - alone.mixed
        return {
            "iterations": iterations,
            "alone_ms": alone.seconds / (tokens - 1) * 1e3,
            "added_ms": (beside.seconds - alone.seconds) / iterations * 1e3 if iterations else None,
            "tokens": prompts * prompt_tokens / iterations if iterations else None,
            "decoded": tokens,
        }

    async def _together(
        self, running: int, context_tokens: int, tokens: int, prompts: list[int]
    ) -> "Together":
        """Have some requests decode, and when all do, compute prompts one by one."""
        started = [asyncio.Event() for _ in range(running)]
        decoding = [
            asyncio.ensure_future(self._one(self._prompt(number, context_tokens), tokens, event))
            for number, event in enumerate(started)
        ]
        await asyncio.gather(*(event.wait() for event in started))
        began_s = time.perf_counter()
        before = await self._mixed_batches()
        for number, length in enumerate(prompts):
            await self._one(self._prompt(1000 + number, length), 1, asyncio.Event())
        outlived = not any(one.done() for one in decoding)
        await asyncio.gather(*decoding)
        seconds = time.perf_counter() - began_s
        return Together(seconds, await self._mixed_batches() - before, outlived)

    async def _mixed_batches(self) -> int:
        states = await self.engine.tokenizer_manager.get_internal_state()
        return states[0]["econoserve"]["total_mixed_batches"]

    async def _one(self, ids: list[int], tokens: int, started: asyncio.Event) -> None:
        params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
        stream = await self.engine.async_generate(
            input_ids=ids, sampling_params=params, stream=True
        )
        async for _ in stream:
            started.set()

    def state(self) -> dict[str, Any]:
        """EconoServe's figures.

        Returns:
            Plain values; none of stock SGLang.
        """
        return scheduler_state(self.engine, self.job["system"])

    def _totals(self) -> dict[str, int]:
        return {
            name.removeprefix("total_"): value
            for name, value in self.state().items()
            if name.startswith("total_")
        }

    def _prompt(self, number: int, tokens: int) -> list[int]:
        ids = self.job["token_ids"]
        return [ids[(number * 131 + position * 17) % len(ids)] for position in range(tokens)]


def serve(pipe: Connection) -> None:
    """Start the engine and answer until told to stop.

    Args:
        pipe: the first message is the job, later ones are a method's name and its arguments.
    """
    job = pipe.recv()
    os.environ.update(job["environment"])
    for name in ("ECONOSERVE", "ECONOSERVE_CONFIG"):
        os.environ.pop(name, None)
    began_s = time.perf_counter()
    try:
        bench = Bench(job)
        if job["system"] == ECONOSERVE:
            bench.state()
    except BaseException:
        pipe.send({"error": traceback.format_exc()})
        return
    pipe.send({"start_s": time.perf_counter() - began_s})
    try:
        while (message := pipe.recv()) is not None:
            name, arguments = message
            try:
                pipe.send({"result": getattr(bench, name)(**arguments)})
            except Exception:
                pipe.send({"error": traceback.format_exc()})
    except EOFError:
        pass
    finally:
        bench.engine.shutdown()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
