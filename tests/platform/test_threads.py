"""How many threads compute in a scheduler process."""

import os

import pytest
import torch

from econoserve.platform import threads


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"),
    (
        (1, 1, 1),
        (2, 1, 1),
        (3, 1, 2),
        (8, 1, 7),
        (8, 2, 3),
        (9, 2, 4),
        (64, 4, 15),
        (2, 2, 1),
        (2, 8, 1),
    ),
)
def test_one_core_is_left_and_the_rest_is_shared(cores, ranks, expected):
    assert threads.default_threads(cores, ranks) == expected


def test_the_share_is_of_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)))
    threads.apply(2)
    assert torch.get_num_threads() == 3


def test_the_users_number_stands(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)))
    torch.set_num_threads(2)
    threads.apply(1)
    assert torch.get_num_threads() == 2
