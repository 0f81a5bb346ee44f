"""The example of a loop of one's own, with every policy."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.core.types import Outcome, Preemption, Slo
from econoserve.policies import POLICIES, make_policy
from econoserve.policies.econoserve import EconoServe, EconoServeConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_loop.py"
CAPACITY = 400

spec = importlib.util.spec_from_file_location("own_loop", EXAMPLE)
own_loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(own_loop)


class Watched:
    """A policy, and in which ways its plans let requests give way."""

    def __init__(self, policy):
        self.policy = policy
        self.ways = set()

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def plan(self, view):
        plan = self.policy.plan(view)
        self.ways |= {how for _, how in plan.preempt}
        return plan


def assert_all_served(policy, requests):
    peak = own_loop.serve(policy, requests, CAPACITY)
    assert 0 < peak <= CAPACITY
    for request in requests:
        assert request.outcome is Outcome.FINISHED and request.produced == request.length
    assert len(policy.books) == policy.ledger.held_tokens == policy.ledger.promised_tokens == 0


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_serves_everything_within_the_kvc(name):
    for seed in range(5):
        assert_all_served(make_policy(name, CAPACITY), own_loop.some_requests(30, seed))


def test_the_modes_without_a_variant_run_too():
    for mode in KvcMode:
        config = EconoServeConfig(CAPACITY, kvc=KvcConfig(mode=mode))
        assert_all_served(EconoServe(config), own_loop.some_requests(30))


def test_the_loop_meets_every_way_of_giving_way():
    ways = set()
    for name in POLICIES:
        policy = Watched(make_policy(name, CAPACITY))
        assert_all_served(policy, own_loop.some_requests(30))
        ways |= policy.ways
    assert ways == set(Preemption)


def test_refused_requests_are_removed():
    requests = own_loop.some_requests(30)
    for request in requests[::2]:
        request.task = replace(request.task, slo=Slo(ttft_s=0.05))
    policy = make_policy("plus", CAPACITY, late="reject")
    assert own_loop.serve(policy, requests, CAPACITY) <= CAPACITY
    refused = [request for request in requests if request.outcome is Outcome.REJECTED]
    assert refused and all(request.produced == 0 for request in refused)
    assert all(request.outcome for request in requests) and len(policy.books) == 0


def test_as_a_script_it_prints_what_ran():
    done = subprocess.run(
        [sys.executable, EXAMPLE, "vllm"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "KVC" in done.stdout and "vllm: all ended" in done.stdout.splitlines()[-1]
