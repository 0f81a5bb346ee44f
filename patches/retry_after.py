"""Seam: the HTTP answer to a request that the scheduler refuses.

Upstream: an abort with a status becomes an ``HTTPException``, for OpenAI's endpoints answered by
``handle_request``; its headers are dropped by every handler, its status by some, and its body
differs by endpoint, without an OpenAI error type. Changed: a middleware
gives every answer with status 429 or 503 a ``Retry-After`` header, and answers a refused request
with OpenAI's error object. Why no public seam serves: the middleware is one; the module only
carries the refusal from the tokenizer manager to it.
"""

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import HTTPException
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TARGETS: dict[str, dict[str, str]] = {
    "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase": {
        "handle_request": "f47d3e8fad409f773a3c8cfc48246b8cbd00825b89ffe333796649065282ee62",
    },
}

RETRY_AFTER = "Retry-After"
"""Header with the seconds after which a refused request may be sent again."""

KEY = "econoserve_refusal"
"""Place in an HTTP request's state for its refusal: under our middleware, until it is answered."""

ERRORS = {
    HTTPStatus.TOO_MANY_REQUESTS: ("rate_limit_error", "rate_limit_exceeded"),
    HTTPStatus.SERVICE_UNAVAILABLE: ("service_unavailable_error", "server_is_overloaded"),
}
"""By the statuses that invite to try again: ``type`` and ``code`` of OpenAI's error object."""

OWN_FORMAT = ("/v1/messages", "/api/")
"""Paths of other vendors' APIs: their clients read other error objects, which upstream writes."""


def refusal_of(meta_info: Mapping[str, Any]) -> HTTPException | None:
    """The refusal in an output, if it is one that invites to try again.

    Args:
        meta_info: the output's; its ``econoserve.retry_after_s`` says when to try.

    Returns:
        An exception with status, message and ``Retry-After`` in whole seconds, at least 1; or
        ``None``.
    """
    reason = meta_info.get("finish_reason") or {}
    status = reason.get("status_code")
    if reason.get("type") != "abort" or status not in ERRORS:
        return None
    report = meta_info.get("econoserve") or {}
    seconds = max(1, math.ceil(report.get("retry_after_s") or 1))
    return HTTPException(int(status), reason.get("message"), {RETRY_AFTER: str(seconds)})


def can_answer(request: Any) -> bool:
    """Whether our middleware will answer an HTTP request that is refused.

    Args:
        request: the HTTP request, if any.

    Returns:
        ``False`` without HTTP, under an entry point that is not ours, and once the status is sent.
    """
    return hasattr(getattr(request, "state", None), KEY)


def answer_with(request: Any, refusal: HTTPException) -> None:
    """Leave a refusal for the middleware; nothing happens where there is none.

    Args:
        request: the HTTP request, if any.
        refusal: from ``refusal_of``; any other exception is ignored.
    """
    if can_answer(request) and RETRY_AFTER in (refusal.headers or {}):
        setattr(request.state, KEY, refusal)


class RetryAfter:
    """ASGI middleware that completes answers with status 429 or 503.

    Args:
        app: the application below.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; see ASGI.

        Args:
            scope: the request.
            receive: gives its body.
            send: takes the answer.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state[KEY] = None
        body: bytes | None = None

        async def complete(message: Message) -> None:
            nonlocal body
            if message["type"] == "http.response.start":
                body = _completed(message, state.pop(KEY, None), scope["path"])
            elif message["type"] == "http.response.body" and body is not None:
                if message.get("more_body"):
                    return
                message = {**message, "body": body}
            await send(message)

        await self._app(scope, receive, complete)


def _completed(start: Message, refusal: HTTPException | None, path: str) -> bytes | None:
    """Complete an answer's start; its new body, if it is to get one."""
    if refusal is not None and start["status"] >= HTTPStatus.BAD_REQUEST:
        # Some endpoints answer any exception with 400 or 500.
        start["status"] = refusal.status_code
    else:
        refusal = None
    if start["status"] not in ERRORS:
        return None
    headers = MutableHeaders(scope=start)
    if refusal is None:
        headers.setdefault(RETRY_AFTER, "1")
        return None
    headers[RETRY_AFTER] = refusal.headers[RETRY_AFTER]
    if path.startswith(OWN_FORMAT):
        return None
    kind, code = ERRORS[start["status"]]
    error = {"message": refusal.detail, "type": kind, "param": None, "code": code}
    body = orjson.dumps({"error": error})
    headers["content-type"] = "application/json"
    headers["content-length"] = str(len(body))
    return body


def install() -> None:
    """Add the middleware to SGLang's HTTP application, before it starts."""
    from sglang.srt.entrypoints import http_server

    http_server.app.add_middleware(RetryAfter)
