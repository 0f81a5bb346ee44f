"""Other policies than the default change no output either."""

import pytest
from run_cases import run_cases
from test_equal_outputs import TIGHT, assert_nothing_is_left, differences

OTHERS = {
    # Pipelining; prompts alone in a pass, with all that run set aside; KVC moved for urgency.
    "full": {},
    "vllm": {},
    "fastserve": {"econoserve_host_kvc_gib": 1.0},
}


@pytest.mark.parametrize("policy", OTHERS)
def test_other_policies_change_no_output(stock, policy, tmp_path):
    options = {**TIGHT, **OTHERS[policy], "econoserve_policy": policy, "every": 4}
    result = run_cases("econoserve", tmp_path, **options)
    assert len(result["outputs"]) >= 50
    assert differences(stock, result, ("penalty",)) == []
    state = result["state"]
    assert_nothing_is_left(state)
    assert state["total_planning_errors"] == 0
    if policy != "full":
        # Prompts run alone, so those that decode step aside and come back.
        assert state["total_set_aside"] + state["total_offloaded"] > 0, state
