"""The load generator: ``sglang.bench_serving``'s arrivals, and what it lacks.

Owns the clock of the measurement. ``bench_serving`` (``sglang.benchmark.serving``) replays times of
arrival with its ``get_request``; it has no objectives per request, takes a response's length from
``max_tokens`` where the server does not say, and keeps no record per request. The sender here has
these. It speaks to all servers in the same way: OpenAI's completions, streamed, with the count of
tokens in every chunk. Runs in a process of its own, the same for all systems, which stays up.
"""

import asyncio
import itertools
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

from benchmark.cpu_engine.worker import Handler, serve

POLL_S = 1.0
EVENT = b"data: "
END = b"[DONE]"
MODE = re.compile(r'\b(?:mode|kind)="([^"]*)"')
COUNTERS = ("_total", "_sum", "_count", "]")
"""How the names of metrics end that only rise."""


def parse_metrics(text: str) -> dict[str, float]:
    """Read Prometheus' text format.

    Args:
        text: what ``/metrics`` answers.

    Returns:
        By name of the metric, the sum over its labels; where one of these is ``mode`` or
        ``kind``, also by its value, as ``name[value]``. Values that are no numbers are left out.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        series, _, number = line.rpartition(" ")
        name, _, labels = series.partition("{")
        value = float(number)
        if math.isnan(value):
            continue
        names = [name]
        if mode := MODE.search(labels):
            names.append(f"{name}[{mode[1]}]")
        for key in names:
            found[key] = found.get(key, 0.0) + value
    return found


async def _send(session: Any, job: dict[str, Any], fields: dict[str, Any], start_s: float) -> dict:
    """Send one request and time its answer from when it was due."""
    import aiohttp
    import orjson

    due_s = start_s + fields["arrival_s"]
    found = {
        "lag_s": time.perf_counter() - due_s,
        "ttft_s": None,
        "jct_s": None,
        "tokens": 0,
        "error": None,
    }
    body = {**job["body"], **fields["body"], "prompt": fields["prompt_ids"]}
    reason = None
    try:
        async with session.post(
            f"{job['url']}/v1/completions", json=body, headers=fields["headers"]
        ) as answer:
            if answer.status != 200:
                found["error"] = f"HTTP {answer.status}: {(await answer.text())[:300]}"
                return found
            async for line in answer.content:
                if not line.startswith(EVENT) or line.startswith(END, len(EVENT)):
                    continue
                event = orjson.loads(line[len(EVENT) :])
                now_s = time.perf_counter()
                if "error" in event:
                    found["error"] = str(event["error"])[:300]
                    return found
                usage, choices = event.get("usage"), event.get("choices")
                if usage and usage["completion_tokens"] > found["tokens"]:
                    found["tokens"] = usage["completion_tokens"]
                    found["jct_s"] = now_s - due_s
                    if found["ttft_s"] is None:
                        found["ttft_s"] = found["jct_s"]
                if choices and choices[0].get("finish_reason"):
                    reason = choices[0]["finish_reason"]
    except aiohttp.ClientError as error:
        found["error"] = repr(error)[:300]
        return found
    if reason != "stop":
        found["error"] = f"finish_reason={reason}: a response ends with EOS"
    return found


async def _poll(session: Any, url: str, samples: list[tuple[float, dict[str, float]]]) -> None:
    for _ in itertools.count():
        async with session.get(f"{url}/metrics") as answer:
            samples.append((time.perf_counter(), parse_metrics(await answer.text())))
        await asyncio.sleep(POLL_S)


async def _gauges(session: Any, job: dict[str, Any]) -> dict[str, float]:
    async with session.get(f"{job['url']}/metrics") as answer:
        return parse_metrics(await answer.text())


async def replay(job: dict[str, Any]) -> dict[str, Any]:
    """Send requests at their times and wait for all answers.

    Args:
        job: ``url``, ``backend`` (``bench_serving``'s name of the system),
            ``body`` (fields of all requests), ``requests`` (each with ``arrival_s``,
            ``prompt_ids``, ``body`` and ``headers``), ``timeout_s``, and ``gauge``, the name of the
            metric to follow.

    Returns:
        ``answers``, in the order of the requests; ``counters``, the metrics' rise meanwhile;
        ``gauge``, its samples while requests were under way; and the span in seconds.
    """
    import aiohttp
    from sglang.benchmark.datasets import DatasetRow
    from sglang.benchmark.serving import get_request

    rows = [
        DatasetRow(prompt=one, prompt_len=0, output_len=0, timestamp=1e3 * one["arrival_s"])
        for one in job["requests"]
    ]
    connector = aiohttp.TCPConnector(limit=0)
    limits = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, timeout=limits, read_bufsize=1 << 20
    ) as session:
        before = await _gauges(session, job)
        samples: list[tuple[float, dict[str, float]]] = []
        poller = asyncio.create_task(_poll(session, job["url"], samples))
        start_s = time.perf_counter()
        tasks = []
        async for row in get_request(rows, float("inf"), use_trace_timestamps=True):
            tasks.append(asyncio.create_task(_send(session, job, row.prompt, start_s)))
        left_s = max(start_s + job["timeout_s"] - time.perf_counter(), 0.0)
        _, late = await asyncio.wait(tasks, timeout=left_s)
        end_s = time.perf_counter()
        for task in (poller, *late):
            task.cancel()
        await asyncio.gather(poller, *tasks, return_exceptions=True)
        after = await _gauges(session, job)
    unanswered = {"lag_s": 0.0, "ttft_s": None, "jct_s": None, "tokens": 0, "error": "timeout"}
    return {
        "answers": [unanswered if task in late else task.result() for task in tasks],
        "counters": {
            name: value - before.get(name, 0.0)
            for name, value in after.items()
            if value != before.get(name, 0.0) and name.endswith(COUNTERS)
        },
        "gauge": [sample.get(job["gauge"]) for at_s, sample in samples if at_s <= end_s],
        "span_s": end_s - start_s,
    }


def take_precedence() -> bool:
    """Run this thread before all ordinary ones, so that busy servers do not delay arrivals.

    Servers that spin while they wait would else delay their own load, others not.

    Returns:
        Whether the system allows it; nothing changes where it does not.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        return False
    return True


def start(_job: dict[str, Any]) -> tuple[Handler, dict[str, Any]]:
    """Import the load generator.

    Returns:
        What answers a job's path with nothing, having written its result beside it; the logit
        processor that ends SGLang's responses; and whether it takes precedence.
    """
    from sglang.benchmark.serving import flush_server_cache
    from sglang.benchmark.utils import set_ulimit

    from benchmark.scheduler_comparison.processor import EndOnTime

    set_ulimit()

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        job = json.loads(Path(request["job"]).read_text())
        flush_server_cache(job["url"], job["backend"])
        Path(request["result"]).write_text(json.dumps(asyncio.run(replay(job))))
        return {}

    return handle, {"processor": EndOnTime.to_str(), "has_precedence": take_precedence()}


if __name__ == "__main__":
    serve(start)
