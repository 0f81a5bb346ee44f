"""A paused engine holds requests in every stage; what happens to them then is seen at leisure."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from live_server import REQUEST_TIMEOUT_S, LiveServer, wait_until
from traffic import Planned, prompt_ids, stream_all

from econoserve import demo_model


@asynccontextmanager
async def paused(server: LiveServer, client: httpx.AsyncClient, mode: str) -> AsyncIterator[None]:
    """Wait until requests are in every stage, then hold them there."""
    await asyncio.to_thread(server.wait_for_every_stage)
    reply = await client.post("/pause_generation", json={"mode": mode})
    assert reply.status_code == 200, reply.text
    try:
        yield
    finally:
        await client.post("/continue_generation", json={})


def fields_of(plan: Planned, stream: bool) -> dict[str, Any]:
    """The body of a ``/generate`` request."""
    sampling = {"max_new_tokens": plan.output_tokens, "ignore_eos": True, "temperature": 0}
    return {"input_ids": list(plan.prompt_ids), "stream": stream, "sampling_params": sampling}


def client_of(server: LiveServer) -> httpx.AsyncClient:
    """A client for this server that keeps no connections."""
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=server.url, timeout=REQUEST_TIMEOUT_S, limits=limits)


def test_clients_that_leave_while_parked_or_queued_free_their_cache(server):
    generator = random.Random(21)
    plans = [Planned(prompt_ids(generator, 40), 400) for _ in range(20)]

    async def run() -> None:
        async with client_of(server) as client:
            clients = [
                asyncio.create_task(client.post("/generate", json=fields_of(plan, number % 2 == 0)))
                for number, plan in enumerate(plans)
            ]
            async with paused(server, client, "in_place"):
                held = server.state()
                assert held["parked"] > 0
                assert held["waiting"] > 0
                for task in clients:
                    task.cancel()

                def gone() -> bool:
                    state = server.state()
                    return state["parked"] == state["waiting"] == 0

                await asyncio.to_thread(wait_until, gone, 20, "parked and queued requests end")
                assert server.state()["held_tokens"] < held["held_tokens"]
            await asyncio.gather(*clients, return_exceptions=True)

    asyncio.run(run())


def test_pause_that_retracts_takes_parked_requests_back_and_lets_weights_be_replaced(server):
    generator = random.Random(22)
    plans = [Planned(prompt_ids(generator, 40), 300) for _ in range(20)]
    kept = (0, 1, 2, 3)
    failures = server.state()["total_allocation_failures"]

    async def run() -> list[dict[str, Any]]:
        async with client_of(server) as client:
            clients = [
                asyncio.create_task(
                    client.post("/generate", json={"rid": f"p{n}", **fields_of(plan, False)})
                )
                for n, plan in enumerate(plans)
            ]
            async with paused(server, client, "retract"):
                state = server.state()
                assert state["parked"] == state["running"] == state["held_tokens"] == 0, state
                assert state["waiting"] > 0
                assert state["total_allocation_failures"] == failures
                # The same weights again: what follows must fit what was generated before.
                weights = {"model_path": str(demo_model.ensure()), "flush_cache": False}
                reply = await client.post("/update_weights_from_disk", json=weights)
                assert reply.json()["success"], reply.text
                for n in range(len(kept), len(plans)):
                    await client.post("/abort_request", json={"rid": f"p{n}"})
            responses = await asyncio.gather(*clients)
            return [responses[n].json() for n in kept]

    answers = asyncio.run(run())
    # Part of it was computed before the pause; it reads as if nothing had happened.
    alone = stream_all(server, [plans[n] for n in kept])
    assert [answer["text"] for answer in answers] == [answer.text for answer in alone]
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [300] * len(kept)
