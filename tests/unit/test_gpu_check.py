"""The check's own parts: kept results, stages that fail, the table, the fit, lengths, models."""

import json
import math
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmark.gpu import check as command_line
from benchmark.gpu import models, serving, stages
from benchmark.gpu.context import failures
from benchmark.gpu.lengths import draw_requests, longest_output_tokens
from benchmark.gpu.pair import turns
from benchmark.gpu.profile import (
    Timed,
    decode_samples,
    fit,
    hardware_profile,
    mean_squared,
    mixed_samples,
)
from benchmark.gpu.results import DONE, FAILED, Results, table
from benchmark.gpu.sizes import CPU_QUICK, CUDA_FULL, CUDA_QUICK, Device
from econoserve.core.cost import IterationWork
from econoserve.core.types import Slo
from econoserve.sim.profile import ProfileError, load_profile, read_profile
from econoserve.sim.run import RunSpec, simulate
from econoserve.sim.timing import Pass
from econoserve.workload.workload import WorkloadSpec

SPREAD = {"stock": [10.0, 9.0, 11.0], "econoserve": [16.0, 16.0, 16.0], "ratio": [1.6, 1.5, 1.7]}
MIXED = {
    "running": 2,
    "tokens": 64.0,
    "prompt_tokens": 128,
    "context_tokens": 48,
    "iteration_ms": 9.0,
}
FITTED = {"coefficients_s": [0.01, 0, 0, 0, 0], "mean_relative_error": 0.02}
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
    "iterations-demo": {
        "decode": {
            name: [{"running": 8, "context_tokens": 16, "iteration_ms": ms}]
            for name, ms in (("stock", 4.0), ("econoserve", 4.1))
        },
        "mixed": [MIXED, {**MIXED, "tokens": None, "iteration_ms": None}],
        "overhead": {
            "running": 8,
            "added": [0.025, 0.02, 0.03],
            "scheduling_ms": 0.12,
            "scheduling": 0.03,
        },
    },
    "throughput-demo": {"throughput": SPREAD, "runs": []},
    "goodput-demo": {"slo_ms": 500.0, "goodput": SPREAD, "slo_met": SPREAD, "throughput": SPREAD},
    "profile": {"demo": {"decode": FITTED, "mixed": FITTED, "file": "cpu_demo.profile.json"}},
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
    assert "+2.5% [+2.0%, +3.0%]" in text
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
    checks = []
    monkeypatch.setattr(command_line, "stages", lambda check: checks.append(check) or made)
    return SimpleNamespace(calls=calls, errors=errors, checks=checks)


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
    assert fake_stages.checks[-1].deadline_s < time.monotonic()
    began_s = time.monotonic()
    assert command_line.main([*arguments[:-1], "50"]) == 0
    assert 50 <= fake_stages.checks[-1].deadline_s - began_s < 60


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
        "correctness-bfloat16",
        "correctness-float32",
        "iterations-1b",
        "throughput-1b",
        "goodput-1b",
        "iterations-8b",
        "throughput-8b",
        "goodput-8b",
        "profile",
    ]


def test_imports_are_what_the_doctor_says(tmp_path, monkeypatch):
    check = stages.Check(Device.CPU, CPU_QUICK, tmp_path, Results(tmp_path))
    done = SimpleNamespace(returncode=0, stdout="ok    sglang: 0.5.23\nin order\n", stderr="noise")
    limits = []

    def run(command, timeout, **more):
        assert command[1:] == ["-m", "econoserve.cli", "doctor"]
        limits.append(timeout)
        return done

    monkeypatch.setattr(stages.subprocess, "run", run)
    found = stages.imports(check)
    assert found["doctor"] == ["ok    sglang: 0.5.23", "in order"]
    assert found["versions"]["sglang"] == "0.5.23"
    assert found["device"].startswith("CPU, ")
    done.returncode = 1
    with pytest.raises(stages.StageFailed, match=r"sglang: 0\.5\.23\nin order\nnoise"):
        stages.imports(replace(check, deadline_s=time.monotonic() + 20))
    assert limits[0] == stages.DOCTOR_LIMIT_S
    assert 15 < limits[1] <= 20
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(stages.StageFailed, match="nvcc: not in PATH"):
        stages.imports(replace(check, device=Device.CUDA))


def test_the_documented_times_are_of_all_stages_and_within_the_limit(tmp_path):
    check = stages.Check(Device.CUDA, CUDA_FULL, tmp_path, Results(tmp_path))
    page = (stages.ROOT / "docs/results/gpu.md").read_text()
    lines = re.findall(r"^\| `([\w-]+)` \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert [name for name, *_ in lines] == list(stages.stages(check))
    rows = [tuple(map(int, numbers)) for _, *numbers in lines]
    assert all(start + measuring == both for start, measuring, both in rows)
    starting, measuring, both = (sum(column) for column in zip(*rows, strict=True))
    assert f"| all | {starting} | {measuring} | {both} |" in page
    assert both <= command_line.DEFAULT_LIMIT_S


def test_the_profile_needs_iterations(tmp_path):
    check = stages.Check(Device.CPU, CPU_QUICK, tmp_path, Results(tmp_path))
    with pytest.raises(stages.StageFailed, match="iterations"):
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
    # Half of a prompt of 128: 64 tokens with 64 of context after them, then 64 with 128.
    assert mixed_samples([MIXED, {**MIXED, "iteration_ms": None}]) == [
        Timed(IterationWork(64, (64 * 64 + 64 * 128) // 2, 2, 48), 0.009)
    ]
    assert mean_squared(128.0, 128) == 128**2
    # Two prompts in a pass.
    assert mean_squared(256.0, 128) == 256**2


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
        system: [
            {
                "running": n,
                "context_tokens": 16,
                "iteration_ms": ms * n,
                "repeats_ms": [ms * n, ms * n * factor],
                "scheduling_ms": own,
            }
            for n in (1, 8, 32)
        ]
        for system, ms, factor, own in (("stock", 2.0, 1.0, None), ("econoserve", 2.1, 1.2, 0.4))
    }
    assert serving.overhead(decode, 16) == {
        "running": 8,
        "added": pytest.approx([0.155, 0.05, 0.26]),
        "scheduling_ms": 0.4,
        "scheduling": pytest.approx(0.025),
    }


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


def test_the_profile_is_one_of_the_simulators(tmp_path):
    fits = {
        "decode": {"coefficients_s": [0.005, 0.0, 0.0, 1e-5, 3e-8]},
        "mixed": {"coefficients_s": [0.006, 2e-5, 7e-10, 2e-5, 3e-8]},
    }
    memory = models.memory(models.ensure("8b", tmp_path), "bfloat16")
    assert memory["weights_bytes"] == pytest.approx(2 * 8.03e9, rel=0.01)
    more = {"gpu_bytes": 141 * 10**9, "gpus": 1, "usable_fraction": 0.85, "activation_bytes": 2**30}
    fields = hardware_profile("a test", {**memory, **more}, 5e10, fits)
    file = tmp_path / "cuda_8b.profile.json"
    file.write_text(json.dumps(fields))
    profile = load_profile(str(file), "")
    assert profile.memory.kvc_bytes_per_token == 131_072
    assert profile.memory.capacity_tokens == pytest.approx(784_000, rel=0.01)
    decode = profile.time.seconds(Pass(decoding=100, context_tokens=50_000))
    assert decode == pytest.approx(0.005 + 100e-5 + 50_000 * 3e-8)
    mixed = profile.time.seconds(Pass(1, 1000, 10**6, 10**6, 100, 50_000))
    assert mixed == pytest.approx(0.006 + 0.02 + 0.0007 + 0.002 + 0.0015)
    assert profile.time.seconds(Pass()) == 0.0
    # Mixed passes take no less than their decodes alone.
    most = Pass(1, 1, 1, 1, 10_000, 0)
    fields["time"]["mixed_s"] = [0.001, 0.0, 0.0, 0.0, 0.0]
    file.write_text(json.dumps(fields))
    assert load_profile(str(file), "").time.seconds(most) == pytest.approx(0.105)
    slo = Slo(e2e_s=60.0)
    work = WorkloadSpec("synthetic:sharegpt", rate_rps=5.0, requests=20, slo=slo)
    figures = simulate(RunSpec("plus", work, str(file), "")).figures
    assert figures["ssr"] == 1.0
    for wrong in ([0.01] * 4, [0.0] * 5, [0.01, -1e-9, 0, 0, 0]):
        fields["time"]["decode_s"] = wrong
        with pytest.raises(ProfileError, match="decode_s"):
            read_profile("wrong", json.dumps(fields))
