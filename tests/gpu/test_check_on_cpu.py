"""The check of ``benchmark.gpu`` with real engines on a CPU: every line of it but the kernels."""

import json
from dataclasses import replace

import pytest

from benchmark.gpu import check as command_line
from benchmark.gpu.sizes import CPU_QUICK, Device
from econoserve.sim.run import RunSpec, simulate
from econoserve.workload.workload import WorkloadSpec

pytestmark = pytest.mark.timeout(600)

# Starting engines takes most of the time: with one size of KVC they start once for three stages,
# and the comparison in bfloat16 differs from that in float32 by an argument. The first stage is the
# doctor, half a minute of importing SGLang; tests/unit/test_gpu_check.py has what is around it.
LOAD = replace(CPU_QUICK.loads[0], free_kvc_tokens=1600, bound_kvc_tokens=1600, bound_requests=40)
SIZES = replace(CPU_QUICK, loads=(LOAD,), decode_tokens=24, repeats=2, run_repeats=2)
LEFT_OUT = {"correctness-bfloat16", "imports"}


def _value(folder, stage):
    return json.loads((folder / f"{stage}.json").read_text())["value"]


def test_a_check_runs_on_a_cpu_and_its_profile_simulates(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(command_line.SIZES, (Device.CPU, True), SIZES)
    stages = [
        *("kernels", "correctness-float32", "iterations-demo", "throughput-demo"),
        *("goodput-demo", "profile"),
    ]
    known = command_line.stages(command_line.Check(Device.CPU, SIZES, tmp_path, None))
    assert set(known) == {*stages, *LEFT_OUT}
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--stage", *stages]
    status = command_line.main([*arguments, "--limit-s", "560"])
    printed, errors = capsys.readouterr()
    assert status == 0, errors
    assert "output tokens/s" in printed

    correct = _value(tmp_path, "correctness-float32")
    assert correct["equal_requests"] == correct["requests"] > 0

    timed = _value(tmp_path, "iterations-demo")
    assert all(0 < one["scheduling_ms"] < 5 for one in timed["decode"]["econoserve"])
    assert all(one["scheduling_ms"] is None for one in timed["decode"]["stock"])
    assert all(one["iterations"] > 0 for one in timed["mixed"])
    contexts = {one["context_tokens"] / one["running"] for one in timed["mixed"]}
    assert len(contexts) == len(SIZES.mixed_contexts)
    assert timed["overhead"]["added"][1] <= timed["overhead"]["added"][2]

    runs = _value(tmp_path, "throughput-demo")["runs"]
    assert [run["system"] for run in runs] == ["stock", "econoserve", "econoserve", "stock"]

    goodput = _value(tmp_path, "goodput-demo")
    assert goodput["rate_per_s"] == pytest.approx(1.5 * goodput["sustained_per_s"])
    assert goodput["slo_ms"] == pytest.approx(102.4 * goodput["few_tpot_ms"])
    assert all(0 <= run["slo_met"] <= 1 for run in goodput["runs"])

    # The profile is one of the simulator's.
    spec = WorkloadSpec("synthetic:sharegpt", rate_rps=5.0, requests=20)
    file = _value(tmp_path, "profile")["demo"]["file"]
    figures = simulate(RunSpec("plus", spec, file, "", capacity_tokens=20_000)).figures
    assert figures["throughput_rps"] > 0
