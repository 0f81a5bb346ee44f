"""Two ranks decide alike: a rank that did not would hang in a collective."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_two_ranks_serve_a_burst_under_memory_pressure():
    run = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "tensor_parallel.py")],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert result["answers"] == 40
    state = result["state"]
    assert state["claims"] == state["held_tokens"] == state["parked"] == 0
    assert state["total_parked"] + state["total_preempted"] > 0
    assert state["total_planning_errors"] == state["total_allocation_failures"] == 0
