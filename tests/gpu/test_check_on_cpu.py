"""The check of ``benchmark.gpu`` with real engines on a CPU: every line of it but the kernels."""

import json

import pytest

from benchmark.gpu import check as command_line

pytestmark = pytest.mark.timeout(280)


def test_a_quick_check_runs_on_a_cpu(tmp_path, capsys):
    stages = ["unconstrained-demo", "profile"]
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--stage", *stages]
    status = command_line.main(arguments)
    printed, errors = capsys.readouterr()
    assert status == 0, errors
    assert "output tokens/s" in printed
    found = json.loads((tmp_path / "unconstrained-demo.json").read_text())["value"]
    assert {run["system"] for run in found["runs"]} == {"stock", "econoserve"}
    assert all(one["iteration_ms"] > 0 for points in found["decode"].values() for one in points)
    assert all(one["iterations"] > 0 for one in found["mixed"])
    profile = json.loads((tmp_path / "profile.json").read_text())["value"]["demo"]
    for regime in ("decode", "mixed"):
        assert min(profile[regime]["coefficients_s"]) >= 0
        assert max(profile[regime]["coefficients_s"]) > 0
