"""Requests for the load tests: seeded, so that every run sends the same ones."""

import asyncio
import random
from dataclasses import dataclass

import httpx
import openai
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
