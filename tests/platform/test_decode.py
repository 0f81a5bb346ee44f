"""Recorded decode iterations yield the logits of those computed by SGLang's Python."""

import pytest
from model_worker import rows_of

MOST_REQUESTS = 64


@pytest.fixture(scope="module")
def iterations(tmp_path_factory):
    """What the worker saw, a row per decode iteration."""
    return rows_of("decode_worker.py", tmp_path_factory.mktemp("decode"), MOST_REQUESTS)


def test_small_batches_are_recorded_once_per_size(iterations):
    usual = [one for one in iterations if one["case"] == "usual"]
    assert [one["recorded"] for one in usual] == [one["size"] <= MOST_REQUESTS for one in usual]
    # 5, 7 and 8 requests share a recording, and so do 37, 33 and 40.
    assert [one["size"] for one in usual if one["new"]] == [3, 1, 2, 5, 4, 37, 64]


def test_what_cannot_be_recorded_is_computed_as_before(iterations):
    others = [one for one in iterations if one["case"] != "usual"]
    assert [one["size"] for one in others] == [12] * 3 + [16] * 3 + [7] * 3
    assert not any(one["new"] for one in others)


def test_logits_do_not_depend_on_recordings(iterations):
    for one in iterations:
        assert one["requests"] == one["size"]
        assert one["finite"] and one["spread"] > 0.5
        assert not one["eager_recorded"]
        assert one["repeated"] == 0
        assert one["without"] < 1e-4, one


def test_logits_equal_torch_natives(iterations):
    assert max(one["native"] for one in iterations) < 1e-4


def test_a_recorded_iteration_writes_its_own_slots_only(iterations):
    for one in iterations:
        assert one["foreign_slots"] == one["unwritten"] == []
