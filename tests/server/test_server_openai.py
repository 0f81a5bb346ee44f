"""What OpenAI's client gets: chat and text completions, streamed or not, constrained or not."""

import json
import re

from live_server import LiveServer

PROMPT = "The lighthouse at the end of the harbour wall"
MESSAGES = [{"role": "user", "content": "What did the keeper write into the thick book?"}]
GREEDY = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
SCHEMA = {
    "type": "object",
    "properties": {
        "weather": {"enum": ["fog", "wind", "sun"]},
        "boats": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
    },
    "required": ["weather", "boats"],
    "additionalProperties": False,
}


def chat(server: LiveServer, **options):
    """One chat completion with the question above."""
    return server.openai.chat.completions.create(
        model=server.model, messages=MESSAGES, **{**GREEDY, **options}
    )


def complete(server: LiveServer, **options):
    """One text completion of the prompt above."""
    return server.openai.completions.create(
        **{"model": server.model, "prompt": PROMPT, **GREEDY, **options}
    )


def test_chat_streams_what_it_answers_at_once(server):
    whole = chat(server)
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"
    *chunks, usage = chat(server, stream=True, stream_options={"include_usage": True})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content != ""
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(chunks) > 2, "the text came in one piece"
    assert usage.usage.completion_tokens == 24
    assert usage.usage.prompt_tokens == whole.usage.prompt_tokens


def test_completion_streams_what_it_answers_at_once(server):
    whole = complete(server)
    assert whole.usage.completion_tokens == 24
    chunks = list(complete(server, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text != ""
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(chunks) > 2, "the text came in one piece"


def test_text_of_a_prompt_does_not_depend_on_its_neighbours(server):
    alone = [complete(server, prompt=PROMPT[:length]).choices[0].text for length in (12, 24, 36)]
    together = complete(server, prompt=[PROMPT[:length] for length in (12, 24, 36)])
    assert [choice.text for choice in together.choices] == alone


def test_three_choices_are_sampled_independently(server):
    answer = chat(server, n=3, temperature=1.0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 3 * 24
    assert len({choice.message.content for choice in answer.choices}) == 3


def test_three_streamed_choices_are_those_of_a_single_request(server):
    whole = chat(server).choices[0].message.content
    texts = {0: "", 1: "", 2: ""}
    for chunk in chat(server, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: whole, 1: whole, 2: whole}


def test_stop_string_ends_the_text_before_it(server):
    whole = complete(server).choices[0].text
    words = whole.split(" ")
    stop = next(word for word in words[4:] if len(word) > 2)
    stopped = complete(server, stop=[stop])
    assert stopped.choices[0].text == whole.split(stop)[0]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].matched_stop == stop
    assert stopped.usage.completion_tokens < 24
    streamed = "".join(
        chunk.choices[0].text for chunk in complete(server, stop=[stop], stream=True)
    )
    assert streamed == stopped.choices[0].text


def test_json_schema_constrains_the_answer(server):
    options = {
        "max_tokens": 100,
        "extra_body": {},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "log", "schema": SCHEMA},
        },
    }
    answer = chat(server, **options)
    assert answer.choices[0].finish_reason == "stop"
    value = json.loads(answer.choices[0].message.content)
    assert value.keys() == {"weather", "boats"}
    assert value["weather"] in ("fog", "wind", "sun")
    assert [type(boat) for boat in value["boats"]] == [bool, bool]
    streamed = chat(server, stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == answer.choices[0].message.content


def test_regex_constrains_the_answer(server):
    pattern = r"(north|south)-[0-9]{3}"
    answers = chat(server, n=4, temperature=1.0, extra_body={"regex": pattern})
    for choice in answers.choices:
        assert re.fullmatch(pattern, choice.message.content), choice.message.content
    text = complete(server, extra_body={"regex": pattern}).choices[0].text
    assert re.fullmatch(pattern, text), text


def test_logprobs_come_with_the_tokens(server):
    answer = chat(server, logprobs=True, top_logprobs=2, max_tokens=6)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 6
    assert all(token.logprob == max(top.logprob for top in token.top_logprobs) for token in tokens)
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
