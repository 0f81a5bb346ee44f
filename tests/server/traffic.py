"""Requests for the load tests: seeded, so that every run sends the same ones."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import openai
import orjson
from live_server import REQUEST_TIMEOUT_S, LiveServer

FIRST_WORD_ID, LAST_WORD_ID = 300, 4000


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: a prompt and exactly how many tokens it gets."""

    prompt_ids: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request got."""

    text: str
    finish_reason: str
    output_tokens: int


def prompt_ids(generator: random.Random, count: int) -> tuple[int, ...]:
    """A prompt of ``count`` arbitrary words."""
    return tuple(generator.randint(FIRST_WORD_ID, LAST_WORD_ID) for _ in range(count))


def mixed(seed: int, count: int) -> list[Planned]:
    """Short and long prompts with short and long answers; some share a prefix."""
    generator = random.Random(seed)
    shared = prompt_ids(generator, 24)
    plans = []
    for number in range(count):
        start = shared if number % 4 == 0 else ()
        length = generator.choice((4, 12, 30, 60, 180 if number % 10 == 0 else 45))
        answer = generator.choice((3, 8, 20, 60, 120))
        plans.append(Planned((*start, *prompt_ids(generator, length)), answer))
    return plans


def body(plan: Planned, model: str) -> dict:
    """The request's fields for a text completion."""
    return {
        "model": model,
        "prompt": list(plan.prompt_ids),
        "max_tokens": plan.output_tokens,
        "temperature": 0,
    }


async def stream_one(client: openai.AsyncOpenAI, plan: Planned, model: str) -> Answer:
    """Stream one text completion to its end."""
    text, reason, usage = "", "", None
    stream = await client.completions.create(
        **body(plan, model),
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.text
            reason = choice.finish_reason or reason
    return Answer(text, reason, usage.completion_tokens)


def stream_all(server: LiveServer, plans: list[Planned]) -> list[Answer]:
    """Stream all requests at the same time."""

    async def run() -> list[Answer]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=REQUEST_TIMEOUT_S * 2,
            http_client=httpx.AsyncClient(limits=httpx.Limits(max_connections=len(plans))),
        ) as client:
            return await asyncio.gather(*(stream_one(client, plan, server.model) for plan in plans))

    return asyncio.run(run())


@dataclass(frozen=True, slots=True)
class Timed:
    """What a streamed request got, and when.

    Attributes:
        ids: its output tokens.
        reason: why it ended.
        sent_s: when it was sent.
        first_s: when its first token came.
        last_s: when its last token came.
        report: the scheduler's report of it.
    """

    ids: tuple[int, ...]
    reason: str
    sent_s: float
    first_s: float
    last_s: float
    report: dict

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Time per later token."""
        return (self.last_s - self.first_s) / max(len(self.ids) - 1, 1)


def generate_fields(plan: Planned) -> dict:
    """The body of a streamed ``/generate`` request for exactly so many tokens."""
    sampling = {"max_new_tokens": plan.output_tokens, "ignore_eos": True, "temperature": 0}
    return {"input_ids": list(plan.prompt_ids), "stream": True, "sampling_params": sampling}


def client_of(server: LiveServer) -> httpx.AsyncClient:
    """A client for this server that keeps no connections."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=server.url, timeout=REQUEST_TIMEOUT_S, limits=limits)


async def time_one(client: httpx.AsyncClient, plan: Planned, headers: dict | None = None) -> Timed:
    """Stream one request to its end."""
    sent_s = time.monotonic()
    first_s, last, fields = None, None, generate_fields(plan)
    async with client.stream("POST", "/generate", json=fields, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first_s = first_s or time.monotonic()
                last = line
    event = orjson.loads(last[6:])
    meta = event["meta_info"]
    return Timed(
        tuple(event["output_ids"]),
        meta["finish_reason"]["type"],
        sent_s,
        first_s,
        time.monotonic(),
        meta.get("econoserve", {}),
    )


async def time_each(
    client: httpx.AsyncClient, plans: Sequence[Planned], at_a_time: int
) -> list[Timed]:
    """Stream requests, so many at a time."""
    turns = asyncio.Semaphore(at_a_time)

    async def one(plan: Planned) -> Timed:
        async with turns:
            return await time_one(client, plan)

    return await asyncio.gather(*map(one, plans))


def time_all(
    server: LiveServer, plans: Sequence[Planned], at_a_time: int | None = None
) -> list[Timed]:
    """Stream all requests, by default at the same time."""

    async def run() -> list[Timed]:
        async with client_of(server) as client:
            return await time_each(client, plans, at_a_time or len(plans))

    return asyncio.run(run())


def total_tokens(plans: Sequence[Planned]) -> int:
    """Prompts and answers together."""
    return sum(len(plan.prompt_ids) + plan.output_tokens for plan in plans)


def growth(before: dict, after: dict) -> dict[str, int]:
    """What the scheduler's totals have grown by, without their prefix."""
    return {
        name.removeprefix("total_"): after[name] - before[name]
        for name in after
        if name.startswith("total_")
    }
