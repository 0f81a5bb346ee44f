"""Our defaults for SGLang's arguments, on a machine with CUDA and on one without."""

from types import SimpleNamespace

import pytest
import torch

from econoserve.engine import Engine
from econoserve.launching import chosen, default_arguments, sglang_arguments


@pytest.fixture
def cuda(monkeypatch):
    """A fake platform: torch says that a CUDA device is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_flashinfer_is_the_default_on_cuda(cuda):
    assert default_arguments(None) == {"page_size": 1, "attention_backend": "flashinfer"}
    assert sglang_arguments(["--model-path", "m"]) == [
        *("--model-path", "m"),
        *("--page-size", "1"),
        *("--attention-backend", "flashinfer"),
    ]


def test_what_the_user_says_wins(cuda):
    given = ["--attention-backend", "triton", "--page-size=1"]
    assert sglang_arguments(given) == given


@pytest.mark.parametrize("argv", [["--device", "cpu"], ["--device=cpu"]])
def test_a_cpu_that_was_asked_for_keeps_its_own_backend(cuda, argv):
    assert sglang_arguments(argv) == [*argv, "--page-size", "1"]


def test_without_cuda_the_platform_chooses(no_cuda):
    assert default_arguments(None) == {"page_size": 1}
    assert sglang_arguments([]) == ["--page-size", "1"]


class FakeArguments:
    """Keeps what an engine would be started with."""

    def __init__(self, **kwargs):
        self.kwargs = kwargs


@pytest.mark.parametrize(
    ("given", "backend"),
    [({}, "flashinfer"), ({"attention_backend": "triton"}, "triton"), ({"device": "cpu"}, None)],
)
def test_the_offline_engine_has_the_same_defaults(cuda, monkeypatch, given, backend):
    started = []
    monkeypatch.setattr(Engine, "server_args_class", FakeArguments)
    monkeypatch.setattr(Engine, "_start", lambda self, config, args: started.append(args.kwargs))
    Engine(model_path="m", **given)
    assert started[0]["page_size"] == 1
    assert started[0].get("attention_backend") == backend


def _resolved(**fields):
    graphs = SimpleNamespace(
        decode=SimpleNamespace(backend="full"), prefill=SimpleNamespace(backend="breakable")
    )
    return SimpleNamespace(
        **{
            "device": "cuda",
            "page_size": 1,
            "attention_backend": "flashinfer",
            "cuda_graph_config": graphs,
            "disable_overlap_schedule": False,
            **fields,
        }
    )


def test_one_line_says_what_was_chosen(cuda):
    line = chosen(_resolved())
    assert "\n" not in line
    assert "--attention-backend flashinfer (our default)" in line
    assert "--page-size 1 (our default)" in line
    assert "decode full" in line
    assert "overlap on" in line
    other = chosen(_resolved(attention_backend="triton", disable_overlap_schedule=True))
    assert "--attention-backend triton," in other
    assert "overlap off" in other
