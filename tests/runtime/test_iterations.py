"""The log of iterations, from which a profile is made."""

import json

from econoserve.config import RuntimeConfig
from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import Launch, Prefilled, Task, View
from econoserve.policies import make_policy
from econoserve.runtime.building import Machine
from econoserve.runtime.iterations import iteration_log
from econoserve.runtime.learning import Place

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
    plan = policy.plan(View(0.0, 1000, 0, 8, 8))
    for launch in (
        Launch(prefilled=(Prefilled("a", 12, 0, False),)),
        Launch(prefilled=(Prefilled("a", 8, 0, True),)),
        Launch(),
        Launch(),
        Launch(resumed=("a",), decoded=("a",)),
        Launch(),
    ):
        policy.on_launch(plan, launch)
        log.launched(launch, policy)
    header, *rows = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert header == {"kvc_tokens": 1000, "bytes_per_token": 64, "context_tokens": 4096}
    assert all(row.pop("seconds") >= 0 for row in rows)
    prompt = {"prompts": 1, "decoding": 0, "context_tokens": 0}
    assert rows[0] == {**prompt, "prompt_tokens": 12, "prompt_squares": 144}
    assert rows[1] == {**prompt, "prompt_tokens": 8, "prompt_squares": 400 - 144}
    assert (rows[2]["decoding"], rows[2]["context_tokens"], len(rows)) == (1, 21, 3)
