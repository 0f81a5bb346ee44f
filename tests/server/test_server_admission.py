"""Requests refused for the load: status, Retry-After, OpenAI's error; accepted ones go on."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.testclient import TestClient
from live_server import KVC_TOKENS, LiveServer, wait_until

from econoserve import demo_model
from econoserve.patches.retry_after import RetryAfter, answer_with, can_answer, refusal_of

MAX_QUEUE = 2
FLAGS = (
    *("--max-running-requests", "1", "--econoserve-max-queue", str(MAX_QUEUE)),
    *("--econoserve-late", "reject"),
)
LONG_TOKENS = KVC_TOKENS - 200
TIGHT = {"x-slo-ttft-ms": "0.001"}
WAIT_S = 30.0
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/generate")
ERRORS = {
    429: ("rate_limit_error", "rate_limit_exceeded"),
    503: ("service_unavailable_error", "server_is_overloaded"),
}


@pytest.fixture(scope="module")
def small_server(holder) -> Iterator[LiveServer]:
    """A server that runs one request and lets two wait; it ends with this module."""
    holder.running(*FLAGS)
    server = holder.take(*FLAGS)
    yield server
    assert server.stop() == 0


def fields_of(endpoint: str, tokens: int, stream: bool, prompts: int = 1) -> dict[str, Any]:
    """The body of a request for exactly so many tokens."""
    text = "A good request" if prompts == 1 else ["A good request"] * prompts
    if endpoint == "/generate":
        sampling = {"max_new_tokens": tokens, "ignore_eos": True}
        return {"text": text, "stream": stream, "sampling_params": sampling}
    common = {"model": "default", "max_tokens": tokens, "stream": stream, "ignore_eos": True}
    if endpoint == "/v1/completions":
        return {"prompt": text, **common}
    return {"messages": [{"role": "user", "content": text}], **common}


@contextmanager
def busy(server: LiveServer) -> Iterator[None]:
    """Inside, a long request runs; it is given up at the end, and nothing may be left then."""
    fields = fields_of("/generate", LONG_TOKENS, stream=True)
    with server.http.stream("POST", "/generate", json=fields) as stream:
        assert stream.status_code == 200
        yield
    server.assert_drained()


@contextmanager
def full(server: LiveServer) -> Iterator[None]:
    """Inside, the queue is full; those who wait are served afterwards."""
    with ThreadPoolExecutor(MAX_QUEUE) as pool:
        with busy(server):
            waiters = [
                pool.submit(server.http.post, "/generate", json=fields_of("/generate", 4, False))
                for _ in range(MAX_QUEUE)
            ]
            wait_until(lambda: server.state()["waiting"] == MAX_QUEUE, WAIT_S, "a full queue")
            yield
        for waiter in waiters:
            answer = waiter.result()
            assert answer.status_code == 200, answer.text
            assert answer.json()["meta_info"]["completion_tokens"] == 4


def assert_refused(response: Any, status: int) -> None:
    """The answer says so in its status, its header and OpenAI's error object."""
    assert response.status_code == status, response.text
    assert response.headers["retry-after"].isdecimal()
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ERRORS[status]
    assert error["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_full_queue_is_429(small_server, stream):
    with full(small_server):
        for endpoint in ENDPOINTS:
            response = small_server.http.post(endpoint, json=fields_of(endpoint, 4, stream))
            assert_refused(response, 429)
        if not stream:
            fields = {"model": str(demo_model.ensure()), "input": "Now?", "max_output_tokens": 4}
            assert_refused(small_server.http.post("/v1/responses", json=fields), 429)
        state = small_server.state()
        assert (state["running"], state["waiting"]) == (1, MAX_QUEUE), "the test took too long"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_request_that_would_be_late_is_503(small_server, stream):
    with busy(small_server):
        for endpoint in ENDPOINTS:
            fields = fields_of(endpoint, 4, stream)
            response = small_server.http.post(endpoint, json=fields, headers=TIGHT)
            assert_refused(response, 503)
        assert small_server.state()["running"] == 1, "the test took too long"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("endpoint", ["/v1/completions", "/generate"])
def test_several_prompts_and_choices_are_refused_as_one(small_server, endpoint, stream):
    several = fields_of(endpoint, 4, stream, prompts=3)
    choices = fields_of(endpoint, 4, stream)
    choices.get("sampling_params", choices)["n"] = 3
    with full(small_server):
        for fields in (several, choices):
            assert_refused(small_server.http.post(endpoint, json=fields), 429)


def test_other_apis_are_refused_in_their_own_words(small_server):
    message = {"role": "user", "content": "Now?"}
    fields = {"model": "default", "max_tokens": 4, "messages": [message]}
    with full(small_server):
        whole = small_server.http.post("/v1/messages", json=fields)
        stream = small_server.http.post("/v1/messages", json={**fields, "stream": True})
        ollama = small_server.http.post(
            "/api/chat", json={"model": "default", "messages": [message]}
        )
    assert (whole.status_code, whole.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(whole.headers["retry-after"]) >= 1
    # Upstream has sent the stream's status before it asks for the first output.
    assert stream.status_code == 200
    assert '"error"' in stream.text
    assert "Traceback" not in small_server.log.read_text()
    assert ollama.status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_openai_client_raises_its_own_errors(small_server, stream):
    def ask(headers: dict[str, str] | None = None) -> None:
        small_server.openai.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Now?"}],
            max_tokens=4,
            stream=stream,
            extra_headers=headers,
        )

    with full(small_server), pytest.raises(openai.RateLimitError) as full_queue:
        ask()
    assert (full_queue.value.type, full_queue.value.code) == ERRORS[429]
    assert "--econoserve-max-queue" in full_queue.value.message
    with busy(small_server), pytest.raises(openai.InternalServerError) as late:
        ask(TIGHT)
    assert late.value.status_code == 503
    assert (late.value.type, late.value.code) == ERRORS[503]


def test_openai_client_tries_again_when_it_is_told_to(small_server):
    answers: list[Any] = []

    def ask() -> None:
        patient = small_server.openai.with_options(max_retries=3)
        answers.append(patient.completions.with_raw_response.create(**body))

    body = {"model": "default", "prompt": "Now?", "max_tokens": 4}
    with full(small_server):
        refused = small_server.state()["total_refused_queue_full"]
        asking = threading.Thread(target=ask)
        started_s = time.monotonic()
        asking.start()
        wait_until(
            lambda: small_server.state()["total_refused_queue_full"] > refused, WAIT_S, "refused"
        )
    asking.join()
    assert answers[0].retries_taken >= 1
    assert time.monotonic() - started_s >= 1.0, "it did not wait"
    assert answers[0].parse().usage.completion_tokens <= 4


def test_refused_requests_are_reported_as_missed(small_server):
    with busy(small_server):
        fields = {**fields_of("/generate", 4, False), "rid": "too-late"}
        assert_refused(small_server.http.post("/generate", json=fields, headers=TIGHT), 503)
    report = small_server.http.get("/econoserve/requests/too-late").json()
    assert report["slo_met"] is False
    assert report["retry_after_s"] >= 1
    assert report["output_tokens"] == 0


def refused_with(status: int, retry_after_s: float | None) -> HTTPException | None:
    """The refusal in an output of the scheduler."""
    reason = {"type": "abort", "status_code": status, "message": "no room"}
    report = {} if retry_after_s is None else {"econoserve": {"retry_after_s": retry_after_s}}
    return refusal_of({"id": "a", "finish_reason": reason, **report})


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (2.1, "3"), (60, "60"), (None, "1")])
def test_retry_after_is_in_whole_seconds(seconds, header):
    for status in (429, 503):
        assert refused_with(status, seconds).headers["Retry-After"] == header


def test_only_refusals_for_the_load_invite_to_try_again():
    assert refused_with(400, 5) is None
    assert refused_with(500, 5) is None
    assert refusal_of({"finish_reason": None}) is None
    assert refusal_of({"finish_reason": {"type": "abort", "message": "by its sender"}}) is None
    assert refusal_of({"finish_reason": {"type": "stop", "matched": 2}}) is None


@pytest.fixture
def client() -> TestClient:
    """An application under our middleware, with upstream's ways to answer."""
    app = FastAPI()
    app.add_middleware(RetryAfter)

    async def refuse(request: Request, status: int) -> PlainTextResponse:
        assert can_answer(request)
        answer_with(request, refused_with(429, 7))
        return PlainTextResponse("upstream's own", status)

    app.get("/generate/{status}")(refuse)
    app.get("/v1/messages/{status}")(refuse)
    app.get("/plain/{status}")(lambda status: PlainTextResponse("starting", int(status)))

    @app.get("/stream")
    async def stream(request: Request) -> StreamingResponse:
        answer_with(request, refused_with(429, 7))
        return StreamingResponse(iter(["in ", "parts"]), 429)

    @app.get("/foreign")
    async def foreign(request: Request) -> PlainTextResponse:
        answer_with(request, HTTPException(429, "not from the scheduler"))
        return PlainTextResponse("upstream's own", 429)

    return TestClient(app)


@pytest.mark.parametrize("path", ["/generate/429", "/generate/400", "/generate/500", "/stream"])
def test_middleware_answers_for_the_refusal(client, path):
    response = client.get(path)
    assert_refused(response, 429)
    assert response.headers["retry-after"] == "7"
    assert response.json()["error"]["message"] == "no room"


def test_middleware_keeps_other_vendors_errors(client):
    response = client.get("/v1/messages/429")
    assert (response.text, response.headers["retry-after"]) == ("upstream's own", "7")


@pytest.mark.parametrize("path", ["/plain/503", "/plain/429", "/foreign"])
def test_middleware_adds_a_second_where_nothing_is_known(client, path):
    response = client.get(path)
    assert response.headers["retry-after"] == "1"
    assert response.text in ("starting", "upstream's own")


@pytest.mark.parametrize("path", ["/plain/200", "/plain/500", "/generate/200"])
def test_middleware_leaves_other_answers_alone(client, path):
    response = client.get(path)
    assert "retry-after" not in response.headers
    assert response.text in ("starting", "upstream's own")


def test_nothing_can_be_refused_once_the_status_is_sent(client):
    could: list[bool] = []

    @client.app.get("/late")
    async def late(request: Request) -> StreamingResponse:
        async def parts():
            could.append(can_answer(request))
            answer_with(request, refused_with(429, 7))
            yield "served"

        return StreamingResponse(parts())

    response = client.get("/late")
    assert (response.status_code, response.text, could) == (200, "served", [False])


def test_nothing_is_answered_without_the_middleware():
    request = Request({"type": "http"})
    assert not can_answer(request)
    assert not can_answer(None)
    answer_with(request, refused_with(429, 7))
    answer_with(None, refused_with(429, 7))
