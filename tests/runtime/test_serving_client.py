"""The serving benchmark's client against a server of our own that does as it is told."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark.serving.client import replay

STEP_S = 0.05


async def complete(request):
    """Stream as many tokens as asked for, one in each step."""
    body = await request.json()
    request.app["seen"].append((body, request.headers.get("x-slo-ttft-ms")))
    tokens = body["custom_params"]["tokens"]
    if tokens == 0:
        return web.Response(status=400, text="no such length")
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    for number in range(1, tokens + 1):
        await asyncio.sleep(STEP_S)
        choice = {"text": "", "finish_reason": "stop" if number == tokens else None}
        event = {"choices": [choice], "usage": {"completion_tokens": number}}
        await answer.write(f"data: {json.dumps(event)}\n\n".encode())
    usage = {"choices": [], "usage": {"completion_tokens": tokens}}
    await answer.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
    return answer


async def metrics(request):
    """A counter of requests, and a gauge."""
    count = len(request.app["seen"])
    return web.Response(text=f'sent_total{{a="b"}} {count + 3}\nuse 0.25\n')


async def served(job):
    app = web.Application()
    app["seen"] = []
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    try:
        return await replay({**job, "url": f"http://127.0.0.1:{port}"}), app["seen"]
    finally:
        await runner.cleanup()


def job(*requests, timeout_s=10.0):
    return {
        "gauge": "use",
        "timeout_s": timeout_s,
        "body": {"max_tokens": 99, "stream": True},
        "requests": [
            {
                "arrival_s": at_s,
                "prompt_ids": [7] * tokens,
                "body": {"custom_params": {"tokens": tokens}},
                "headers": {"x-slo-ttft-ms": f"{tokens}"},
            }
            for at_s, tokens in requests
        ],
    }


def test_answers_are_timed_from_when_they_were_due():
    found, seen = asyncio.run(served(job((0.0, 3), (0.3, 6), (0.4, 1))))
    assert [answer["tokens"] for answer in found["answers"]] == [3, 6, 1]
    assert [answer["error"] for answer in found["answers"]] == [None] * 3
    for answer, tokens in zip(found["answers"], (3, 6, 1), strict=True):
        assert answer["ttft_s"] >= STEP_S
        assert answer["jct_s"] >= tokens * STEP_S
        assert answer["jct_s"] - answer["ttft_s"] >= 0.9 * (tokens - 1) * STEP_S
    assert found["span_s"] >= 0.3 + 6 * STEP_S
    bodies = {header: body for body, header in seen}
    assert bodies["3"] == {
        "max_tokens": 99,
        "stream": True,
        "custom_params": {"tokens": 3},
        "prompt": [7, 7, 7],
    }
    assert found["counters"] == {"sent_total": 3.0}
    assert found["gauge"]
    assert set(found["gauge"]) == {0.25}


def test_errors_and_late_answers_are_told():
    found, _ = asyncio.run(served(job((0.0, 0), (0.0, 1), (0.0, 200), timeout_s=1.0)))
    refused, good, late = found["answers"]
    assert refused["error"] == "HTTP 400: no such length"
    assert refused["ttft_s"] is None
    assert good["error"] is None
    assert late == {"lag_s": 0.0, "ttft_s": None, "jct_s": None, "tokens": 0, "error": "timeout"}
    assert found["span_s"] == pytest.approx(1.0, abs=0.5)
