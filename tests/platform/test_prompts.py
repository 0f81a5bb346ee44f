"""Recorded passes with prompts yield the logits of those computed by SGLang's Python."""

import pytest
from model_worker import rows_of

from econoserve.platform.operators import round_up

MOST_TOKENS = 150


@pytest.fixture(scope="module")
def passes(tmp_path_factory):
    """What the worker saw, a row per pass."""
    return rows_of("prompt_worker.py", tmp_path_factory.mktemp("prompts"), MOST_TOKENS)


def test_small_passes_are_recorded_once_per_number_of_tokens(passes):
    usual = [one for one in passes if one["case"] == "usual"]
    assert [one["recorded"] for one in usual] == [one["tokens"] <= MOST_TOKENS for one in usual]
    assert {one["recorded"] for one in usual} == {True, False}
    for one in usual:
        assert one["new"] in ([], [round_up(one["tokens"])] * one["recorded"])
    assert sum(len(one["new"]) for one in usual) >= 4
    assert any(one["recorded"] and not one["new"] for one in usual)


def test_passes_of_a_size_share_a_recording_whatever_they_consist_of(passes):
    same = [one for one in passes if one["case"] == "same size"]
    assert [one["tokens"] for one in same] == [16, 13, 14, 15, 14]
    assert [one["requests"][0] for one in same] == [12, 1, 5, 1, 14]
    assert all(one["recorded"] for one in same)
    assert not any(one["new"] for one in same[1:])


def test_what_cannot_be_recorded_is_computed_as_before(passes):
    others = [one for one in passes if one["case"] not in ("usual", "same size")]
    assert [one["case"] for one in others] == ["hidden", *["no room"] * 3, "not recordable"]
    assert not any(one["new"] for one in others)
    assert [one["enabled"] for one in others] == [True] * 4 + [False]


def test_where_a_recording_finds_no_room_larger_ones_are_not_tried(passes):
    tried = [one for one in passes if one["case"] == "no room"]
    assert [one["tokens"] for one in tried] == [90, 89, 7]
    # The repetition of each finds out that it was refused, and is computed without.
    assert [one["recorded"] for one in tried] == [True, False, True]
    assert [one["refused"] for one in tried] == ["96", "96", "8"]


def test_logits_do_not_depend_on_recordings(passes):
    for one in passes:
        assert one["requests"][0] == one["requests"][1]
        assert one["finite"] and one["spread"] > 0.5
        assert not one["eager_recorded"]
        assert one["repeated"] < 1e-4
        assert one["without"] < 1e-4, one


def test_logits_equal_torch_natives(passes):
    assert max(one["native"] for one in passes) < 1e-4


def test_a_pass_writes_its_own_slots_only(passes):
    for one in passes:
        assert one["foreign_slots"] == one["unwritten"] == []
