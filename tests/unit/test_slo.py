"""SLO fields: read from bodies and headers, refused with name, value and fix."""

import pytest

from econoserve.core.types import Slo
from econoserve.slo import (
    attach_fields,
    complete_report,
    expected_tokens_of,
    read_classes,
    resolve_slo,
    user_of,
)

CLASSES = read_classes(["priority=ttft:500,tpot:50", "flex=e2e:60000", "default=e2e:20000"])
PRIORITY = ("priority", Slo(ttft_s=0.5, tpot_s=0.05))
DEFAULT = ("default", Slo(e2e_s=20.0))


def custom(**fields):
    return {"econoserve": fields}


def test_body_and_header_arrive_and_the_header_wins():
    params = {"custom_params": {"econoserve": {"ttft_ms": 500, "e2e_ms": 4000}, "other": 1}}
    attached = attach_fields(params, {"x-slo-ttft-ms": "250"})
    assert attached["custom_params"]["other"] == 1
    assert resolve_slo(attached["custom_params"], {})[1] == Slo(ttft_s=0.25, e2e_s=4.0)
    assert params["custom_params"]["econoserve"]["ttft_ms"] == 500


def test_each_prompt_of_a_batch_gets_the_headers():
    attached = attach_fields([{"temperature": 0}, {}], {"x-slo-tpot-ms": "20"})
    assert [resolve_slo(one["custom_params"], {})[1] for one in attached] == [Slo(tpot_s=0.02)] * 2


def test_without_an_slo_nothing_is_touched():
    assert attach_fields(None, {}) is None
    params = {"custom_params": {"mine": 1}}
    assert attach_fields(params, {}) is params
    assert resolve_slo({"mine": 1}, {})[1] == Slo()


@pytest.mark.parametrize("value", [-5, 0, "abc", float("nan"), float("inf"), True, [1]])
def test_a_bad_value_is_refused_with_field_value_and_fix(value):
    with pytest.raises(ValueError, match=r"econoserve\.ttft_ms=.*positive number of milliseconds"):
        attach_fields({"custom_params": {"econoserve": {"ttft_ms": value}}}, {})


def test_a_bad_header_is_refused_by_its_name():
    with pytest.raises(ValueError, match="x-slo-e2e-ms='-1'"):
        attach_fields({}, {"x-slo-e2e-ms": "-1"})


def test_an_unknown_header_is_refused_with_the_known_ones():
    known = "x-slo-ttft-ms, x-slo-tpot-ms, x-slo-e2e-ms, x-slo-class"
    with pytest.raises(ValueError, match=f"x-slo-itl-ms: unknown header, give any of {known}"):
        attach_fields({}, {"host": "here", "x-slo-itl-ms": "5"})


def test_the_class_travels_by_header_body_and_tier():
    params = {"custom_params": custom(slo_class="flex", service_tier="flex")}
    attached = attach_fields(params, {"x-slo-class": "priority"}, "priority")
    assert attached["custom_params"] == custom(slo_class="priority", service_tier="flex")
    attached = attach_fields([{}, None], {}, "priority")
    assert [one["custom_params"] for one in attached] == [custom(service_tier="priority")] * 2


@pytest.mark.parametrize("value", ["", 5, ["priority"], {}])
def test_a_class_is_a_name(value):
    with pytest.raises(ValueError, match=r"service_tier=.*: give a name"):
        attach_fields({}, {}, value)
    for field in ("slo_class", "service_tier"):
        with pytest.raises(ValueError, match=rf"econoserve\.{field}=.*: give a name"):
            attach_fields({"custom_params": custom(**{field: value})}, {})


def test_an_empty_class_header_is_refused():
    with pytest.raises(ValueError, match="x-slo-class='': give a name"):
        attach_fields({}, {"x-slo-class": ""})


def test_what_has_to_be_sent_needs_an_object_to_send_it_with():
    assert attach_fields({"custom_params": [1]}, {}) == {"custom_params": [1]}
    with pytest.raises(ValueError, match="give an object to send service_tier with"):
        attach_fields({"custom_params": [1]}, {}, "flex")
    with pytest.raises(ValueError, match="give an object to send ttft_ms with"):
        attach_fields({"custom_params": [1]}, {"x-slo-ttft-ms": "5"})


@pytest.mark.parametrize(
    ("params", "resolved"),
    [
        (None, DEFAULT),
        ({"mine": 1}, DEFAULT),
        (custom(), DEFAULT),
        (custom(slo_class="priority"), PRIORITY),
        (custom(slo_class="default"), DEFAULT),
        (custom(service_tier="priority"), PRIORITY),
        (custom(service_tier="auto"), DEFAULT),
        (custom(service_tier="default"), DEFAULT),
        (custom(service_tier="scale"), DEFAULT),
        (custom(service_tier="flex", slo_class="priority"), PRIORITY),
        (custom(service_tier="priority", slo_class="default"), DEFAULT),
        (custom(slo_class="priority", ttft_ms=200), ("priority", Slo(ttft_s=0.2, tpot_s=0.05))),
        (custom(ttft_ms=200), ("default", Slo(ttft_s=0.2, e2e_s=20.0))),
        (custom(expected_tokens=7), DEFAULT),
    ],
)
def test_a_class_and_explicit_objectives_make_the_slo(params, resolved):
    assert resolve_slo(params, CLASSES) == resolved


@pytest.mark.parametrize("params", [None, custom(service_tier="flex"), custom(slo_class="default")])
def test_without_classes_there_is_only_an_empty_default(params):
    assert resolve_slo(params, {}) == ("default", Slo())


def test_tier_auto_means_default_whatever_the_classes_are_called():
    classes = read_classes(["auto=e2e:1"])
    assert resolve_slo(custom(service_tier="auto"), classes) == ("default", Slo())
    assert resolve_slo(custom(slo_class="auto"), classes) == ("auto", Slo(e2e_s=0.001))


def test_an_unknown_class_is_refused_with_the_known_ones():
    message = r"slo_class='gold' .*: unknown class, give one of priority, flex, default$"
    with pytest.raises(ValueError, match=message):
        resolve_slo(custom(slo_class="gold"), CLASSES)
    with pytest.raises(ValueError, match=r"give one of default$"):
        resolve_slo(custom(slo_class="gold"), {})


def test_the_expected_length_arrives():
    assert expected_tokens_of(custom(expected_tokens=200)) == 200
    assert expected_tokens_of(custom(expected_tokens=None)) is None
    assert expected_tokens_of(custom(e2e_ms=5)) is None
    assert expected_tokens_of(None) is None


@pytest.mark.parametrize("value", [0, -1, 1.5, "200", True, [1]])
def test_an_expected_length_is_a_positive_whole_number(value):
    with pytest.raises(ValueError, match=r"econoserve\.expected_tokens=.*positive whole number"):
        attach_fields({"custom_params": custom(expected_tokens=value)}, {})


@pytest.mark.parametrize("fields", [{"deadline": 3}, 17])
def test_unknown_fields_are_refused(fields):
    with pytest.raises(ValueError, match="ttft_ms, tpot_ms, e2e_ms"):
        attach_fields({"custom_params": {"econoserve": fields}}, {})


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


def test_a_refused_request_has_not_met_its_slo():
    report = complete_report(
        {"output_tokens": 0, "slo": {"ttft_ms": 150.0}, "decode_ms": 0.0, "retry_after_s": 2.5},
        first_token_s=0.001,
        finished_s=0.001,
        streamed=True,
    )
    assert report["slo_met"] is False
    assert report["retry_after_s"] == 2.5


def test_the_user_is_carried_and_the_bodys_own_wins():
    attached = attach_fields(None, {}, user="ann")
    assert user_of(attached["custom_params"]) == "ann"
    own = {"custom_params": {"econoserve": {"user": "bob"}}}
    assert user_of(attach_fields(own, {}, user="ann")["custom_params"]) == "bob"
    assert attach_fields(None, {}, user="") is None
    assert user_of(None) == ""
    with pytest.raises(ValueError, match="user=5: give a name"):
        attach_fields(None, {}, user=5)
