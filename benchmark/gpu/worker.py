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
from typing import Any

from benchmark.scheduler_comparison.worker import (
    ECONOSERVE,
    engine_for,
    flush,
    scheduler_state,
    send_all,
)
from benchmark.scheduler_comparison.workload import Request

WARM_TOKENS = 8


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
            ``iteration_ms``.
        """
        prompts = [self._prompt(number, context_tokens) for number in range(running)]

        def seconds(tokens: int) -> float:
            params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
            began_s = time.perf_counter()
            self.engine.generate(input_ids=prompts, sampling_params=params)
            return time.perf_counter() - began_s

        # The prompts are in the prefix cache after the first time.
        seconds(WARM_TOKENS)
        short_s = seconds(WARM_TOKENS)
        long_s = seconds(WARM_TOKENS + new_tokens)
        return {"iteration_ms": (long_s - short_s) / new_tokens * 1e3}

    def mixed(self, running: int, prompt_tokens: int, prompts: int) -> dict[str, Any]:
        """Time what prompts add to the iterations that compute them beside others that decode.

        Args:
            running: requests that decode meanwhile, at least 1.
            prompt_tokens: tokens of each prompt.
            prompts: how many prompts, one after another.

        Returns:
            ``added_ms`` by each iteration with a prompt to one without, how many there were
            (``iterations``), and the prompt ``tokens`` of each.
        """

        def seconds(beside: int) -> float:
            flush(self.engine)
            work = self._together(running, tokens, [prompt_tokens] * beside)
            return self.engine.loop.run_until_complete(work)

        tokens = WARM_TOKENS + 4 * prompts
        seconds(1)
        alone_s = seconds(0)
        before = self._totals()["mixed_batches"]
        mixed_s = seconds(prompts)
        iterations = self._totals()["mixed_batches"] - before
        return {
            "iterations": iterations,
            "added_ms": (mixed_s - alone_s) / iterations * 1e3 if iterations else None,
            "tokens": prompts * prompt_tokens / iterations if iterations else None,
        }

    async def _together(self, running: int, tokens: int, prompts: list[int]) -> float:
        """Seconds until some requests have decoded, while prompts are computed one by one."""
        began_s = time.perf_counter()
        started = [asyncio.Event() for _ in range(running)]
        decoding = [
            asyncio.ensure_future(self._one(self._prompt(number, 16), tokens, event))
            for number, event in enumerate(started)
        ]
        await asyncio.gather(*(event.wait() for event in started))
        for number, length in enumerate(prompts):
            await self._one(self._prompt(1000 + number, length), 1, asyncio.Event())
        await asyncio.gather(*decoding)
        return time.perf_counter() - began_s

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
