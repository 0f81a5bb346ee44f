"""Two replicas share the requests, and change no output."""

import os

import pytest
from test_equal_outputs import assert_nothing_is_left, differences
from test_tensor_parallel import run_two


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two replicas need two cores")
def test_two_replicas_share_the_requests_and_change_no_output(stock, tmp_path):
    result = run_two(tmp_path, dp_size=2)
    assert len(result["outputs"]) >= 50
    assert differences(stock, result, ("penalty",)) == []
    assert len(result["states"]) == 2
    for state in result["states"]:
        assert_nothing_is_left(state)
        assert state["total_chunked"] > 0, "it got few requests or none"
        assert state["total_planning_errors"] == state["total_allocation_failures"] == 0
    assert sum(state["total_parked"] for state in result["states"]) > 0
