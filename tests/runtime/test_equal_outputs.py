"""Greedy outputs equal stock SGLang's, whatever was parked, chunked, resumed or preempted."""

import pytest
from run_cases import run_cases

TIGHT = {
    # So small that requests queue, are chunked, park and resume.
    "max_total_tokens": 768,
    "econoserve_tfs": 48,
    "econoserve_parked_kvc": 0.5,
    "econoserve_on_error": "crash",
    "econoserve_check_books": True,
}
WRONG = {
    # Predictions far too short, nothing in reserve: promises run out and tasks are preempted.
    **TIGHT,
    "econoserve_predictor": "quantile",
    "econoserve_rl_prior": 2,
    "econoserve_rl_quantile": 0.02,
    "econoserve_kvc_reserve": 0.0,
}


RUNS = {
    # With it nobody is preempted, so that penalties can be compared, too.
    "tight": {**TIGHT, "econoserve_predictor": "quantile"},
    "wrong": WRONG,
    "wrong_synchronous": {**WRONG, "disable_overlap_schedule": True, "every": 2},
    "faulty_policy": {**TIGHT, "econoserve_on_error": "fallback", "fault": True, "every": 2},
    # Victims move to host memory and come back.
    "offload": {
        **WRONG,
        "econoserve_host_kvc_gib": 1.0,
        "econoserve_host_gb_per_s": 1000.0,
        "every": 2,
    },
    # Prompts are computed alone, when their TTFT is near, while those that run sit the pass out.
    # Any machine is too slow for this TTFT, and the prompts stay in their place.
    "pausing": {
        **TIGHT,
        "econoserve_pause_kvc": 1.0,
        "econoserve_late": "serve",
        "slo": {"ttft_ms": 1, "tpot_ms": 10_000},
        "every": 2,
    },
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    result = run_cases("econoserve", tmp_path_factory.mktemp("run"), **RUNS[request.param])
    return request.param, result


def same(left, right):
    """Equal tokens and texts; log-probabilities to the third digit, whatever they round to."""
    if isinstance(left, list):
        return all(same(*pair) for pair in zip(left, right, strict=True))
    rest = [{**output, "logprobs": None} for output in (left, right)]
    pair = [output.get("logprobs") for output in (left, right)]
    return rest[0] == rest[1] and pair[0] == pytest.approx(pair[1], abs=1e-3)


def differences(left, right, skip):
    return [
        name
        for name in right["outputs"]
        if not name.startswith(skip) and not same(left["outputs"][name], right["outputs"][name])
    ]


def assert_nothing_is_left(state):
    left = ("held_tokens", "promised_tokens", "claims", "waiting", "ready", "running", "parked")
    assert not any(state[name] for name in (*left, "offloaded_tokens")), state


def test_outputs_equal_stock_and_nothing_is_left(stock, run):
    name, result = run
    assert len(stock["outputs"]) >= 200
    # SGLang forgets penalties when it computes a request again, stock or not.
    skip = () if name == "tight" else ("penalty",)
    assert differences(stock, result, skip) == []

    state = result["state"]
    for counter in ("chunked", "mixed_batches"):
        assert state[f"total_{counter}"] > 0, state
    assert (state["total_pauses"] > 0) == (name == "pausing"), state
    if name == "offload":
        assert state["total_offloaded"] > 0, state
    elif name in ("tight", "faulty_policy", "pausing"):
        assert min(state["total_parked"], state["total_resumed"]) > 0, state
    else:
        assert state["total_preempted"] > 0, state
    assert_nothing_is_left(state)
    if name == "faulty_policy":
        # Meanwhile SGLang decides, and its guess of what will fit may be wrong.
        assert state["total_planning_errors"] > 0
    else:
        failures = ("allocation_failures", "planning_errors", "stalls")
        assert not any(state[f"total_{failure}"] for failure in failures), state

    assert len(result["reports"]) >= 200 // RUNS[name].get("every", 1)
    for report in result["reports"]:
        assert report["predicted_tokens"] >= 1
        assert report["output_tokens"] >= 1
        assert report["queue_ms"] >= 0
    if name == "tight":
        assert any(report["parked_ms"] > 0 for report in result["reports"])


def test_stock_sglang_is_untouched_by_the_installed_package(stock):
    assert stock["state"] is None
    assert not any(stock["reports"])
