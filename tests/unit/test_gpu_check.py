"""The check's own parts: kept results, stages that fail, the table, the fit, lengths, models."""

import contextlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmark.gpu import check as command_line
from benchmark.gpu import models, serving, stages
from benchmark.gpu.context import failures
from benchmark.gpu.lengths import draw_requests, longest_output_tokens
from benchmark.gpu.pair import turns
from benchmark.gpu.profile import Timed, decode_samples, fit, mixed_samples
from benchmark.gpu.results import DONE, FAILED, Results, table
from benchmark.gpu.sizes import CPU_QUICK, CUDA_FULL, CUDA_QUICK, Device
from econoserve.core.cost import IterationWork

SPREAD = {"stock": [10.0, 9.0, 11.0], "econoserve": [16.0, 16.0, 16.0], "ratio": [1.6, 1.5, 1.7]}
VALUES = {
    "imports": {"doctor": [], "device": "CPU", "versions": {"sglang": "0.5.23", "torch": "2.14.1"}},
    "kernels": {"start_s": 31.0, "mixed_iterations": 2, "compiled": ["a", "b"]},
    "correctness-float32": {
        "requests": 12,
        "equal_requests": 12,
        "equal_tokens": 1.0,
        "disturbed": 5,
        "failures": [],
        "counters": {},
    },
    "unconstrained-demo": {
        "decode": {
            name: [{"running": 8, "context_tokens": 16, "iteration_ms": ms}]
            for name, ms in (("stock", 4.0), ("econoserve", 4.1))
        },
        "mixed": [
            {"running": 2, "tokens": 64.0, "context_tokens": 48, "iteration_ms": 9.0},
            {"running": 2, "tokens": None, "context_tokens": 48, "iteration_ms": None},
        ],
        "overhead": {"running": 8, "added": 0.025},
        "throughput": SPREAD,
        "runs": [],
    },
    "goodput-demo": {"slo_ms": 500.0, "goodput": SPREAD, "slo_met": SPREAD, "throughput": SPREAD},
    "profile": {
        "demo": {
            "decode": {"coefficients_s": [0.01, 0, 0, 0, 0], "mean_relative_error": 0.02},
            "mixed": None,
        }
    },
}


def _results(folder):
    results = Results(folder)
    for name, value in VALUES.items():
        results.keep(name, DONE, 3.2, value)
    return results


def test_the_table_shows_targets_and_what_failed(tmp_path):
    results = _results(tmp_path)
    results.keep("correctness-bfloat16", FAILED, 1.0, None, "Traceback\nEngineFailed: no memory")
    text = table(results, [*VALUES, "correctness-bfloat16", "goodput-8b"])
    assert "FAILED: EngineFailed: no memory" in text
    assert "not run" in text
    assert ">= 1: kept" in text
    assert ">= 1.5: kept" in text
    assert "< 5%: kept" in text
    assert "10 [9, 11]" in text
    assert "1.60 [1.50, 1.70]" in text
    assert "12 of 12" in text
    assert max(map(len, text.splitlines())) < 200


def test_a_failed_stage_has_no_value(tmp_path):
    results = Results(tmp_path)
    assert results.read("imports") is None
    results.keep("imports", FAILED, 1.0, {"half": 1}, "broken")
    assert results.value("imports") is None
    results.keep("imports", DONE, 1.0, {"whole": 1})
    assert results.value("imports") == {"whole": 1}
    results.forget("imports")
    assert results.read("imports") is None


@pytest.fixture
def fake_stages(monkeypatch):
    """Three stages, of which the second raises the errors that a test sets."""
    calls, errors = [], []

    def work(name):
        calls.append(name)
        if name == "kernels" and errors:
            raise errors.pop()
        return VALUES[name]

    names = ("imports", "kernels", "profile")
    made = {name: lambda name=name: work(name) for name in names}
    monkeypatch.setattr(command_line, "stages", lambda check: made)
    return SimpleNamespace(calls=calls, errors=errors)


@pytest.mark.parametrize("error", [stages.StageFailed("no kernels"), ZeroDivisionError("oops")])
def test_a_stage_that_fails_is_recorded_and_the_next_ones_go_on(
    tmp_path, fake_stages, capsys, error
):
    fake_stages.errors.append(error)
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path)]
    assert command_line.main(arguments) == 1
    assert fake_stages.calls == ["imports", "kernels", "profile"]
    assert str(error) in json.loads((tmp_path / "kernels.json").read_text())["error"]
    assert f"{type(error).__name__}: {error}" in capsys.readouterr().out
    # Again: only what is not done.
    assert command_line.main(arguments) == 0
    assert fake_stages.calls[3:] == ["kernels"]
    assert command_line.main([*arguments, "--fresh", "--stage", "imports"]) == 0
    assert fake_stages.calls[4:] == ["imports"]


def test_no_stage_starts_when_the_time_is_over(tmp_path, fake_stages):
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--limit-s", "-1"]
    assert command_line.main(arguments) == 1
    assert fake_stages.calls == []


def test_an_unknown_stage_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command_line.main(["--device", "cpu", "--stage", "speed", "--out", str(tmp_path)])
    assert "--stage speed: give some of imports, kernels" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [CPU_QUICK, CUDA_QUICK, CUDA_FULL])
def test_requests_fit_the_kvc_of_their_stage(sizes):
    for load in sizes.loads:
        both = 2 * longest_output_tokens(load.scale)
        assert both < load.bound_kvc_tokens < load.free_kvc_tokens
        assert min(load.batches) == 1
        smallest = min(sizes.contexts) + sizes.decode_tokens + 8
        assert sizes.overhead_batch * smallest < 0.8 * load.free_kvc_tokens
    assert 2 * longest_output_tokens(sizes.correctness_scale) < sizes.correctness_kvc_tokens


def test_all_stages_are_there(tmp_path):
    check = stages.Check(Device.CUDA, CUDA_FULL, tmp_path, Results(tmp_path))
    assert list(stages.stages(check)) == [
        "imports",
        "kernels",
        "correctness-float32",
        "correctness-bfloat16",
        "unconstrained-1b",
        "goodput-1b",
        "unconstrained-8b",
        "goodput-8b",
        "profile",
    ]


def test_the_profile_needs_iterations(tmp_path):
    check = stages.Check(Device.CPU, CPU_QUICK, tmp_path, Results(tmp_path))
    with pytest.raises(stages.StageFailed, match="unconstrained"):
        stages.profile(check)
    with pytest.raises(ValueError, match="at least one"):
        fit([])


def test_the_fit_finds_the_coefficients():
    true = (0.008, 3e-5, 1e-9, 2e-5, 1e-8)
    works = [
        IterationWork(prompt, prompt**2, running, running * context)
        for prompt in (0, 128, 512, 2048)
        for running in (1, 16, 64, 256)
        for context in (100, 1000)
    ]

    def seconds(work):
        values = (1, work.prefill_tokens, work.prefill_squared, work.decoding, work.context_tokens)
        return sum(c * x for c, x in zip(true, values, strict=True))

    fitted = fit([Timed(work, seconds(work)) for work in works])
    assert fitted["coefficients_s"] == pytest.approx(true, rel=1e-3)
    assert fitted["largest_relative_error"] < 1e-6
    assert fitted["samples"] == len(works)


def test_samples_say_what_was_computed():
    points = [{"running": 8, "context_tokens": 100, "iteration_ms": 5.0}]
    assert decode_samples(points, 40) == [
        Timed(IterationWork(decoding=8, context_tokens=960), 0.005)
    ]
    mixed = {"running": 2, "tokens": 64.0, "context_tokens": 48, "iteration_ms": 9.0}
    assert mixed_samples([mixed, {**mixed, "iteration_ms": None}]) == [
        Timed(IterationWork(64, 4096, 2, 48), 0.009)
    ]


def test_outputs_are_compared_up_to_their_first_difference():
    def answers(*outputs):
        return [{"output_ids": list(ids)} for ids in outputs]

    found = stages.compare_tokens(answers("abcd", "xy", ""), answers("abXd", "xy", ""))
    assert found == {"requests": 3, "equal_requests": 2, "equal_tokens": pytest.approx(4 / 6)}


def test_failed_and_wrong_answers_are_named():
    fine = {"error": None, "output_tokens": 3, "wanted_tokens": 3}
    found = failures([fine, {**fine, "error": "aborted"}, {**fine, "output_tokens": 2}])
    assert found == ["request 1: aborted", "request 2: 2 output tokens instead of 3"]


def test_ratios_and_overhead():
    runs = [
        {"system": system, "repeat": repeat, "x": value}
        for system, values in (("stock", (2.0, 4.0)), ("econoserve", (3.0, 8.0)))
        for repeat, value in enumerate(values)
    ]
    assert serving.ratio_of(runs, "x")["ratio"] == [1.75, 1.5, 2.0]
    none = [{**run, "x": 0.0 if run["system"] == "stock" else None} for run in runs]
    assert serving.ratio_of(none, "x")["ratio"] is None
    decode = {
        system: [{"running": n, "context_tokens": 16, "iteration_ms": ms * n} for n in (1, 8, 32)]
        for system, ms in (("stock", 2.0), ("econoserve", 2.1))
    }
    assert serving.overhead(decode, 16) == {"running": 8, "added": pytest.approx(0.05)}


def test_systems_take_turns():
    assert [system for _, system in turns(2)] == ["stock", "econoserve", "econoserve", "stock"]


def test_lengths_are_like_those_of_conversations():
    requests = draw_requests(4000, 1.0, math.inf, range(10, 20), seed=3)
    prompts = [len(one.prompt_ids) for one in requests]
    outputs = [one.output_tokens for one in requests]
    assert 130 < sum(prompts) / 4000 < 190
    assert 290 < sum(outputs) / 4000 < 380
    assert max(outputs) == longest_output_tokens(1.0)
    assert {one.arrival_s for one in requests} == {0.0}
    small = draw_requests(200, 0.1, 10.0, range(10, 20), seed=3)
    assert max(one.output_tokens for one in small) <= longest_output_tokens(0.1)
    assert small[-1].arrival_s == pytest.approx(20, rel=0.4)
    assert set(small[0].prompt_ids) <= set(range(10, 20))


def test_models_have_a_real_models_shape(tmp_path):
    folder = models.ensure("8b", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (4096, 32)
    assert not list(folder.glob("*.safetensors"))
    assert models.load_format("8b") == "dummy"
    assert models.load_format("small") == models.load_format("demo") == "auto"
    heads = {shape.heads // shape.kv_heads for shape in models.SHAPES.values()}
    assert heads == {4}
    with pytest.raises(ValueError, match="'70b'"):
        models.ensure("70b", tmp_path)


class FakeEngine:
    """Answers every request in a time of its own."""

    def __init__(self, system, jct_s):
        self.system, self.jct_s = system, jct_s
        self.prompts = []

    def ask(self, name, requests):
        assert name == "burst"
        self.prompts += [tuple(one["prompt_ids"]) for one in requests]
        answers = [
            {
                "error": None,
                "ttft_s": 0.1,
                "jct_s": self.jct_s * (1 if len(requests) < 5 else 6),
                "retractions": 0,
                "wanted_tokens": one["output_tokens"],
                **one,
            }
            for one in requests
        ]
        return {"answers": answers, "counters": {"parked": 1}}


def test_goodput_counts_requests_that_keep_an_slo_that_stock_alone_defines(tmp_path, monkeypatch):
    engines = {"stock": FakeEngine("stock", 0.2), "econoserve": FakeEngine("econoserve", 0.1)}
    monkeypatch.setattr(serving, "both", lambda *_: contextlib.nullcontext(engines))
    sizes = replace(CPU_QUICK, repeats=3)
    check = stages.Check(Device.CPU, sizes, tmp_path, Results(tmp_path))
    found = serving.goodput(check, CPU_QUICK.loads[0])
    for engine in engines.values():
        longer = [prompt for prompt in engine.prompts if len(prompt) > 3]
        assert len(set(longer)) == len(longer), "a prompt came again: its length is known by now"
    # With few beside it a request takes 0.2 s; under load stock takes 1.2 s, EconoServe 0.6 s.
    assert found["slo_ms"] == pytest.approx(1000)
    assert found["rate_per_s"] == pytest.approx(1.2 * 16 / 1.2)
    assert found["slo_met"]["stock"][0] == 0
    assert found["slo_met"]["econoserve"][0] == 1
    assert found["goodput"]["ratio"] is None
    engines["stock"].jct_s = 0.15
    with pytest.raises(stages.StageFailed, match="request 0"):
        engines["stock"].ask = lambda *_, requests: {
            "answers": [{**one, "error": "refused"} for one in requests],
            "counters": {},
        }
        serving.goodput(check, CPU_QUICK.loads[0])
