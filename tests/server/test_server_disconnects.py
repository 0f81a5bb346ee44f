"""Clients that go away, and requests that are aborted: their KV comes back, others are served."""

import asyncio
import random
from typing import Any

import httpx
from live_server import REQUEST_TIMEOUT_S, LiveServer, wait_until
from traffic import prompt_ids

CLIENTS = 40
LONG_ANSWER = 400


def long_request(generator: random.Random, number: int) -> tuple[str, dict[str, Any]]:
    """A request that takes far longer than the test: each endpoint, most of them streaming."""
    prompt = prompt_ids(generator, generator.choice((8, 24, 40, 120)))
    text = f"Tell me more about bridge number {number}. " * generator.choice((1, 3))
    length = {"max_tokens": LONG_ANSWER, "ignore_eos": True, "stream": number % 5 != 0}
    if number % 3 == 0:
        sampling = {"max_new_tokens": LONG_ANSWER, "ignore_eos": True}
        return "/generate", {
            "input_ids": prompt,
            "stream": number % 5 != 0,
            "sampling_params": sampling,
        }
    if number % 3 == 1:
        return "/v1/completions", {"model": "default", "prompt": prompt, **length}
    message = {"role": "user", "content": text}
    return "/v1/chat/completions", {"model": "default", "messages": [message], **length}


async def read(client: httpx.AsyncClient, path: str, fields: dict[str, Any], lines: int) -> None:
    """Read so many lines of the answer, then close the connection."""
    async with client.stream("POST", path, json=fields) as response:
        assert response.status_code == 200, await response.aread()
        async for _ in response.aiter_lines():
            lines -= 1
            if lines == 0:
                return


async def disconnect_all(server: LiveServer) -> None:
    """Start many clients and close them: some at once, some when every stage has some."""
    generator = random.Random(11)
    async with httpx.AsyncClient(
        base_url=server.url,
        timeout=REQUEST_TIMEOUT_S,
        limits=httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=0),
    ) as client:
        tasks = [
            asyncio.create_task(
                read(client, *long_request(generator, number), generator.choice((1, 9, 10_000)))
            )
            for number in range(CLIENTS)
        ]
        leaving = generator.sample(tasks, CLIENTS)
        for task in leaving[: CLIENTS // 4]:
            task.cancel()
            # A look at the server between two clients that leave: no fixed pace.
            await asyncio.to_thread(server.state)
        await asyncio.to_thread(server.wait_for_every_stage)
        for task in leaving[CLIENTS // 4 :]:
            task.cancel()
            await asyncio.to_thread(server.state)
        results = await asyncio.gather(*tasks, return_exceptions=True)
    wrong = [r for r in results if r is not None and not isinstance(r, asyncio.CancelledError)]
    assert not wrong, wrong


def test_clients_that_leave_at_any_stage_free_their_cache(server):
    asyncio.run(disconnect_all(server))
    server.assert_drained()
    answer = server.openai.completions.create(
        model="default", prompt="Still there?", max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 5


async def generate(client: httpx.AsyncClient, rid: str, prompt: tuple[int, ...], tokens: int):
    """One request under a known id; its last ``meta_info``."""
    sampling = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
    fields = {"rid": rid, "input_ids": prompt, "sampling_params": sampling}
    response = await client.post("/generate", json=fields)
    assert response.status_code == 200, response.text
    return response.json()["meta_info"]


def async_client(server: LiveServer) -> httpx.AsyncClient:
    """A client for this server."""
    return httpx.AsyncClient(base_url=server.url, timeout=REQUEST_TIMEOUT_S)


def test_abort_of_one_request_leaves_the_others(server):
    generator = random.Random(3)

    async def run() -> tuple[dict[str, Any], dict[str, Any]]:
        async with async_client(server) as client:
            victim = asyncio.create_task(
                generate(client, "victim", prompt_ids(generator, 20), LONG_ANSWER)
            )
            other = asyncio.create_task(generate(client, "other", prompt_ids(generator, 20), 300))
            await asyncio.to_thread(
                wait_until, lambda: server.state()["running"] == 2, 20, "both requests run"
            )
            reply = await client.post("/abort_request", json={"rid": "victim"})
            assert reply.status_code == 200
            return await victim, await other

    victim, other = asyncio.run(run())
    assert victim["finish_reason"]["type"] == "abort"
    assert 0 < victim["completion_tokens"] < LONG_ANSWER
    assert other["finish_reason"] == {"type": "length", "length": 300}
    assert other["completion_tokens"] == 300


def test_abort_of_all_ends_running_parked_and_queued_requests(server):
    generator = random.Random(5)

    async def run() -> list[dict[str, Any]]:
        async with async_client(server) as client:
            tasks = [
                asyncio.create_task(
                    generate(client, f"all-{n}", prompt_ids(generator, 40), LONG_ANSWER)
                )
                for n in range(32)
            ]
            await asyncio.to_thread(server.wait_for_every_stage)
            reply = await client.post("/abort_request", json={"rid": "", "abort_all": True})
            assert reply.status_code == 200
            return await asyncio.gather(*tasks)

    metas = asyncio.run(run())
    ends = [meta["finish_reason"]["type"] for meta in metas]
    # By then some may have got all they asked for; one in each stage had not.
    assert ends.count("abort") >= 3
    for meta, end in zip(metas, ends, strict=True):
        assert end == "abort" or meta["completion_tokens"] == LONG_ANSWER
