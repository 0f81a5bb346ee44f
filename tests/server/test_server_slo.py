"""SLOs on their way in (headers, body) and the report on the way out."""

import json
import re

import openai
import pytest

MESSAGES = [{"role": "user", "content": "When does the night train leave?"}]
OUTPUT_TOKENS = 10
LOOSE_MS = 600_000.0
"""An objective that any machine meets."""
TIGHT_MS = 0.001
"""One that none meets."""
FIELDS = {
    "prompt_tokens",
    "predicted_tokens",
    "output_tokens",
    "queue_ms",
    "parked_ms",
    "preemptions",
    "ttft_ms",
    "tpot_ms",
    "e2e_ms",
    "slo",
    "slo_class",
    "slo_met",
}
CLASSES = (
    *("--econoserve-slo-class", "priority=ttft:500000,tpot:50000"),
    *("--econoserve-slo-class", "flex=e2e:900000"),
    *("--econoserve-slo-class", "default=e2e:700000"),
)
PRIORITY = {"ttft_ms": 500_000.0, "tpot_ms": 50_000.0}
FLEX = {"e2e_ms": 900_000.0}
DEFAULT = {"e2e_ms": 700_000.0}


@pytest.fixture(scope="module")
def classed_server(holder):
    """A server with SLO classes; it ends with this module."""
    holder.running(*CLASSES)
    server = holder.take(*CLASSES)
    yield server
    assert server.stop() == 0


def body(slo: dict[str, float] | None) -> dict:
    """What ``extra_body`` of OpenAI's client holds."""
    custom = {} if slo is None else {"custom_params": {"econoserve": slo}}
    return {"ignore_eos": True, **custom}


def ask(server, *, headers=None, slo=None):
    """A streamed chat completion's chunks."""
    stream = server.openai.chat.completions.create(
        model=server.model,
        messages=MESSAGES,
        max_tokens=OUTPUT_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers=headers or {},
        extra_body=body(slo),
    )
    return list(stream)


def report_of(server, rid: str) -> dict:
    """The server's report on a finished request."""
    response = server.http.get(f"/econoserve/requests/{rid}")
    assert response.status_code == 200, response.text
    return response.json()


def test_headers_arrive_and_the_report_tells_all(server):
    headers = {
        "x-slo-ttft-ms": str(LOOSE_MS),
        "X-SLO-TPOT-MS": str(LOOSE_MS),
        "x-slo-e2e-ms": str(LOOSE_MS),
    }
    chunks = ask(server, headers=headers)
    report = report_of(server, chunks[0].id)
    assert report.keys() == FIELDS
    assert report["prompt_tokens"] == chunks[-1].usage.prompt_tokens
    assert report["output_tokens"] == chunks[-1].usage.completion_tokens == OUTPUT_TOKENS
    assert 1 <= report["predicted_tokens"] <= OUTPUT_TOKENS
    assert report["slo"] == {"ttft_ms": LOOSE_MS, "tpot_ms": LOOSE_MS, "e2e_ms": LOOSE_MS}
    assert report["slo_met"] is True
    assert 0 <= report["queue_ms"] <= report["ttft_ms"] < report["e2e_ms"]
    assert report["e2e_ms"] - report["ttft_ms"] == pytest.approx(
        report["tpot_ms"] * (OUTPUT_TOKENS - 1), abs=0.1
    )
    assert report["tpot_ms"] > 0
    assert report["parked_ms"] >= 0
    assert report["preemptions"] == 0


@pytest.mark.parametrize("name", ["ttft_ms", "tpot_ms", "e2e_ms"])
def test_body_arrives_and_is_judged(server, name):
    missed = report_of(server, ask(server, slo={name: TIGHT_MS})[0].id)
    assert missed["slo"] == {name: pytest.approx(TIGHT_MS)}
    assert missed["slo_met"] is False
    met = report_of(server, ask(server, slo={name: LOOSE_MS})[0].id)
    assert met["slo"] == {name: LOOSE_MS}
    assert met["slo_met"] is True


@pytest.mark.parametrize("name", ["ttft_ms", "tpot_ms", "e2e_ms"])
def test_answer_in_one_piece_is_judged_by_its_tokens(server, name):
    answer = server.openai.chat.completions.create(
        model=server.model,
        messages=MESSAGES,
        max_tokens=OUTPUT_TOKENS,
        extra_body=body({name: TIGHT_MS}),
    )
    report = report_of(server, answer.id)
    assert report["slo_met"] is False, report
    assert 0 < report["ttft_ms"] < report["e2e_ms"]
    assert report["tpot_ms"] > 0


def test_header_wins_over_body_field_by_field(server):
    chunks = ask(
        server,
        headers={"x-slo-ttft-ms": "70000"},
        slo={"ttft_ms": TIGHT_MS, "e2e_ms": 80000},
    )
    report = report_of(server, chunks[0].id)
    assert report["slo"] == {"ttft_ms": 70000.0, "e2e_ms": 80000.0}


def test_without_slo_there_is_no_verdict(server):
    report = report_of(server, ask(server)[0].id)
    assert report["slo"] is None
    assert report["slo_class"] == "default"
    assert report["slo_met"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_generate_has_the_report_in_meta_info(server, stream):
    fields = {
        "text": "The night train leaves at",
        "stream": stream,
        "sampling_params": {
            "max_new_tokens": OUTPUT_TOKENS,
            "ignore_eos": True,
            "custom_params": {"econoserve": {"e2e_ms": LOOSE_MS}},
        },
    }
    response = server.http.post("/generate", json=fields)
    assert response.status_code == 200, response.text
    if stream:
        events = [line for line in response.text.splitlines() if line]
        assert events[-1] == "data: [DONE]"
        metas = [json.loads(event.removeprefix("data: "))["meta_info"] for event in events[:-1]]
        assert all("econoserve" not in meta for meta in metas[:-1]), "a report before the end"
        meta = metas[-1]
    else:
        meta = response.json()["meta_info"]
    report = meta["econoserve"]
    assert report.keys() == FIELDS
    assert report["output_tokens"] == OUTPUT_TOKENS
    assert report["slo"] == {"e2e_ms": LOOSE_MS}
    assert report["slo_met"] is True
    assert report == report_of(server, meta["id"])


def test_each_prompt_of_a_batch_has_its_own_slo(server):
    sampling = [
        {
            "max_new_tokens": 4,
            "ignore_eos": True,
            "custom_params": {"econoserve": {"e2e_ms": limit}},
        }
        for limit in (70000, 80000)
    ]
    fields = {"text": ["One bird", "Two boats"], "sampling_params": sampling}
    answers = server.http.post("/generate", json=fields).json()
    slos = [answer["meta_info"]["econoserve"]["slo"] for answer in answers]
    assert slos == [{"e2e_ms": 70000.0}, {"e2e_ms": 80000.0}]


def test_every_choice_of_a_request_is_reported(server):
    fields = {
        "text": "Three ships",
        "sampling_params": {"max_new_tokens": 4, "ignore_eos": True, "n": 3},
    }
    answers = server.http.post(
        "/generate", json=fields, headers={"x-slo-e2e-ms": str(LOOSE_MS)}
    ).json()
    reports = [report_of(server, answer["meta_info"]["id"]) for answer in answers]
    assert [report["output_tokens"] for report in reports] == [4, 4, 4]
    assert [report["slo"] for report in reports] == [{"e2e_ms": LOOSE_MS}] * 3


def test_unknown_id_is_not_found_in_a_sentence(server):
    response = server.http.get("/econoserve/requests/no-such-id")
    assert response.status_code == 404
    assert "no-such-id" in response.text
    assert "no finished request" in response.text


def test_an_unknown_header_is_refused_in_words(server):
    for stream in (False, True):
        fields = {"model": server.model, "prompt": "a", "max_tokens": 2, "stream": stream}
        response = server.http.post("/v1/completions", json=fields, headers={"x-slo-itl-ms": "5"})
        assert response.status_code == 400, response.text
        message = response.json()["message"]
        assert "x-slo-itl-ms" in message and "x-slo-tpot-ms" in message


def classed(report: dict) -> tuple[str, dict[str, float]]:
    """The class and the objectives in a report."""
    return report["slo_class"], report["slo"]


@pytest.mark.parametrize(
    ("tier", "expected"),
    [
        ("priority", ("priority", PRIORITY)),
        ("flex", ("flex", FLEX)),
        ("auto", ("default", DEFAULT)),
        ("default", ("default", DEFAULT)),
        ("scale", ("default", DEFAULT)),
        (None, ("default", DEFAULT)),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_service_tier_names_a_class(classed_server, endpoint, tier, expected):
    server = classed_server
    fields = {"model": server.model, "max_tokens": 2}
    if endpoint == "chat":
        answer = server.openai.chat.completions.create(
            messages=MESSAGES, service_tier=tier, **fields
        )
    else:
        answer = server.openai.completions.create(
            prompt="One bird", extra_body={"service_tier": tier}, **fields
        )
    assert classed(report_of(server, answer.id)) == expected


def test_service_tier_reaches_streams_and_generate(classed_server):
    server = classed_server
    chunks = list(
        server.openai.chat.completions.create(
            model=server.model, messages=MESSAGES, max_tokens=2, stream=True, service_tier="flex"
        )
    )
    assert classed(report_of(server, chunks[0].id)) == ("flex", FLEX)
    fields = {
        "text": ["One bird", "Two boats"],
        "service_tier": "priority",
        "sampling_params": {"max_new_tokens": 2},
    }
    for answer in server.http.post("/generate", json=fields).json():
        assert classed(answer["meta_info"]["econoserve"]) == ("priority", PRIORITY)


def test_prompt_that_speaks_of_service_tiers_names_none(classed_server):
    fields = {"text": 'Set "service_tier": "flex" there', "sampling_params": {"max_new_tokens": 2}}
    answer = classed_server.http.post("/generate", json=fields).json()
    assert classed(answer["meta_info"]["econoserve"]) == ("default", DEFAULT)


def test_the_closest_class_wins_and_objectives_override_it(classed_server):
    server = classed_server

    def ask_for(headers: dict[str, str], **fields) -> tuple[str, dict[str, float]]:
        answer = server.openai.completions.create(
            model=server.model,
            prompt="One bird",
            max_tokens=2,
            extra_headers=headers,
            extra_body={"service_tier": "flex", "custom_params": {"econoserve": fields}},
        )
        return classed(report_of(server, answer.id))

    assert ask_for({}) == ("flex", FLEX)
    assert ask_for({}, slo_class="priority") == ("priority", PRIORITY)
    assert ask_for({"x-slo-class": "default"}, slo_class="priority") == ("default", DEFAULT)
    assert ask_for({"x-slo-ttft-ms": "70000"}, slo_class="priority", expected_tokens=5) == (
        "priority",
        {**PRIORITY, "ttft_ms": 70000.0},
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ["/v1/completions", "/generate"])
def test_unknown_class_is_refused_with_the_known_ones(classed_server, endpoint, stream):
    fields = {"model": "default", "prompt": "a"} if endpoint != "/generate" else {"text": "a"}
    response = classed_server.http.post(
        endpoint, json={**fields, "stream": stream}, headers={"x-slo-class": "gold"}
    )
    assert response.status_code == 400, response.text
    message = response.json().get("error", response.json())["message"]
    assert "slo_class='gold'" in message
    assert "priority, flex, default" in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"service_tier": 5}, "service_tier=5: give a name"),
        ({"service_tier": ""}, "service_tier='': give a name"),
        (
            {"custom_params": {"econoserve": {"expected_tokens": 0}}},
            "custom_params.econoserve.expected_tokens=0: give a positive whole number of tokens",
        ),
    ],
)
def test_bad_names_and_lengths_are_refused_in_words(server, fields, words):
    with pytest.raises(openai.BadRequestError, match=re.escape(words)):
        server.openai.completions.create(
            model=server.model, prompt="a", max_tokens=2, extra_body=fields
        )
