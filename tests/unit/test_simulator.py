"""The simulator: nothing is lost, the same again is the same, and small cases come out by hand."""

import itertools
import json
from dataclasses import replace

import pytest

from econoserve.cli import main
from econoserve.core.types import Outcome, Slo
from econoserve.policies import POLICIES, make_policy
from econoserve.prediction.oracle import Oracle
from econoserve.prediction.quantile import GlobalQuantiles
from econoserve.prediction.request import RequestFeatures
from econoserve.sim.instance import Instance, Machine
from econoserve.sim.operators import OperatorTables
from econoserve.sim.profile import Memory, ProfileError, load_profile, profile_names, read_profile
from econoserve.sim.records import summarise
from econoserve.sim.run import RunSpec, serve, simulate
from econoserve.sim.timing import DistServeFit, Pass
from econoserve.workload.trace import TraceRequest
from econoserve.workload.workload import WorkloadSpec

SPEC = RunSpec(
    "plus",
    WorkloadSpec("synthetic:sharegpt", 6.0, 60, slo=Slo(ttft_s=2.0, tpot_s=0.2), seed=3),
    "a100",
    "opt-13b",
    capacity_tokens=3000,
)


class Flat:
    """Every pass takes a second."""

    def seconds(self, work):
        return 1.0


def request(arrival_s, prompt, output, slo=None):
    return TraceRequest(arrival_s, RequestFeatures(prompt, 1000), output, slo=slo or Slo())


def oracle(requests):
    truth = {id(r.features): r.output_tokens for r in requests}
    return Oracle(0.5, lambda features: truth[id(features)])


def served(name, requests, capacity, **machine):
    instance = Instance(
        Machine(capacity, Flat(), **machine), make_policy(name, capacity), oracle(requests)
    )
    serve(instance, requests)
    return instance


@pytest.mark.parametrize("name", ["plus", "vllm_v1"])
def test_two_requests_by_hand(name):
    # r0's prompt is computed until 1 s; then it decodes until 3 s, beside r1's prompt at first.
    requests = [request(0.0, 10, 3), request(0.5, 5, 2, Slo(e2e_s=2.0))]
    instance = served(name, requests, 100)
    first, second = instance.records
    assert (first.first_token_s, first.end_s, second.first_token_s, second.end_s) == (1, 3, 2, 3)
    assert (second.ttft_s, second.jct_s, second.tpot_s) == (1.5, 2.5, 1.0)
    figures = summarise(instance.records, instance.use)
    assert figures["mean_jct_s"] == 2.75 and figures["ssr"] == 0.5
    assert figures["throughput_rps"] == pytest.approx(2 / 3)
    assert figures["goodput_rps"] == pytest.approx(1 / 3)
    # In the three passes 10, 11 + 5 and 12 + 6 tokens are held.
    assert figures["kvc_utilisation"] == pytest.approx(44 / 300)
    assert figures["kvc_useful_utilisation"] == pytest.approx(44 / 300)


def test_a_preemption_by_hand():
    # Blocks of 16 in 32 tokens: the second gives way when the first needs its second block.
    instance = served("vllm_v1", [request(0.0, 15, 5), request(0.0, 15, 5)], 32)
    first, second = instance.records
    assert (first.end_s, first.preemptions, second.preemptions) == (5.0, 0, 1)
    # It held its prompt and a token; then it waits, and goes on where it was.
    assert second.recomputed_tokens == 16
    assert second.end_s == 8.0
    use = instance.use
    assert use.useful < use.held


def test_what_never_fits_is_refused_and_the_rest_served():
    instance = served("plus", [request(0.0, 200, 3), request(0.0, 10, 3)], 100)
    assert [record.outcome for record in instance.records] == [Outcome.REJECTED, Outcome.FINISHED]
    assert summarise(instance.records, instance.use)["rejected"] == 1


@pytest.mark.parametrize("name", POLICIES)
def test_all_end_and_nothing_is_held(name):
    requests = [
        request(number * 0.3, 5 + 7 * number % 40, 1 + 11 * number % 50) for number in range(40)
    ]
    predictor = GlobalQuantiles(0.5, 10)
    instance = Instance(
        Machine(200, Flat(), move_s_per_token=0.001), make_policy(name, 200), predictor
    )
    serve(instance, requests)
    assert not instance.busy and instance.held_tokens == 0
    assert [record.outcome for record in instance.records] == [Outcome.FINISHED] * 40
    use = instance.use
    assert 0 < use.useful <= use.held * (1 + 1e-9) <= use.offered
    for record in instance.records:
        # The prompt's pass and a pass for each further token, one second each, at least.
        assert record.jct_s >= record.output_tokens
        assert record.ttft_s >= 1.0


def test_moved_kvc_takes_time():
    requests = [request(number * 0.1, 20, 30) for number in range(20)]
    ends = []
    for cost_s in (0.0, 0.01):
        instance = served("fastserve", requests, 200, move_s_per_token=cost_s)
        assert any(record.preemptions for record in instance.records)
        ends.append(max(record.end_s for record in instance.records))
    assert ends[0] < ends[1]


def test_the_same_again_is_the_same_and_another_seed_is_not():
    first, again = simulate(SPEC), simulate(SPEC)
    assert json.dumps(first.figures) == json.dumps(again.figures)
    assert first.records == again.records
    other = replace(SPEC, workload=replace(SPEC.workload, seed=4))
    assert simulate(other).figures != first.figures


@pytest.mark.parametrize("name", ["plus", "vllm_v1"])
def test_more_load_is_not_served_sooner(name):
    means = []
    for rate_rps in (1.0, 64.0):
        workload = replace(SPEC.workload, rate_rps=rate_rps)
        means.append(simulate(replace(SPEC, policy=name, workload=workload)).figures["mean_jct_s"])
    assert means == sorted(means)


def test_exact_lengths_need_no_preemption():
    figures = simulate(replace(SPEC, policy="full", predictor="oracle")).figures
    assert figures["preemptions"] == 0 and figures["served"] == 60


def test_overhead_is_added_to_every_iteration():
    # A policy that does the same at the same steps, whatever they cost.
    spec = replace(SPEC, policy="vllm_v1")
    plain, slow = (simulate(replace(spec, overhead_s=s)).figures for s in (0.0, 0.02))
    assert slow["mean_tpot_s"] > plain["mean_tpot_s"] + 0.015


def test_kvc_capacity_is_what_weights_and_activations_leave():
    memory = Memory(
        1000,
        2,
        0.9,
        weights_bytes=600,
        activation_bytes=50,
        layers=2,
        kv_heads=3,
        head_dim=2,
        bytes_per_value=2,
    )
    assert memory.kvc_bytes_per_token == 2 * 2 * 3 * 2 * 2
    assert memory.capacity_tokens == (1800 - 600 - 100) // 48
    with pytest.raises(ProfileError, match="weights_bytes=1790 leave no KVC"):
        replace(memory, weights_bytes=1790)


@pytest.mark.parametrize("name", profile_names())
def test_packaged_profiles_are_sane(name):
    profile = load_profile(*name.split("/"))
    assert profile.source and profile.memory.capacity_tokens > 40_000
    alone = Pass(1, 512, 512**2, 512**2)
    decode = Pass(decoding=32, context_tokens=32 * 500)
    both = Pass(1, 512, 512**2, 512**2, 32, 32 * 500)
    times_s = [profile.time.seconds(work) for work in (alone, decode, both)]
    assert times_s[2] < times_s[0] + times_s[1]
    assert times_s[2] >= max(times_s[:2]) and min(times_s) > 1e-3
    assert profile.time.seconds(Pass()) == 0.0


def test_opt_13b_has_about_the_kvc_that_distserve_states():
    assert load_profile("a100", "opt-13b").memory.capacity_tokens == pytest.approx(66144, rel=0.1)


def test_distserve_fits_are_used_as_published():
    fit = DistServeFit((10.0, 0.1, 1e-5), (20.0, 1e-3, 0.05), (5.0, 2e-3, 0.2), 95)
    assert fit.seconds(Pass(2, 300, 50_000)) == pytest.approx(0.0405)
    assert fit.seconds(Pass(decoding=10, context_tokens=1000)) == pytest.approx(0.0215)
    assert fit.seconds(Pass(decoding=95, context_tokens=1000)) == pytest.approx(0.026)
    assert fit.seconds(Pass(2, 300, 50_000, 0, 10, 1000)) == pytest.approx(0.0425)


def test_wrong_profiles_say_what_is_wrong():
    with pytest.raises(ProfileError, match="no profile b100/opt-13b: choose one of a100"):
        load_profile("b100", "opt-13b")
    with pytest.raises(ProfileError, match="field 'source' is missing"):
        read_profile("mine", "{}")
    with pytest.raises(ProfileError, match=r"nowhere\.json: no such file"):
        load_profile("nowhere.json", "")


def test_the_command_prints_json(capsys):
    arguments = "simulate --policy plus --trace synthetic:sharegpt --rate 3 --num-requests 20"
    arguments += " --hardware a100 --model opt-13b --slo ttft=1,tpot=0.2 --seed 1 --output json"
    printed = []
    for _ in range(2):
        assert main(arguments.split()) == 0
        printed.append(json.loads(capsys.readouterr().out))
        assert printed[-1].pop("wall_s") > 0
    assert printed[0] == printed[1]
    names = "throughput_rps goodput_rps ssr mean_jct_s p99_jct_s mean_ttft_s mean_tpot_s"
    names += " preemptions recomputed_tokens kvc_utilisation kvc_useful_utilisation"
    assert set(names.split()) <= set(printed[0]) and printed[0]["served"] == 20


def test_the_command_compares_in_a_table(capsys):
    arguments = "simulate --policy plus vllm_v1 --rate 2 4 --num-requests 10 --jobs 1"
    assert main([*arguments.split(), "--hardware", "a100", "--model", "opt-13b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[2].startswith("| plus") and "vllm_v1" in lines[5]


def test_the_command_explains_what_is_wrong(capsys):
    arguments = ["simulate", "--policy", "plus", "--rate", "3", "--hardware", "a100"]
    assert main(arguments) == 2
    assert "--model is missing: with --hardware a100 give one of" in capsys.readouterr().err


def operators():
    # Attention costs a token of prompt 1 us for each token before it, and 2 us for each decoding.
    axes = ((0, 100), (0, 100), (0, 10), (0, 50))
    grid = itertools.product(*axes)
    return {
        "layers": 2,
        "tokens": [1, 101],
        "layer_us": [10, 110],
        "once_us": [5, 5],
        "sequences": [1, 11],
        "sequence_us": [1, 11],
        "attention_axes": axes,
        "attention_us": [chunk * before + 2 * count for chunk, before, count, _ in grid],
    }


def test_operators_add_up():
    tables = OperatorTables.of(operators())
    # Linear layers: 9 + tokens; then attention; once: 5 and the sequences.
    assert tables.seconds(Pass(decoding=5, context_tokens=100)) == pytest.approx(58e-6)
    # 20 tokens behind 40 others.
    squares = 60**2 - 40**2
    assert tables.seconds(Pass(1, 20, squares)) == pytest.approx((2 * (29 + 800) + 6) * 1e-6)
    assert tables.seconds(Pass(2, 20, 200)) == pytest.approx((2 * 29 + 7) * 1e-6)
    assert tables.seconds(Pass()) == 0.0


def test_tables_of_the_wrong_size_are_refused():
    for name, value, words in (
        ("attention_us", [1.0], "attention_us has 1 values: give one for each point"),
        ("tokens", [3, 3], "give two or more ascending values"),
    ):
        fields = operators() | {name: value}
        with pytest.raises(ValueError, match=words):
            OperatorTables.of(fields)
