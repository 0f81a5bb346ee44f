"""SLO fields: read from bodies and headers, refused with name, value and fix."""

import pytest

from econoserve.core.types import Slo
from econoserve.slo import attach_slo, complete_report, slo_of


def test_body_and_header_arrive_and_the_header_wins():
    params = {"custom_params": {"econoserve": {"ttft_ms": 500, "e2e_ms": 4000}, "other": 1}}
    attached = attach_slo(params, {"x-slo-ttft-ms": "250"})
    assert attached["custom_params"]["other"] == 1
    assert slo_of(attached["custom_params"]) == Slo(ttft_s=0.25, e2e_s=4.0)
    assert params["custom_params"]["econoserve"]["ttft_ms"] == 500


def test_each_prompt_of_a_batch_gets_the_headers():
    attached = attach_slo([{"temperature": 0}, {}], {"x-slo-tpot-ms": "20"})
    assert [slo_of(one["custom_params"]).tpot_s for one in attached] == [0.02, 0.02]


def test_without_an_slo_nothing_is_touched():
    assert attach_slo(None, {}) is None
    params = {"custom_params": {"mine": 1}}
    assert attach_slo(params, {}) is params
    assert slo_of({"mine": 1}) == Slo()


@pytest.mark.parametrize("value", [-5, 0, "abc", float("nan"), float("inf"), True, [1]])
def test_a_bad_value_is_refused_with_field_value_and_fix(value):
    with pytest.raises(ValueError, match=r"econoserve\.ttft_ms=.*positive number of milliseconds"):
        attach_slo({"custom_params": {"econoserve": {"ttft_ms": value}}}, {})


def test_a_bad_header_is_refused_by_its_name():
    with pytest.raises(ValueError, match="x-slo-e2e-ms='-1'"):
        attach_slo({}, {"x-slo-e2e-ms": "-1"})


@pytest.mark.parametrize("fields", [{"deadline": 3}, 17])
def test_unknown_fields_are_refused(fields):
    with pytest.raises(ValueError, match="ttft_ms, tpot_ms, e2e_ms"):
        attach_slo({"custom_params": {"econoserve": fields}}, {})


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (None, None),
        ({"ttft_ms": 100.0}, True),
        ({"ttft_ms": 99.0}, False),
        ({"tpot_ms": 25.0, "e2e_ms": 200.0}, True),
        ({"tpot_ms": 24.0}, False),
    ],
)
def test_the_report_judges_the_slo(slo, met):
    report = complete_report(
        {"output_tokens": 5, "slo": slo, "decode_ms": 7.0},
        first_token_s=0.1,
        finished_s=0.2,
        streamed=True,
    )
    assert (report["ttft_ms"], report["tpot_ms"], report["e2e_ms"]) == (100.0, 25.0, 200.0)
    assert report["slo_met"] is met


def test_a_single_token_has_no_time_per_token_and_cannot_miss_it():
    report = complete_report(
        {"output_tokens": 1, "slo": {"tpot_ms": 1.0}, "decode_ms": 0.0},
        first_token_s=0.1,
        finished_s=0.1,
        streamed=True,
    )
    assert report["tpot_ms"] is None
    assert report["slo_met"] is True


def test_without_streaming_the_scheduler_says_when_the_first_token_was_there():
    report = complete_report(
        {"output_tokens": 5, "slo": {"ttft_ms": 150.0}, "decode_ms": 80.0},
        first_token_s=0.2,
        finished_s=0.2,
        streamed=False,
    )
    assert (report["ttft_ms"], report["tpot_ms"]) == (pytest.approx(120.0), pytest.approx(20.0))
    assert report["slo_met"] is True
    assert "decode_ms" not in report
