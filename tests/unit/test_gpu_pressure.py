"""The check's goodput stage: arrivals and SLO, and that its sizes tell schedulers apart."""

import contextlib
import math
from dataclasses import replace

import pytest

from benchmark.gpu import pressure, stages
from benchmark.gpu.lengths import draw_requests
from benchmark.gpu.results import Results
from benchmark.gpu.serving import goodput
from benchmark.gpu.sizes import CPU_QUICK, CUDA_FULL, CUDA_QUICK, Device
from econoserve.core.types import Outcome, Slo
from econoserve.policies import make_policy
from econoserve.prediction.registry import make_replay_predictor
from econoserve.prediction.request import RequestFeatures
from econoserve.sim.instance import Instance, Machine
from econoserve.sim.regimes import TwoRegimes
from econoserve.sim.run import serve
from econoserve.workload.trace import TraceRequest

LIMIT_TOKENS = 1024

# Guesses, not measurements: an 8B model takes about 5.5 ms to read its weights on an H200.
GUESSED = {
    "8b": TwoRegimes((5.5e-3, 0, 0, 1.1e-5, 2.8e-8), (5.5e-3, 1.9e-5, 7e-10, 2.1e-5, 2.8e-8)),
    "1b": TwoRegimes((2.2e-3, 0, 0, 6e-6, 7e-9), (4e-3, 2.8e-6, 1.7e-10, 7.5e-6, 7e-9)),
}


def _answer(ttft_s, jct_s, output_tokens):
    return {"ttft_s": ttft_s, "jct_s": jct_s, "output_tokens": output_tokens}


def test_the_run_down_does_not_count():
    # Two at a time, each 10 tokens in 1 s: two a second, until the last one runs on alone.
    steady = [_answer(float(at), at + 1.0, 10) for at in range(8) for _ in range(2)]
    expected = pytest.approx(2.0, rel=0.01)
    assert pressure.sustained_requests_per_s([*steady, _answer(8.0, 9.0, 10)]) == expected
    # Its mean length counts, its time does not.
    slow = pressure.sustained_requests_per_s([*steady, _answer(8.0, 60.0, 10)])
    assert slow == expected


def test_a_burst_in_which_nobody_waits_is_refused():
    with pytest.raises(ValueError, match="none waited"):
        pressure.sustained_requests_per_s([_answer(0.0, 1.0, 10)] * 3)


def test_responses_of_one_token_count_where_they_came():
    answers = [_answer(1.0, 1.0, 1), _answer(3.0, 3.0, 1), _answer(4.0, 5.0, 1)]
    assert pressure.sustained_requests_per_s(answers) == pytest.approx(2 / 3)


def test_the_slo_follows_from_the_pace_alone():
    assert pressure.slo_ms(6.0, 1.0) == 1024 * 6.0
    assert pressure.slo_ms(6.0, 0.1) == pytest.approx(102.4 * 6.0)


def _served(policy, load, requests):
    """Simulated answers of a policy, after it learned from other requests as in the stage."""
    constants = {"chunked_prefill_tokens": 2048} if policy == "sglang" else {}
    predictor = make_replay_predictor("quantile", 0.5, lambda _: 0)
    machine = Machine(load.bound_kvc_tokens, GUESSED[load.model], 1e-6, 256, overhead_s=1e-4)
    instance = Instance(machine, make_policy(policy, load.bound_kvc_tokens, **constants), predictor)
    first = _requests(32, math.inf, 1001)
    later = [replace(one, arrival_s=one.arrival_s + 1000.0) for one in requests]
    serve(instance, [*first, *later])
    return instance.records[len(first) :]


def _requests(count, rate_per_s, seed, slo_s=None):
    return [
        TraceRequest(
            one.arrival_s,
            RequestFeatures(len(one.prompt_ids), LIMIT_TOKENS, limit_tokens=LIMIT_TOKENS),
            one.output_tokens,
            slo=Slo(e2e_s=slo_s),
        )
        for one in draw_requests(count, 1.0, rate_per_s, range(100), seed)
    ]


@pytest.mark.parametrize("load", [*CUDA_FULL.loads, *CUDA_QUICK.loads], ids=lambda one: one.model)
def test_the_sizes_bind_the_kvc_and_tell_policies_apart(load):
    few = _served("sglang", load, _requests(4, math.inf, 1002))
    burst = _served("sglang", load, _requests(load.bound_requests, math.inf, 1))
    answers = [_answer(one.ttft_s, one.jct_s, one.output_tokens) for one in burst]
    rate_per_s = pressure.LOAD_FACTOR * pressure.sustained_requests_per_s(answers)
    slo_s = pressure.slo_ms(sum(one.tpot_s for one in few) / 4 * 1e3, 1.0) / 1e3
    # The longest response can keep it where nobody waits, the last one of the burst cannot.
    assert max(one.jct_s for one in few) < slo_s < max(one.ttft_s for one in burst)
    work = _requests(load.bound_requests, rate_per_s, 2, slo_s)
    met, last_s = {}, {}
    for policy in ("sglang", "plus"):
        records = _served(policy, load, work)
        assert all(one.outcome is Outcome.FINISHED for one in records)
        met[policy] = sum(one.met for one in records) / len(records)
        last_s[policy] = max(one.end_s for one in records) - 1000.0
    assert 0.2 < met["sglang"] < 0.8
    assert met["plus"] > 1.25 * met["sglang"]
    assert max(last_s.values()) < 35


class FakeEngine:
    """Has room for a fourth of what comes; serves each fourth in a time of its own."""

    def __init__(self, system, seconds):
        self.system, self.seconds = system, seconds
        self.prompts = []

    def ask(self, name, requests):
        assert name == "burst"
        self.prompts += [tuple(one["prompt_ids"]) for one in requests]
        quarter = max(len(requests) // 4, 4)
        answers = []
        for number, one in enumerate(requests):
            begun_s = number // quarter * self.seconds
            fields = {"error": None, "retractions": 0, "wanted_tokens": one["output_tokens"]}
            times = {"ttft_s": begun_s, "jct_s": begun_s + self.seconds}
            answers.append({**fields, **times, **one})
        return {"answers": answers, "counters": {"parked": 1}}


def test_goodput_counts_requests_that_keep_an_slo_that_stock_alone_defines(tmp_path, monkeypatch):
    engines = {"stock": FakeEngine("stock", 0.2), "econoserve": FakeEngine("econoserve", 0.1)}
    sizes = replace(CPU_QUICK, run_repeats=3)
    check = stages.Check(Device.CPU, sizes, tmp_path, Results(tmp_path))
    monkeypatch.setattr(
        stages.Check, "use", lambda *_: contextlib.nullcontext(engines), raising=True
    )
    monkeypatch.setattr(pressure, "slo_ms", lambda tpot_ms, scale: 450.0 + 0 * tpot_ms * scale)
    load = replace(CPU_QUICK.loads[0], bound_requests=32)
    found = goodput(check, load)
    for engine in engines.values():
        longer = [prompt for prompt in engine.prompts if len(prompt) > 3]
        assert len(set(longer)) == len(longer), "a prompt came again: its length is known by now"
    # Eight every 0.2 s, so 40 a second, but that lengths differ from those of the mean.
    assert found["sustained_per_s"] == pytest.approx(40, rel=0.4)
    assert found["rate_per_s"] == pytest.approx(1.5 * found["sustained_per_s"])
    # Of stock's four groups two end within 0.45 s, of EconoServe's all.
    assert found["slo_met"]["stock"] == [0.5] * 3
    assert found["slo_met"]["econoserve"] == [1.0] * 3
    assert found["goodput"]["ratio"] == [2.0] * 3
    assert found["goodput"]["econoserve"][0] == pytest.approx(found["rate_per_s"])
    engines["stock"].ask = lambda *_, requests: {
        "answers": [{**one, "error": "refused"} for one in requests],
        "counters": {},
    }
    with pytest.raises(stages.StageFailed, match="request 0"):
        goodput(check, load)
