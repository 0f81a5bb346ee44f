"""SGLang's frontend language runs its programs on the server."""

import pytest
import sglang as sgl

PLACES = (" harbour", " bridge", " castle")


@sgl.function
def guide(s, visitor):
    """Two tips written side by side, a summary of them, and a choice."""
    s += f"A guide for {visitor}."
    tips = s.fork(2)
    for number, tip in enumerate(tips):
        tip += f" Tip {number}:"
        tip += sgl.gen("tip", max_tokens=8, temperature=0, ignore_eos=True)
    s += tips[0]["tip"] + tips[1]["tip"] + " In short:"
    s += sgl.gen("summary", max_tokens=6, temperature=0, ignore_eos=True)
    s += " Start at the"
    s += sgl.select("place", choices=list(PLACES), temperature=0)


@pytest.fixture
def backend(server):
    """The server as a backend of the frontend language."""
    return sgl.RuntimeEndpoint(server.url)


def generated(server, text: str, tokens: int) -> str:
    """What ``/generate`` continues a text with."""
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    fields = {"text": text, "sampling_params": sampling}
    return server.http.post("/generate", json=fields).json()["text"]


def test_program_forks_generates_and_selects(server, backend):
    state = guide.run(visitor="Ada", backend=backend)
    start = "A guide for Ada."
    tips = [generated(server, f"{start} Tip {number}:", 8) for number in (0, 1)]
    assert tips[0] != tips[1]
    text = f"{start}{tips[0]}{tips[1]} In short:"
    assert state["summary"] == generated(server, text, 6) != ""
    scores = state.get_meta_info("place")["normalized_prompt_logprobs"]
    assert state["place"] == PLACES[scores.index(max(scores))]
    assert state.text() == f"{text}{state['summary']} Start at the{state['place']}"


def test_batch_of_programs_equals_single_runs(backend):
    visitors = ["Ada", "Bilal", "Chen", "Dora", "Emil", "Fay"]
    batch = guide.run_batch(
        [{"visitor": visitor} for visitor in visitors],
        backend=backend,
        num_threads=6,
        progress_bar=False,
    )
    single = guide.run(visitor="Dora", backend=backend)
    assert len({state.text() for state in batch}) == len(visitors)
    assert batch[3].text() == single.text()
