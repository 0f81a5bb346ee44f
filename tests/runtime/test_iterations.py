"""The log of iterations, from which a profile is made."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from econoserve.config import RuntimeConfig
from econoserve.core.cost import IterationWork
from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import Launch, Prefilled, Task, View
from econoserve.policies import make_policy
from econoserve.runtime.building import Machine
from econoserve.runtime.iterations import check_log, iteration_log
from econoserve.runtime.learning import Place
from econoserve.runtime.work import work_of

MACHINE = Machine(
    capacity_tokens=1000,
    chunk_tokens=512,
    budget_tokens=512,
    context_tokens=4096,
    max_running=8,
    bytes_per_token=64,
)


def test_one_rank_of_a_replica_writes_if_asked(tmp_path):
    config = RuntimeConfig(iteration_log=str(tmp_path / "log"))
    assert iteration_log(RuntimeConfig(), MACHINE, Place()) is None
    assert iteration_log(config, MACHINE, Place(writes=False)) is None
    assert iteration_log(config, MACHINE, Place(replica=1)) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["log.1"]


def test_an_iteration_lasts_until_the_next_launch_and_idle_time_is_none(tmp_path):
    log = iteration_log(RuntimeConfig(iteration_log=str(tmp_path / "log")), MACHINE, Place())
    policy = make_policy("vllm_v1", 1000)
    policy.add(Task("a", 0.0, 20, LengthPrediction((30,), 0.5, 100)))
    policy.add(Task("b", 0.0, 5, LengthPrediction((30,), 0.5, 100)))
    plan = policy.plan(View(0.0, 1000, 0, 8, 8))
    works = []
    for launch in (
        Launch(prefilled=(Prefilled("a", 12, 0, False),)),
        Launch(prefilled=(Prefilled("a", 8, 0, True),)),
        Launch(),
        Launch(),
        Launch(resumed=("a",), decoded=("a",)),
        Launch(prefilled=(Prefilled("b", 5, 0, True),)),
        Launch(),
    ):
        policy.on_launch(plan, launch)
        log.launched(launch, policy)
        works.append(work_of(launch, policy))
    header, *rows = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert header == {
        "kvc_tokens": 1000,
        "bytes_per_token": 64,
        "context_tokens": 4096,
        "tensor": 1,
        "pipeline": 1,
    }
    assert all(row.pop("seconds") >= 0 for row in rows)
    prompt = {"prompts": 1, "decoding": 0, "context_tokens": 0}
    assert rows[0] == {**prompt, "prompt_tokens": 12, "prompt_squares": 144}
    assert rows[1] == {**prompt, "prompt_tokens": 8, "prompt_squares": 400 - 144}
    assert (rows[2]["decoding"], rows[2]["context_tokens"], len(rows)) == (1, 21, 4)
    assert works[4] == IterationWork(decoding=1, context_tokens=21)
    # Who sits a pass out costs nothing in it.
    assert rows[3] == {**prompt, "prompt_tokens": 5, "prompt_squares": 25}
    assert works[5] == IterationWork(5, 25, sitting_out=1)


def test_the_log_says_how_many_gpus_hold_the_kvc(tmp_path):
    machine = replace(MACHINE, tensor=4)
    log = iteration_log(RuntimeConfig(iteration_log=str(tmp_path / "log")), machine, Place())
    policy = make_policy("vllm_v1", 1000)
    policy.add(Task("a", 0.0, 20, LengthPrediction((30,), 0.5, 100)))
    for launch in (Launch(prefilled=(Prefilled("a", 1, 0, False),)), Launch()):
        log.launched(launch, policy)
    header = json.loads((tmp_path / "log").read_text().splitlines()[0])
    assert (header["tensor"], header["bytes_per_token"]) == (4, 256)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_ends_the_log_and_nothing_else(tmp_path, caplog):
    (tmp_path / "log").symlink_to("/dev/full")
    log = iteration_log(RuntimeConfig(iteration_log=str(tmp_path / "log")), MACHINE, Place())
    policy = make_policy("vllm_v1", 1000)
    policy.add(Task("a", 0.0, 20, LengthPrediction((30,), 0.5, 100)))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            log.launched(Launch(prefilled=(Prefilled("a", 1, 0, False),)), policy)
            log.launched(Launch(), policy)
    assert [record.message.split(": ")[0] for record in caplog.records] == [
        f"The iteration log {tmp_path / 'log'} ends here"
    ]


def test_a_folder_that_vanished_ends_the_log_and_nothing_else(tmp_path, caplog):
    config = RuntimeConfig(iteration_log=str(tmp_path / "none" / "log"))
    log = iteration_log(config, MACHINE, Place())
    log.launched(Launch(), make_policy("vllm_v1", 1000))
    assert len(caplog.records) == 1


def test_a_log_that_cannot_be_written_is_refused_before_the_launch(tmp_path):
    check_log(RuntimeConfig(), replicas=2)
    check_log(RuntimeConfig(iteration_log=str(tmp_path / "log")), replicas=2)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"iteration-log=.*no folder that can be written: make"):
        check_log(RuntimeConfig(iteration_log=str(tmp_path / "none" / "log")), replicas=1)
    (tmp_path / "log.1").mkdir()
    with pytest.raises(ValueError, match=r"log\.1' cannot be written: name another file"):
        check_log(RuntimeConfig(iteration_log=str(tmp_path / "log")), replicas=2)
