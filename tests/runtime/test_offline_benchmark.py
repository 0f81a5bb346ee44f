"""SGLang's offline benchmark on our engine, by its command line."""

import json
import subprocess
import sys


def test_the_benchmark_runs_and_writes_its_result(tmp_path):
    result = tmp_path / "result.jsonl"
    flags = {
        "--model-path": "demo",
        "--device": "cpu",
        "--dataset-name": "random-ids",
        "--num-prompts": "12",
        "--random-input-len": "64",
        "--random-output-len": "24",
        "--max-total-tokens": "1024",
        "--econoserve-tfs": "64",
        "--result-filename": str(result),
    }
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "econoserve.bench_offline_throughput",
            *(word for flag in flags.items() for word in flag),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "Output token throughput" in run.stdout
    measured = json.loads(result.read_text())
    assert measured["successful_requests"] == 12
    assert measured["output_throughput"] > 0
