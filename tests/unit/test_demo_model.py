"""The demo model is the same wherever and however often it is built, and never half there."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from econoserve import demo_model

BUILT_FILES = ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model_path(cache_dir):
    return demo_model.ensure(cache_dir)


@pytest.fixture(scope="module")
def tokenizer(model_path):
    return AutoTokenizer.from_pretrained(model_path)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in BUILT_FILES}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_second_call_builds_nothing(cache_dir, model_path, monkeypatch):
    monkeypatch.setattr(demo_model, "_build", lambda folder: pytest.fail("built again"))
    assert demo_model.ensure(cache_dir) == model_path
    assert model_path.is_absolute()


def test_two_builds_are_byte_equal(model_path, tmp_path):
    assert contents(demo_model.ensure(tmp_path)) == contents(model_path)


def test_concurrent_processes_all_succeed_and_agree(model_path, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONHASHSEED": "random"}
    command = [sys.executable, "-m", "econoserve.demo_model"]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=120)[0].strip() for process in processes]
    built = tmp_path / "econoserve" / demo_model.VERSION
    assert [process.returncode for process in processes] == [0, 0]
    assert printed == [str(built)] * 2
    assert contents(built) == contents(model_path)
    assert names(built.parent) == [demo_model.VERSION, f"{demo_model.VERSION}.lock"]


def test_a_left_over_partial_build_is_removed(model_path, tmp_path):
    partial = tmp_path / f"{demo_model.VERSION}.partial-killed"
    partial.mkdir()
    (partial / "config.json").write_text("{")
    assert contents(demo_model.ensure(tmp_path)) == contents(model_path)
    assert not partial.exists()


@pytest.mark.parametrize("damage", ["no marker", "broken marker", "missing file", "short file"])
def test_an_incomplete_folder_is_replaced(model_path, tmp_path, damage):
    folder = demo_model.ensure(tmp_path)
    if damage == "no marker":
        (folder / demo_model.MARKER).unlink()
        (folder / "config.json").write_text("{")
    elif damage == "broken marker":
        (folder / demo_model.MARKER).write_text("{")
    elif damage == "missing file":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "model.safetensors").write_bytes(b"")
    assert contents(demo_model.ensure(tmp_path)) == contents(model_path)


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder):
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_build", fail)
    with pytest.raises(KeyboardInterrupt):
        demo_model.ensure(tmp_path)
    assert names(tmp_path) == [f"{demo_model.VERSION}.lock"]


def test_an_unusable_cache_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/below.*XDG_CACHE_HOME"):
        demo_model.ensure(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    "text", ["Why is the sky blue?", "  two  spaces\n\tand a tab", "naïve 東京 🙂", ""]
)
def test_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_token_of_the_model_is_in_the_tokenizer(tokenizer):
    assert len(tokenizer) == demo_model.VOCAB_SIZE
    assert None not in tokenizer.convert_ids_to_tokens(range(demo_model.VOCAB_SIZE))


def test_english_takes_about_one_token_per_word(tokenizer):
    for passage in demo_model.PASSAGES.values():
        assert len(tokenizer.encode(passage)) < 1.5 * len(passage.split())


def test_chat_template_renders(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == ("<|begin|><|system|>Be brief.<|end|><|user|>Hello!<|end|><|assistant|>")
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = encoded["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-1] == "<|assistant|>"


def test_greedy_responses_end_by_themselves_and_vary(model_path, tokenizer):
    model = LlamaForCausalLM.from_pretrained(model_path)
    assert model.dtype == torch.float32
    lengths = []
    for question in ("Hello!", "Who are you?", "Name three rivers.", "Why is the sky blue?"):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        response = greedy(model, prompt, at_most=120)
        lengths.append(len(response))
        assert len(set(response)) > 0.5 * len(response)
    assert len(set(lengths)) >= 3
    assert min(lengths) < 120


@torch.inference_mode()
def greedy(model, prompt, at_most):
    response, cache, tokens = [], None, prompt
    while len(response) < at_most and model.config.eos_token_id not in response:
        output = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens = [int(output.logits[0, -1].argmax())]
        response += tokens
    return response
