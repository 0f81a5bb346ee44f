"""Stock SGLang's outputs are the same on our kernels as on its own plain torch."""

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("engine_worker.py")
DECODE = re.compile(r"Decode batch.*#running-req: (\d+).*cpu graph: (True|False)")


SYSTEMS = {
    "upstream": ("0", {"dtype": "float32", "attention_backend": "torch_native"}),
    "ours": ("1", {"dtype": "float32"}),
    "bfloat16": ("1", {"dtype": "bfloat16"}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each system's result and log."""
    output = tmp_path_factory.mktemp("engine") / "results.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("ECONOSERVE", None)
    done = subprocess.run(
        [sys.executable, str(WORKER), str(output), json.dumps(SYSTEMS)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    results = json.loads(output.read_text())
    logs = dict(part.split("\n", 1) for part in done.stdout.split("ENGINE ")[1:])
    return {name: (results[name], logs[name]) for name in SYSTEMS}


@pytest.fixture
def upstream(runs):
    return runs["upstream"]


@pytest.fixture
def ours(runs):
    return runs["ours"]


def test_greedy_outputs_are_equal(upstream, ours):
    (expected, _), (result, _) = upstream, ours
    assert expected["attention_backend"] == "torch_native"
    assert result["attention_backend"] == "econoserve_cpu"
    assert len(expected["ids"]) == 40 + 7 + 1 + 6
    unequal = [
        number
        for number, (left, right) in enumerate(zip(expected["ids"], result["ids"], strict=True))
        if left != right
    ]
    assert unequal == []


@pytest.mark.parametrize("which", ("input", "output"))
def test_log_probabilities_are_equal(upstream, ours, which):
    expected, result = upstream[0][which], ours[0][which]
    assert len(expected) >= {"input": 500, "output": 70}[which]
    assert result == pytest.approx(expected, abs=1e-4)


def test_the_comparison_covers_prefixes_chunks_and_decode_batches_of_all_sizes(upstream, ours):
    assert max(ours[0]["cached"]) > 64
    recorded = {int(n) for n, graph in DECODE.findall(ours[1]) if graph == "True"}
    assert len(recorded) >= 30, recorded
    assert {1, 2, 3, 4} <= recorded
    assert "not recorded" not in ours[1]
    assert {graph for _, graph in DECODE.findall(upstream[1])} == {"False"}


def test_bfloat16_is_served_with_nearly_the_same_probabilities(runs, ours):
    result, log = runs["bfloat16"]
    assert list(map(len, result["ids"][:-6])) == list(map(len, ours[0]["ids"][:-6]))
    assert any(graph == "True" for _, graph in DECODE.findall(log))
    differences = [abs(a - b) for a, b in zip(ours[0]["input"], result["input"], strict=True)]
    # The logarithms go down to -37.
    assert statistics.median(differences) < 0.1
    assert max(differences) < 0.5
