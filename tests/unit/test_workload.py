"""Workloads: traces are read as they are, arrivals keep their rate, and errors say what to do."""

import io
import json
import tarfile
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from econoserve.core.types import Slo
from econoserve.workload.arrivals import gamma, poisson, scaled
from econoserve.workload.objectives import parse_slo
from econoserve.workload.readers import read_csv, read_jsonl
from econoserve.workload.servegen import read_servegen
from econoserve.workload.synthetic import draw_lengths, synthetic_workloads
from econoserve.workload.trace import TraceError
from econoserve.workload.workload import WorkloadSpec, make_workload

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
VIDUR = """arrived_at,num_prefill_tokens,num_decode_tokens
3.5,20,7
1.0,30,0
"""
MOONCAKE = {"timestamp": 3000, "input_length": 1030, "output_length": 5, "hash_ids": [4, 5, 6]}
SERVINGSIM = {
    "input_toks": 20,
    "output_toks": 4,
    "arrival_time_ns": 5e8,
    "input_tok_ids": list(range(20)),
}


def written(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def lengths(requests):
    return [(request.features.prompt_tokens, request.output_tokens) for request in requests]


def test_azure_times_count_from_the_first(tmp_path):
    requests = read_csv(written(tmp_path, "azure.csv", AZURE))
    assert lengths(requests) == [(374, 44), (396, 109)]
    assert [request.arrival_s for request in requests] == pytest.approx([0.0, 4.314579], abs=1e-5)


def test_vidur_files_are_put_in_order_and_no_response_is_empty(tmp_path):
    requests = read_csv(written(tmp_path, "splitwise.csv", VIDUR))
    assert lengths(requests) == [(30, 1), (20, 7)]
    assert [request.arrival_s for request in requests] == [0.0, 2.5]


def test_lists_of_lengths_have_no_times(tmp_path):
    text = "num_prefill_tokens,num_decode_tokens\n10,2\n20,3\n30,4\n"
    requests = read_csv(written(tmp_path, "lengths.csv", text), limit=2)
    assert lengths(requests) == [(10, 2), (20, 3)]
    assert {request.arrival_s for request in requests} == {0.0}
    with pytest.raises(TraceError, match="--arrivals poisson"):
        scaled(requests, 1.0)


def test_mooncake_prompts_keep_their_prefixes(tmp_path):
    other = MOONCAKE | {"timestamp": 9000, "hash_ids": [4, 9, 10]}
    lines = f"{json.dumps(MOONCAKE)}\n\n{json.dumps(other)}\n"
    first, second = read_jsonl(written(tmp_path, "mooncake.jsonl", lines))
    assert len(first.features.prefix_hashes) == 2
    assert first.features.prefix_hashes[0] == second.features.prefix_hashes[0]
    assert first.features.prefix_hashes[1] != second.features.prefix_hashes[1]
    assert 3.0 <= second.arrival_s <= 9.0


def test_servingsim_workloads_bring_their_tokens(tmp_path):
    (request,) = read_jsonl(written(tmp_path, "w.jsonl", json.dumps(SERVINGSIM)))
    assert lengths([request]) == [(20, 4)] and request.features.edges


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "a,b\n1,2\n", "a.csv, line 1: columns a, b; give ContextTokens and"),
        ("a.csv", AZURE.replace("396", "x"), "a.csv, line 3: ContextTokens is 'x'; give a whole"),
        ("a.csv", AZURE.replace("396", "-4"), "ContextTokens is '-4'"),
        ("a.csv", AZURE.replace("2023-11-16 18:15:50", "soon"), "line 3: TIMESTAMP is 'soon"),
        ("a.csv", "ContextTokens,GeneratedTokens\n", "a.csv: no requests"),
        ("a.jsonl", "{]", "a.jsonl, line 1: .*JSON object in each line"),
        ("a.jsonl", "[1]", "give a JSON object"),
        ("a.jsonl", json.dumps(MOONCAKE | {"hash_ids": 3}), "line 1: hash_ids=3"),
        ("a.jsonl", json.dumps({"timestamp": 1}), "line 1: input_length is None"),
        ("a.csv", VIDUR.replace("3.5", "nan"), "line 2: arrived_at is 'nan'; give a time"),
        ("a.csv", VIDUR.replace("3.5", "-inf"), "line 2: arrived_at is '-inf'; give a time"),
        ("a.csv", VIDUR.replace("20", "nan"), "line 2: num_prefill_tokens is 'nan'; give a whole"),
        ("a.csv", VIDUR.replace("20", "inf"), "line 2: num_prefill_tokens is 'inf'; give a whole"),
        ("a.jsonl", json.dumps(MOONCAKE | {"timestamp": float("nan")}), "1: timestamp is nan;"),
        ("a.jsonl", json.dumps(MOONCAKE | {"output_length": float("inf")}), "output_length is inf"),
        ("a.jsonl", json.dumps(SERVINGSIM | {"arrival_time_ns": float("inf")}), "_ns is inf; give"),
        ("a.jsonl", json.dumps(SERVINGSIM | {"input_tok_ids": 5}), "line 1: input_tok_ids=5; give"),
        ("a.jsonl", json.dumps(SERVINGSIM | {"input_tok_ids": ["x"] * 20}), "a list of whole num"),
    ],
)
def test_errors_name_file_line_and_fix(tmp_path, name, text, words):
    read = read_csv if name.endswith("csv") else read_jsonl
    with pytest.raises(TraceError, match=words):
        read(written(tmp_path, name, text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", AZURE.replace("TIME", "\xe9")),
        ("a.csv", AZURE.replace("396", "\xe9")),
        ("a.jsonl", '"\xe9"'),
    ],
)
def test_a_file_of_another_encoding_is_named(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    read = read_csv if name.endswith("csv") else read_jsonl
    with pytest.raises(
        TraceError, match=f"{name}: byte 0xe9 is not UTF-8 .*; give a file in UTF-8"
    ):
        read(path)


def archive(path, clients):
    """An archive of ServeGen's form: windows of each client, and its distributions by span."""
    with tarfile.open(path, "w:xz") as file:
        for client, (windows, spans) in clients.items():
            lines = "".join(f"{start},{rate},{cv}\n" for start, rate, cv in windows)
            for name, text in (("trace.csv", lines), ("dataset.json", json.dumps(spans))):
                member = tarfile.TarInfo(f"data/chunk-{client}-{name}")
                member.size = len(text)
                file.addfile(member, io.BytesIO(text.encode()))
    return path


def span(prompt, output):
    return {"input_tokens": str(prompt), "output_tokens": str(output)}


def day(*rates, cv=1.0):
    """Windows of a day in which a client sends at these rates, one after the other."""
    starts = range(0, 86_400, 600)
    return [(start, rates[i * len(rates) // len(starts)], cv) for i, start in enumerate(starts)]


def spans(prompt, output):
    return {str(start): span(prompt, output) for start in range(0, 86_400, 21_600)}


def test_servegen_draws_the_clients_lengths_with_a_seed(tmp_path):
    windows = [(0, 2.0, 1.0), (600, 0.0, 0)]
    path = archive(tmp_path / "model.tar.xz", {3: (windows, {"0": span({100: 1.0}, {7: 1, 9: 1})})})
    requests = read_servegen(path, 200)
    assert requests == read_servegen(path, 200) != read_servegen(path, 200, seed=1)
    assert 150 < len(requests) < 250 and requests[-1].arrival_s < 600
    assert {request.output_tokens for request in requests} == {7, 9}


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_servegen_gives_quiet_clients_their_share_and_no_more(tmp_path, cv):
    # 40 quiet clients, who send in a window what comes to a hundredth of a request here.
    quiet = {client: (day(0.005, cv=cv), spans({10: 1.0}, {5: 1.0})) for client in range(1, 41)}
    loud = {0: (day(1.0, cv=cv), spans({10: 1.0}, {5: 1.0}))}
    path = archive(tmp_path / "model.tar.xz", loud | quiet)
    drawn = [read_servegen(path, 300, seed) for seed in range(30)]
    counts = [sum(request.context[0] > 0 for request in requests) for requests in drawn]
    total = sum(map(len, drawn))
    # Of 9,000 requests, 1,500 are theirs; counts vary with their cv, as those of all do.
    assert sum(counts) == pytest.approx(1500, abs=4 * max(cv, 1) * 1500**0.5)
    assert total == pytest.approx(9000, abs=4 * max(cv, 1) * 9000**0.5)


def test_a_servegen_workload_is_of_the_whole_day_or_of_the_hours_wanted(tmp_path):
    # Prompts tell the quarter of the day; half of the responses exceed the context.
    lengths_of_day = {
        str(start): span({100 + start // 21_600: 1.0}, {5: 0.5, 5000: 0.5})
        for start in range(0, 86_400, 21_600)
    }
    path = archive(tmp_path / "model.tar.xz", {1: (day(0.1, 0.3), lengths_of_day)})
    spec = WorkloadSpec(str(path), 2.0, 400, "trace")
    workload = make_workload(spec, 2000)
    assert len(workload.requests) == 400 and workload == make_workload(spec, 2000)
    assert workload.left_out == pytest.approx(400, abs=120)
    quarters = np.bincount([r.features.prompt_tokens - 100 for r in workload.requests])
    # A quarter of them comes in the first half of the day.
    assert quarters[:2].sum() == pytest.approx(100, abs=35)
    assert quarters[2:].sum() == pytest.approx(300, abs=35)
    afternoon = make_workload(replace(spec, window_h=(12.0, 18.0)), 2000)
    assert {r.features.prompt_tokens for r in afternoon.requests} == {102}
    assert len(afternoon.requests) == 400
    with pytest.raises(TraceError, match="no client has a rate above 0 in this time"):
        make_workload(replace(spec, window_h=(30.0, 31.0)), 2000)


def test_hours_of_a_trace_with_times(tmp_path):
    text = "arrival_s,prompt_tokens,output_tokens\n0,1,1\n3600,2,1\n5000,3,1\n7200,4,1\n"
    path = written(tmp_path, "a.csv", text)
    spec = WorkloadSpec(str(path), 1.0, 9, "trace", window_h=(1.0, 2.0))
    assert lengths(make_workload(spec, 100).requests) == [(2, 1), (3, 1)]
    with pytest.raises(TraceError, match=r"no requests in --trace-window: .* after 2.00 hours"):
        make_workload(replace(spec, window_h=(3.0, 4.0)), 100)
    with pytest.raises(TraceError, match="has no times: leave out --trace-window"):
        make_workload(replace(spec, trace="synthetic:sharegpt"), 100)
    with pytest.raises(ValueError, match="give two hours"):
        replace(spec, window_h=(2.0, 1.0))


def test_arrivals_have_their_rate_and_variation():
    requests = draw_lengths("sharegpt", 20_000, seed=1)
    for cv, drawn in ((1.0, poisson(requests, 4.0, 2)), (3.0, gamma(requests, 4.0, 3.0, 2))):
        gaps_s = np.diff([request.arrival_s for request in drawn])
        assert gaps_s.mean() == pytest.approx(0.25, rel=0.06)
        assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.06)
    assert lengths(drawn) == lengths(requests)


def test_time_stamps_are_scaled_and_keep_their_pattern(tmp_path):
    text = "arrival_s,prompt_tokens,output_tokens\n5,1,1\n6,1,1\n9,1,1\n"
    requests = scaled(read_csv(written(tmp_path, "a.csv", text)), 2.0)
    assert [request.arrival_s for request in requests] == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("name", synthetic_workloads())
def test_synthetic_lengths_have_the_published_quantiles(name):
    requests = draw_lengths(name, 20_000, seed=3)
    workload = synthetic_workloads()[name]
    prompts, outputs = np.array(lengths(requests)).T
    for quantiles, drawn in ((workload.prompt, prompts), (workload.output, outputs)):
        for score, tokens in zip(quantiles.scores, quantiles.tokens, strict=True):
            below = (drawn <= tokens).mean()
            level = (drawn < tokens).mean(), below
            expected = NormalDist().cdf(score)
            assert level[0] - 0.015 < expected < level[1] + 0.015
        assert drawn.min() >= quantiles.limits_tokens[0]
        assert drawn.max() <= quantiles.limits_tokens[1]
    assert workload.source


def test_a_longer_workload_begins_as_a_shorter_one():
    short, long = (WorkloadSpec("synthetic:sharegpt", 2.0, count, seed=4) for count in (50, 90))
    first, second = (make_workload(spec, 2048).requests for spec in (short, long))
    assert second[:50] == first
    assert lengths(second[:50]) != lengths(second[40:90])


def test_a_workload_fits_into_the_context_and_hides_lengths():
    spec = WorkloadSpec("synthetic:sharegpt", 2.0, 300, slo=Slo(e2e_s=9.0), seed=4)
    workload = make_workload(spec, 500)
    assert len(workload.requests) == 300 and workload.left_out > 0
    for request in workload.requests:
        assert request.features.prompt_tokens + request.output_tokens <= 500
        assert request.features.cap_tokens == 500 - request.features.prompt_tokens
        assert request.slo == Slo(e2e_s=9.0)
    assert workload == make_workload(spec, 500)
    assert workload != make_workload(WorkloadSpec("synthetic:sharegpt", 2.0, 300, seed=5), 500)


def test_another_rate_leaves_the_lengths():
    slow, fast = (
        make_workload(WorkloadSpec("synthetic:azure-conv", rate, 50), 16_384) for rate in (1.0, 2.0)
    )
    assert lengths(slow.requests) == lengths(fast.requests)
    times = [(a.arrival_s, b.arrival_s) for a, b in zip(slow.requests, fast.requests, strict=True)]
    assert all(a == pytest.approx(2 * b) for a, b in times)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trace": "synthetic:none"}, "synthetic:none: choose one of sharegpt"),
        ({"trace": "nowhere.csv"}, "nowhere.csv: no such file; give a file or synthetic:NAME"),
        ({"rate_rps": 0.0}, "rate_rps=0.0: give"),
        ({"arrivals": "gamma:-1"}, "arrivals 'gamma:-1': give trace, poisson, or gamma:CV"),
        ({"requests": 0}, "requests=0: give 1 or more"),
    ],
)
def test_wrong_workloads_are_refused(changes, words):
    fields = {"trace": "synthetic:sharegpt", "rate_rps": 1.0} | changes
    with pytest.raises(ValueError, match=words):
        make_workload(WorkloadSpec(**fields), 2048)


def test_objectives_are_read():
    assert parse_slo("ttft=0.25, tpot=0.1") == Slo(ttft_s=0.25, tpot_s=0.1)
    assert parse_slo("") == Slo()
    for text in ("jct=3", "e2e=0", "e2e=x", "e2e=1,e2e=2"):
        with pytest.raises(ValueError, match="slo"):
            parse_slo(text)
