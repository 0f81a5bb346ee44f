"""Sends the soak's requests and judges the answers.

Owns the connections and the verdict on each request. What it cannot explain is a problem.
"""

import asyncio
import contextlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmark.soak.requests import GENERATE, Leave, Request

PATIENCE_S = 180.0
"""A request without an answer for so long hangs."""


@dataclass(slots=True)
class Choice:
    """One answer as it was read."""

    text: str = ""
    reason: str | None = None


@dataclass(slots=True)
class Answer:
    """What came back.

    Attributes:
        choices: by index.
        tokens: output tokens of all of them.
    """

    choices: dict[int, Choice] = field(default_factory=dict)
    tokens: int = 0

    def take(self, event: dict[str, Any], whole_text: bool) -> None:
        """Read one event, or the whole answer.

        Args:
            event: its JSON.
            whole_text: the text is all so far, not what is new.
        """
        if "meta_info" in event:
            event = _as_openai(event)
        for part in event["choices"]:
            choice = self.choices.setdefault(part["index"], Choice())
            message = part.get("message") or part.get("delta") or part
            text = message.get("text") or message.get("content") or ""
            choice.text = text if whole_text else choice.text + text
            choice.reason = part.get("finish_reason") or choice.reason
        usage = event.get("usage") or {}
        self.tokens = usage.get("completion_tokens", self.tokens)


def _as_openai(event: dict[str, Any]) -> dict[str, Any]:
    meta = event["meta_info"]
    reason = (meta["finish_reason"] or {}).get("type")
    return {
        "choices": [{"index": 0, "text": event["text"], "finish_reason": reason}],
        "usage": {"completion_tokens": meta["completion_tokens"]},
    }


class Client:
    """Sends requests and keeps the score.

    Args:
        http: connections to the server.

    Attributes:
        outcomes: how many requests ended in which way.
        problems: what must not have happened, in words.
        tokens: output tokens received.
    """

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._canaries: dict[int, str] = {}
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.tokens = 0

    async def send(self, request: Request) -> None:
        """Send a request, wait for its end and judge it.

        Args:
            request: the request.
        """
        problem = None
        try:
            async with asyncio.timeout(PATIENCE_S):
                outcome, problem = await self._end_of(request)
        except TimeoutError:
            outcome, problem = "hung", f"no answer within {PATIENCE_S:g} s"
        except (httpx.HTTPError, KeyError, ValueError) as error:
            outcome, problem = "broken", repr(error)
        self.outcomes[outcome] += 1
        if problem is not None:
            shape = {key: value for key, value in request.fields.items() if key not in _LONG}
            self.problems.append(f"request {request.number} {request.path} {shape}: {problem}")

    async def _end_of(self, request: Request) -> tuple[str, str | None]:
        if request.leave is Leave.EARLY:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(request.after_s):
                    return await self._judged(request)
            return "left early", None
        if request.leave is not Leave.ABORT:
            return await self._judged(request)
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(self._judged(request))
            await asyncio.sleep(request.after_s)
            await self._http.post("/abort_request", json={"rid": request.fields["rid"]})
        return answer.result()

    async def _judged(self, request: Request) -> tuple[str, str | None]:
        answer = Answer()
        async with self._http.stream(
            "POST", request.path, json=request.fields, headers=request.headers
        ) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                if response.status_code == request.status:
                    return "refused", None
                return f"HTTP {response.status_code}", text[:300]
            if request.status != 200:
                return "HTTP 200", f"HTTP {request.status} was expected"
            if not request.streams:
                await response.aread()
                answer.take(response.json(), whole_text=True)
            elif not await self._read_stream(request, response, answer):
                return "left mid-stream", None
        self.tokens += answer.tokens
        return self._verdict(request, answer)

    async def _read_stream(
        self, request: Request, response: httpx.Response, answer: Answer
    ) -> bool:
        """Read to the end, or as far as the client wants; returns whether it was the end."""
        events, ended = 0, False
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                ended = True
                continue
            answer.take(json.loads(line[6:]), whole_text=request.path == GENERATE)
            events += 1
            if request.leave is Leave.MID_STREAM and events >= request.after_events:
                return False
        if not ended:
            raise ValueError("the stream ended without [DONE]")
        return True

    def _verdict(self, request: Request, answer: Answer) -> tuple[str, str | None]:
        reasons = {choice.reason for choice in answer.choices.values()}
        if request.leave is Leave.ABORT and reasons == {"abort"}:
            return "aborted", None
        if not reasons <= {"stop", "length"}:
            return "broken", f"finish reasons {reasons}"
        if len(answer.choices) != request.choices:
            return "broken", f"{len(answer.choices)} choices instead of {request.choices}"
        if request.tokens is not None and answer.tokens != request.tokens * request.choices:
            return "broken", f"{answer.tokens} tokens instead of {request.tokens} per choice"
        for choice in answer.choices.values():
            complete = choice.reason == "stop" and request.pattern is not None
            if complete and not re.fullmatch(request.pattern, choice.text):
                return "broken", f"{choice.text!r} does not match {request.pattern}"
        if request.canary is not None:
            text = answer.choices[0].text
            if text != self._canaries.setdefault(request.canary, text):
                return "broken", f"canary {request.canary} got another text than before"
        return "answered", None


_LONG = ("prompt", "input_ids", "messages")
