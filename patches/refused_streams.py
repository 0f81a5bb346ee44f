"""Seam: the HTTP status of a streamed ``/generate`` request that is refused.

Upstream: ``serve_generate_request`` answers 200 before it has looked at a streamed request, so
that a refusal becomes an event in the stream; if the request was refused before it was
normalized, the task that runs after the response raises and closes the client's connection.
Changed: the first event is awaited before the status is sent, as upstream does for OpenAI's
endpoints; what is raised instead of a first event is answered as for a request that is not
streamed. Why no public seam serves: the route has none. An upstream route that does the same
would make this module unnecessary.
"""

import functools
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi.responses import Response, StreamingResponse
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import GenerateReqInput

TARGETS: dict[str, dict[str, str]] = {
    "sglang.srt.entrypoints.http_server": {
        "serve_generate_request": "4dbe7f4e15a9289815a9066c048330c3f7512254225d107de24c2d38387b9dab",
    },
}

EVENT = b"data: "


def install() -> None:
    """Let ``/generate`` refuse streamed requests with an HTTP status."""
    upstream = http_server.serve_generate_request

    @functools.wraps(upstream)
    async def serve_generate_request(obj: GenerateReqInput, request: Any) -> Response:
        return await _with_status(await upstream(obj, request))

    http_server.serve_generate_request = serve_generate_request


async def _with_status(response: Response) -> Response:
    if not isinstance(response, StreamingResponse):
        return response
    events = aiter(response.body_iterator)
    first = await anext(events, None)
    error = _error_of(first)
    if error is not None:
        await events.aclose()
        # Without the response's background task: there is nothing to abort.
        return http_server.ORJSONResponse({"error": error}, status_code=error["code"])
    response.body_iterator = _again(first, events)
    return response


def _error_of(event: bytes | None) -> dict[str, Any] | None:
    if event is None or not event.startswith(EVENT + b'{"error"'):
        return None
    return orjson.loads(event[len(EVENT) :])["error"]


async def _again(first: bytes | None, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if first is not None:
        yield first
    async for event in events:
        yield event
