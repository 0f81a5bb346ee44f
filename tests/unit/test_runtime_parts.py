"""Parts of the runtime that need no engine: the policy that is built, checks of ranks and books."""

import pytest

from econoserve.config import RuntimeConfig
from econoserve.core.exact import ExactLedger
from econoserve.core.holding import HoldingConfig
from econoserve.core.shedding import SheddingConfig
from econoserve.core.types import IterationPlan, Launch, Preemption, Prefilled
from econoserve.policies import POLICIES
from econoserve.runtime.agreement import Agreement
from econoserve.runtime.books import BooksError, assert_true_books
from econoserve.runtime.building import Machine, build_policy, host_tokens

MACHINE = Machine(
    capacity_tokens=1000,
    chunk_tokens=256,
    budget_tokens=512,
    context_tokens=4096,
    max_running=32,
    bytes_per_token=1024.0,
)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_built_for_the_machine(name):
    policy = build_policy(RuntimeConfig(policy=name), MACHINE)
    assert policy.ledger.capacity_tokens == 1000
    assert policy.plan is not None


def test_settings_reach_econoserve():
    config = RuntimeConfig(
        tfs=9999,
        kvc_risk=0.3,
        parked_kvc=0.5,
        late="reject",
        host_kvc_gib=1.0,
        hold_steps=3,
        hold_pace=0.5,
        deferred_margin=0.2,
        deferred_step=0.01,
        deferred_most=0.3,
    )
    policy = build_policy(config, MACHINE)
    assert policy.config.tfs.pinned_tokens == MACHINE.chunk_tokens
    assert policy.config.kvc.risk == 0.3
    assert policy.config.parked_fraction == 0.5
    assert policy.config.late.value == "reject"
    assert policy.config.holding == HoldingConfig(3, 0.5)
    assert policy.config.shedding == SheddingConfig(0.2, 0.01, 0.3)
    learned = build_policy(RuntimeConfig(tfs_burst=2.0, tfs_saturation=0.8), MACHINE).config.tfs
    assert (learned.tpot_burst, learned.saturation) == (2.0, 0.8)
    assert policy.config.victims.offload_s_per_token == pytest.approx(1024 / 20e9)
    assert host_tokens(config, MACHINE) == 2**20


def test_a_learned_tfs_stays_within_the_chunk():
    small = Machine(1000, 64, 512, 4096, 32, 1024.0)
    assert build_policy(RuntimeConfig(), small).config.tfs.limits_tokens == (64, 64)
    assert build_policy(RuntimeConfig(), MACHINE).config.tfs.limits_tokens == (128, 256)


def test_without_host_memory_nobody_is_moved():
    assert build_policy(RuntimeConfig(), MACHINE).config.victims.offload_s_per_token is None
    srtf = build_policy(RuntimeConfig(policy="srtf"), MACHINE)
    assert srtf.config.preemption is Preemption.RECOMPUTE
    assert build_policy(RuntimeConfig(policy="fastserve"), MACHINE).config.host_tokens == 0


def test_digests_tell_plans_apart():
    def digest(*plans):
        agreement = Agreement(every=2)
        asked = [agreement.note(plan) for plan in plans]
        return agreement._digest, asked

    plan = IterationPlan(prefill=(("a", 3),))
    assert digest(plan, None) == digest(IterationPlan(prefill=(("a", 3),)), None)
    assert digest(plan, None)[0] != digest(IterationPlan(prefill=(("a", 4),)), None)[0]
    assert digest(plan)[0] != digest(None)[0]
    assert digest(plan, plan, plan)[1] == [False, True, False]
    assert Agreement(every=0).note(plan) is False


def test_books_that_differ_from_the_pool_are_named():
    ledger = ExactLedger(100)
    ledger.take("a", 10)
    assert_true_books(ledger, {"a": 10}, used_tokens=10, shared_tokens=0)
    with pytest.raises(BooksError, match=r"'a': \(10, 11\)"):
        assert_true_books(ledger, {"a": 11}, used_tokens=11, shared_tokens=0)
    with pytest.raises(BooksError, match="1 claims of requests that hold nothing"):
        assert_true_books(ledger, {}, used_tokens=0, shared_tokens=0)


def test_a_dropped_token_is_decoded_again():
    policy = build_policy(RuntimeConfig(policy="plus"), MACHINE)
    from econoserve.core.lengths import LengthPrediction
    from econoserve.core.types import Task

    policy.add(Task("a", 0.0, 10, LengthPrediction((20,), 1.0, 20)))
    policy.on_launch(IterationPlan(), Launch(prefilled=(Prefilled("a", 10, 0, True),)))
    for _ in range(3):
        policy.on_launch(IterationPlan(), Launch(resumed=("a",), decoded=("a",)))
    policy.on_launch(IterationPlan(), Launch(offloaded=("a",), dropped=("a",)))
    assert policy.books["a"].offloaded_tokens == 12
    assert policy.books.response_left(policy.books["a"]) == (18,)
