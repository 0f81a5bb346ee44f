"""Requests that cannot be served get 400 with the field, the value and the fix; others go on."""

import itertools
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from live_server import KVC_TOKENS, REQUEST_TIMEOUT_S, LiveServer, wait_until

BODY = "custom_params.econoserve"
FIX = "positive number of milliseconds"
KNOWN = "ttft_ms, tpot_ms, e2e_ms"


@dataclass(frozen=True, slots=True)
class Bad:
    """A request with one thing wrong, and the words its refusal must hold."""

    words: tuple[str, ...]
    headers: dict[str, str] = field(default_factory=dict)
    slo: Any = None
    prompt_tokens: int = 4


BAD = {
    "negative header": Bad(("x-slo-ttft-ms", "'-5'", FIX), {"x-slo-ttft-ms": "-5"}),
    "zero header": Bad(("x-slo-tpot-ms", "'0'", FIX), {"x-slo-tpot-ms": "0"}),
    "word header": Bad(("x-slo-e2e-ms", "'abc'", FIX), {"x-slo-e2e-ms": "abc"}),
    "empty header": Bad(("x-slo-e2e-ms", "''", FIX), {"x-slo-e2e-ms": ""}),
    "nan header": Bad(("x-slo-ttft-ms", "'nan'", FIX), {"x-slo-ttft-ms": "nan"}),
    "infinite header": Bad(("x-slo-ttft-ms", "'inf'", FIX), {"x-slo-ttft-ms": "inf"}),
    "negative": Bad((f"{BODY}.ttft_ms", "-5", FIX), slo={"ttft_ms": -5}),
    "zero": Bad((f"{BODY}.tpot_ms", "=0", FIX), slo={"tpot_ms": 0}),
    "word": Bad((f"{BODY}.e2e_ms", "'abc'", FIX), slo={"e2e_ms": "abc"}),
    "nan": Bad((f"{BODY}.ttft_ms", "'NaN'", FIX), slo={"ttft_ms": "NaN"}),
    "bool": Bad((f"{BODY}.ttft_ms", "True", FIX), slo={"ttft_ms": True}),
    "list": Bad((f"{BODY}.ttft_ms", "[500]", FIX), slo={"ttft_ms": [500]}),
    "unknown field": Bad((f"{BODY}.ttft", "unknown", KNOWN), slo={"ttft": 500}),
    "no object": Bad((f"{BODY}=7", "object", KNOWN), slo=7),
    "body under a good header": Bad(
        (f"{BODY}.ttft_ms", "-5", FIX), {"x-slo-ttft-ms": "500"}, {"ttft_ms": -5}
    ),
    "longer than the cache": Bad(
        (f"{KVC_TOKENS + 500} tokens", "horter"), prompt_tokens=KVC_TOKENS + 500
    ),
}
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/generate")


def fields_of(endpoint: str, bad: Bad, stream: bool) -> dict[str, Any]:
    """The request's body for an endpoint."""
    custom = {} if bad.slo is None else {"custom_params": {"econoserve": bad.slo}}
    ids = list(range(300, 300 + bad.prompt_tokens))
    if endpoint == "/generate":
        return {
            "input_ids": ids,
            "stream": stream,
            "sampling_params": {"max_new_tokens": 4, **custom},
        }
    common = {"model": "default", "max_tokens": 4, "stream": stream, **custom}
    if endpoint == "/v1/completions":
        return {"prompt": ids, **common}
    return {"messages": [{"role": "user", "content": " boat" * max(len(ids) - 4, 1)}], **common}


def send(http: httpx.Client, endpoint: str, bad: Bad, stream: bool) -> httpx.Response:
    """Send a bad request."""
    return http.post(endpoint, json=fields_of(endpoint, bad, stream), headers=bad.headers)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_bad_request_is_refused_in_words(server, endpoint, stream, case):
    response = send(server.http, endpoint, BAD[case], stream)
    assert response.status_code == 400, response.text
    message = response.json().get("error", response.json())["message"]
    missing = [word for word in BAD[case].words if word not in message]
    assert not missing, message


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_prompt_that_never_fits_is_refused_for_all_its_choices(server, stream):
    fields = fields_of("/v1/completions", BAD["longer than the cache"], stream)
    response = server.http.post("/v1/completions", json={**fields, "n": 3})
    assert response.status_code == 400, response.text
    assert f"{KVC_TOKENS + 500} tokens" in response.json()["message"]


def test_json_nan_is_refused(server):
    content = (
        '{"model": "default", "prompt": "a", "custom_params": {"econoserve": {"e2e_ms": NaN}}}'
    )
    response = server.http.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert "JSON" in response.text


def answer_of(http: httpx.Client, output_tokens: int) -> dict[str, Any]:
    """The ``meta_info`` of a good request."""
    sampling = {"max_new_tokens": output_tokens, "ignore_eos": True}
    fields = {"text": "A good request", "sampling_params": sampling}
    response = http.post("/generate", json=fields)
    assert response.status_code == 200, response.text
    return response.json()["meta_info"]


def test_bad_requests_do_not_disturb_a_good_one(server: LiveServer):
    answers: list[dict[str, Any]] = []
    with httpx.Client(base_url=server.url, timeout=REQUEST_TIMEOUT_S) as other:
        good = threading.Thread(target=lambda: answers.append(answer_of(other, 700)))
        good.start()
        wait_until(lambda: server.state()["running"] == 1, 20, "the good request runs")
        refused = 0
        for bad, endpoint in itertools.product(BAD.values(), ENDPOINTS):
            if not good.is_alive():
                break
            refused += not send(server.http, endpoint, bad, False).is_success
        good.join()
    assert refused > len(ENDPOINTS), "the good request was alone"
    assert [answer["finish_reason"]["type"] for answer in answers] == ["length"]
    assert answers[0]["completion_tokens"] == 700


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_connection_of_a_refused_stream_serves_the_next_request(server: LiveServer, endpoint):
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
    with httpx.Client(base_url=server.url, timeout=REQUEST_TIMEOUT_S, limits=limits) as http:
        send(http, endpoint, BAD["negative header"], stream=True)
        refused_at = time.monotonic()
        # SGLang looks after a stream for two seconds when it has ended.
        while time.monotonic() < refused_at + 2.5:
            assert answer_of(http, 100)["completion_tokens"] == 100


def test_id_in_use_is_refused_and_its_owner_is_served(server: LiveServer):
    sampling = {"max_new_tokens": 400, "ignore_eos": True}
    fields = {"rid": "twice", "text": "Two boats", "sampling_params": sampling}
    answers: list[httpx.Response] = []
    with httpx.Client(base_url=server.url, timeout=REQUEST_TIMEOUT_S) as other:
        owner = threading.Thread(
            target=lambda: answers.append(other.post("/generate", json=fields))
        )
        owner.start()
        wait_until(lambda: server.state()["running"] == 1, 20, "the owner of the id runs")
        refused = server.http.post("/generate", json=fields)
        owner.join()
    assert refused.status_code == 400, refused.text
    assert "twice" in refused.text
    assert answers[0].json()["meta_info"]["completion_tokens"] == 400
