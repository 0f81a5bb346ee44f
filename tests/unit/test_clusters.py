"""Replicas behind a router: nothing is lost, and what each does is what it does alone."""

import json
from dataclasses import replace

import pytest

from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import Outcome, Slo
from econoserve.policies import make_policy
from econoserve.prediction.oracle import Oracle
from econoserve.prediction.request import RequestFeatures
from econoserve.sim.cluster import Clock, Cluster, run_events, total_use
from econoserve.sim.instance import Instance, Machine
from econoserve.sim.records import KvcUse
from econoserve.sim.routing import ROUTERS, KvcDemand, LeastLoad, RoundRobin, make_router
from econoserve.sim.run import RunSpec, serve, simulate
from econoserve.workload.trace import TraceRequest
from econoserve.workload.workload import WorkloadSpec

SPEC = RunSpec(
    "plus",
    WorkloadSpec("synthetic:sharegpt", 6.0, 80, slo=Slo(ttft_s=2.0, tpot_s=0.2), seed=3),
    "a100",
    "opt-13b",
    capacity_tokens=3000,
)


class Flat:
    """Every pass takes a second."""

    def seconds(self, work):
        return 1.0


def request(arrival_s, prompt, output):
    return TraceRequest(arrival_s, RequestFeatures(prompt, 1000), output)


REQUESTS = [request(0.3 * number, 5 + 7 * number % 40, 1 + number % 30) for number in range(60)]


def oracle(requests):
    truth = {id(r.features): r.output_tokens for r in requests}
    return Oracle(0.5, lambda features: truth[id(features)])


def instance(requests, policy="vllm_v1", capacity=300):
    return Instance(Machine(capacity, Flat()), make_policy(policy, capacity), oracle(requests))


def cluster_of(requests, count, router):
    clock = Clock()
    instances = [instance(requests) for _ in range(count)]
    cluster = Cluster(instances, router, clock, requests[0].arrival_s)
    assert run_events(cluster, clock, requests)
    return cluster


def facts_of(instance):
    return [(r.arrival_s, r.first_token_s, r.end_s, r.preemptions) for r in instance.records]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("policy", ["plus", "vllm"])
def test_one_replica_behind_a_router_is_the_plain_run(policy, router):
    plain = simulate(replace(SPEC, policy=policy))
    behind = simulate(replace(SPEC, policy=policy, router=router))
    assert json.dumps(behind.figures) == json.dumps(plain.figures)
    assert behind.records == plain.records


def test_two_in_turn_are_two_separate_runs():
    both = cluster_of(REQUESTS, 2, RoundRobin([300, 300]))
    for number in range(2):
        alone = instance(REQUESTS[number::2])
        serve(alone, REQUESTS[number::2])
        ours = both.servers[number].instance
        assert facts_of(ours) == facts_of(alone)
        assert ours.use.held == pytest.approx(alone.use.held)
    # Each KVC is offered from the first arrival to the last end, wherever these are.
    end_s = max(record.end_s for record in both.records)
    assert both.use.offered == pytest.approx(2 * 300 * end_s)
    assert [record.rid for record in both.records] == [f"r{number}" for number in range(60)]


@pytest.mark.parametrize("name", ROUTERS)
def test_all_are_served_by_someone_and_sooner_than_by_one(name):
    spec = replace(SPEC, router=name, workload=replace(SPEC.workload, rate_rps=20.0))
    one, three = (simulate(replace(spec, instances=count)) for count in (1, 3))
    again = simulate(replace(spec, instances=3))
    assert json.dumps(three.figures) == json.dumps(again.figures)
    assert three.records == again.records
    assert all(record.outcome is Outcome.FINISHED for record in three.records)
    assert three.figures["mean_jct_s"] < one.figures["mean_jct_s"]
    assert three.figures["gpus"] == 3 and three.figures["capacity_tokens"] == 9000
    assert 0 < three.figures["kvc_useful_utilisation"] <= three.figures["kvc_utilisation"] <= 1


def test_round_robin_takes_turns():
    router = RoundRobin([1, 1, 1])
    assert [router.choose(str(n), RequestFeatures(1, 1)) for n in range(5)] == [0, 1, 2, 0, 1]


def test_least_load_counts_who_has_not_ended():
    router = LeastLoad([1, 1])
    assert [router.choose(rid, RequestFeatures(1, 1)) for rid in "abc"] == [0, 1, 0]
    router.on_end("a", 5)
    router.on_end("c", None)
    assert [router.choose(rid, RequestFeatures(1, 1)) for rid in "de"] == [0, 0]


def test_kvc_demand_looks_at_tokens_and_capacities():
    lengths = {"short": 10, "long": 500}
    features = {name: RequestFeatures(10, 1000) for name in lengths}
    truth = {id(features[name]): lengths[name] for name in lengths}
    router = KvcDemand([1000, 1000], Oracle(0.5, lambda seen: truth[id(seen)]))
    assert router.choose("a", features["long"]) == 0
    # 25 short ones ask for less than a long one.
    assert {router.choose(f"b{n}", features["short"]) for n in range(25)} == {1}
    assert router.choose("c", features["long"]) == 1
    router.on_end("a", 500)
    assert router.choose("d", features["long"]) == 0
    uneven = KvcDemand([1000, 3000], Oracle(0.5, lambda seen: truth[id(seen)]))
    chosen = [uneven.choose(str(n), features["long"]) for n in range(4)]
    assert chosen == [1, 1, 0, 1]


def test_kvc_demand_comes_back_to_nought():
    class Thirds(Oracle):
        def predict(self, features):
            low = features.prompt_tokens
            return LengthPrediction((low, low + 1, 3 * low), 0.5, 10_000)

    # Whichever of them a fraction is left in, one of these sets of prompts shows it.
    for factor in range(1, 8):
        router = KvcDemand([1000, 1000], Thirds(0.5, lambda features: 1))
        for number in range(200):
            router.choose(str(number), RequestFeatures(1 + factor * number % 97, 10_000))
        for number in range(200):
            router.on_end(str(number), None)
        assert router.choose("next", RequestFeatures(5, 10)) == 0, factor


def test_kvc_demand_learns_from_ends_and_forgets_what_was_refused():
    class Notes(Oracle):
        seen = ()

        def observe(self, features, output_tokens, ended):
            self.seen += ((output_tokens, ended),)

    predictor = Notes(0.5, lambda features: 10)
    router = KvcDemand([100], predictor)
    for rid, output_tokens in (("a", 7), ("b", 20), ("c", None)):
        router.choose(rid, RequestFeatures(5, 20))
        router.on_end(rid, output_tokens)
    assert predictor.seen == ((7, True), (20, False))


def test_an_unknown_router_is_refused():
    with pytest.raises(ValueError, match="router 'random': choose one of round-robin, least-load"):
        make_router("random", [1], lambda: oracle([]))


def test_the_clock_keeps_the_earliest_time_of_each():
    clock = Clock()
    for number, at_s in ((1, 5.0), (0, 5.0), (1, 3.0), (1, 4.0)):
        clock.wake(number, at_s)
    woken = []
    while clock.next_s < float("inf"):
        woken.append(clock.pop())
    assert woken == [(3.0, 1), (5.0, 0), (5.0, None)]


def test_uses_add_up():
    assert total_use([KvcUse(1.0, 2.0, 3.0), KvcUse(10.0, 20.0, 30.0)]) == KvcUse(11.0, 22.0, 33.0)
    whole = KvcUse(1.0, 2.0, 3.0, 4.0, 5.0, 6, 7)
    assert total_use([whole, whole]) == KvcUse(2.0, 4.0, 6.0, 8.0, 10.0, 12, 14)
    assert total_use([whole, KvcUse(1.0, 2.0, 3.0)]) == KvcUse(2.0, 4.0, 6.0)
