"""Two ranks decide alike, under every kind of pressure: one that did not would hang the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_equal_outputs import assert_nothing_is_left, differences

WORKER = Path(__file__).parent / "tensor_parallel.py"
SHORT_SIGHTED = {
    # Promises run out, so that tasks are preempted.
    "econoserve_predictor": "quantile",
    "econoserve_rl_prior": 2,
    "econoserve_rl_quantile": 0.02,
    "econoserve_kvc_reserve": 0.0,
}
PAUSING = {"econoserve_pause_kvc": 1.0, "slo": {"ttft_ms": 1, "tpot_ms": 10_000}}
OFFLOAD = {"econoserve_host_kvc_gib": 1.0, "econoserve_host_gb_per_s": 1000.0}


def run_two(folder, **options):
    """Run the worker in a process of its own.

    Returns:
        Outputs by case, and the state of each replica.
    """
    output = folder / "two.json"
    run = subprocess.run(
        [sys.executable, str(WORKER), str(output), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    return json.loads(output.read_text())


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
@pytest.mark.parametrize(
    ("options", "happened"),
    [
        ({**SHORT_SIGHTED, **OFFLOAD}, ("total_offloaded",)),
        # Who parks depends on how fast the machine is, with predictions that are right.
        (PAUSING, ("total_pauses", "total_chunked", "prediction_coverage_90")),
    ],
    ids=["wrong predictions", "pauses and predictions that are learned"],
)
def test_two_ranks_agree_and_change_no_output(stock, tmp_path, options, happened):
    result = run_two(tmp_path, tp_size=2, **options)
    assert len(result["outputs"]) >= 50
    assert differences(stock, result, ("penalty",)) == []
    (state,) = result["states"]
    assert_nothing_is_left(state)
    assert state["total_rank_divergences"] == 0
    assert state["total_planning_errors"] == state["total_allocation_failures"] == 0
    assert all(state[name] > 0 for name in happened), state
