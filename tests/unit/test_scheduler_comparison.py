"""The scheduler comparison without an engine: requests, hidden lengths, figures and reports."""

import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmark.scheduler_comparison import run as command_line  # noqa: E402
from benchmark.scheduler_comparison.figures import (  # noqa: E402
    Difference,
    Run,
    Spread,
    compare,
    compare_outputs,
    figures,
)
from benchmark.scheduler_comparison.lengths import (  # noqa: E402
    EOS_FIELD,
    LENGTH_FIELD,
    custom_params,
    end_on_time,
    token_number,
)
from benchmark.scheduler_comparison.report import (  # noqa: E402
    as_json,
    as_markdown,
    checks_text,
    command,
    machine,
    spread_text,
    table,
)
from benchmark.scheduler_comparison.systems import cpu_busy_share  # noqa: E402
from benchmark.scheduler_comparison.workload import (  # noqa: E402
    LOGNORMAL_OUTPUT_RANGE,
    PROMPT_RANGE,
    UNIFORM_OUTPUT_RANGE,
    Request,
    Vocabulary,
    WorkloadSpec,
    describe,
    generate,
    read_trace,
)
from econoserve.slo import FIELD as SLO_FIELD  # noqa: E402

VOCABULARY = Vocabulary(prompt_ids=tuple(range(3, 100)), eos_ids=(2,))


# Workload


@pytest.mark.parametrize("kind", ["lognormal", "uniform"])
def test_the_same_seed_gives_the_same_requests(kind):
    spec = WorkloadSpec(kind=kind, requests=50, seed=7, rate_per_s=4.0, slo_fraction=0.5)
    assert generate(spec, VOCABULARY) == generate(spec, VOCABULARY)
    other = WorkloadSpec(kind=kind, requests=50, seed=8, rate_per_s=4.0, slo_fraction=0.5)
    assert generate(spec, VOCABULARY) != generate(other, VOCABULARY)


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [("lognormal", LOGNORMAL_OUTPUT_RANGE), ("uniform", UNIFORM_OUTPUT_RANGE)],
)
def test_lengths_stay_in_their_ranges(kind, outputs):
    requests = generate(WorkloadSpec(kind=kind, requests=2000), VOCABULARY)
    prompts = [len(request.prompt_ids) for request in requests]
    lengths = [request.output_tokens for request in requests]
    assert (min(prompts), max(prompts)) == PROMPT_RANGE
    assert (min(lengths), max(lengths)) == outputs
    assert {token for request in requests for token in request.prompt_ids} <= set(
        VOCABULARY.prompt_ids
    )


def test_lognormal_outputs_have_their_median():
    requests = generate(WorkloadSpec(requests=4000), VOCABULARY)
    assert np.median([request.output_tokens for request in requests]) == pytest.approx(80, rel=0.1)


def test_a_burst_arrives_at_once_and_a_rate_is_kept():
    burst = generate(WorkloadSpec(requests=20), VOCABULARY)
    assert {request.arrival_s for request in burst} == {0.0}
    paced = generate(WorkloadSpec(requests=2000, rate_per_s=5.0), VOCABULARY)
    arrivals = [request.arrival_s for request in paced]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(400, rel=0.1)


def test_rate_and_slos_leave_prompts_and_lengths_alone():
    plain = generate(WorkloadSpec(requests=40), VOCABULARY)
    other = generate(WorkloadSpec(requests=40, rate_per_s=2.0, slo_fraction=0.3), VOCABULARY)
    assert [(r.prompt_ids, r.output_tokens) for r in plain] == [
        (r.prompt_ids, r.output_tokens) for r in other
    ]


@pytest.mark.parametrize(("fraction", "limited"), [(0.0, 0), (0.25, 10), (1.0, 40)])
def test_the_share_with_an_slo_is_exact(fraction, limited):
    spec = WorkloadSpec(requests=40, slo_fraction=fraction, slo_ms=1500.0)
    slos = [request.slo_ms for request in generate(spec, VOCABULARY)]
    assert slos.count(1500.0) == limited
    assert slos.count(None) == 40 - limited


def test_requests_survive_json():
    for request in generate(WorkloadSpec(requests=5, slo_fraction=0.5), VOCABULARY):
        assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request


def test_an_unknown_workload_is_refused():
    with pytest.raises(ValueError, match="zipf"):
        generate(WorkloadSpec(kind="zipf"), VOCABULARY)


def test_describe_counts():
    facts = describe([Request((5, 6), 10), Request((5, 6, 7, 8), 30, 1.5, 900.0)])
    assert facts["prompt_tokens"] == {"min": 2, "median": 3.0, "mean": 3.0, "max": 4, "total": 6}
    assert facts["output_tokens"]["total"] == 40
    assert (facts["requests"], facts["with_slo"], facts["last_arrival_s"]) == (2, 1, 1.5)


def _trace(folder, header, rows):
    path = folder / "trace.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.mark.parametrize(
    "header",
    [
        ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
        ("note", "num_prefill_tokens", "num_decode_tokens"),
        ("id", "input_tokens", "output_tokens"),
    ],
)
def test_trace_columns_are_found_by_name(tmp_path, header):
    path = _trace(tmp_path, header, [("a", 374, 44), ("b", "396", "109.0"), ("c", 12, 0)])
    assert read_trace(path) == [(374, 44), (396, 109)]


def test_a_trace_is_scaled_and_cut(tmp_path):
    path = _trace(tmp_path, ("input_tokens", "output_tokens"), [(1000, 200), (50_000, 9_000)])
    spec = WorkloadSpec(
        kind="trace",
        requests=2,
        trace=path,
        trace_scale=0.1,
        longest_prompt_tokens=500,
        longest_output_tokens=300,
    )
    requests = generate(spec, VOCABULARY)
    assert [(len(r.prompt_ids), r.output_tokens) for r in requests] == [(100, 20), (500, 300)]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (("a", "b"), [(1, 2)], "columns a, b"),
        (("input_tokens", "output_tokens"), [(1, "many")], "line 2"),
        (("input_tokens", "output_tokens"), [(1, 2)], "1 requests, 5 are wanted"),
    ],
)
def test_a_wrong_trace_is_refused(tmp_path, header, rows, message):
    path = _trace(tmp_path, header, rows)
    with pytest.raises(ValueError, match=message):
        generate(WorkloadSpec(kind="trace", requests=5, trace=path), VOCABULARY)


def test_the_vocabulary_leaves_out_special_tokens(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 8, "eos_token_id": 2}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 0}, {"id": 1}]}')
    assert Vocabulary.of_model(tmp_path) == Vocabulary((3, 4, 5, 6), (2, 7))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        Vocabulary.of_model(tmp_path)


# Hidden lengths


class FakeRequest:
    """What the processor reads of SGLang's request, and how the scheduler changes it."""

    def __init__(self, prompt_tokens):
        self.origin_input_ids = list(range(prompt_tokens))
        self.kv = SimpleNamespace(kv_committed_len=0)
        self.output_ids = []

    def prefill(self, tokens=None):
        whole = len(self.origin_input_ids) + len(self.output_ids)
        self.kv.kv_committed_len = whole if tokens is None else tokens

    def decode(self):
        self.kv.kv_committed_len += 1


def _sample(*requests_and_lengths):
    """One step: the token that greedy sampling picks for each request; EOS is 2, 5 is likeliest."""
    params = [
        {**custom_params(length, (2, 4)), "__req__": request}
        for request, length in requests_and_lengths
    ]
    logits = np.zeros((len(params), 6))
    logits[:, [2, 4]] = 9.0
    logits[:, 5] = 1.0
    assert end_on_time(logits, params) is logits
    assert not np.isnan(logits).any()
    return logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_response_has_exactly_its_length_whatever_output_ids_say(length):
    request = FakeRequest(prompt_tokens=10)
    request.prefill()
    sampled = _sample((request, length))
    while sampled[-1] != 2:
        request.decode()
        sampled += _sample((request, length))
    assert sampled == [5] * (length - 1) + [2]


def test_every_row_has_its_own_length():
    requests = [FakeRequest(prompt_tokens) for prompt_tokens in (3, 8, 5)]
    for request in requests:
        request.prefill()
    requests[1].decode()
    assert _sample(*zip(requests, (1, 2, 2), strict=True)) == [2, 2, 5]


def test_a_recomputed_request_goes_on_where_it_was():
    request = FakeRequest(prompt_tokens=4)
    request.prefill()
    for _ in range(3):  # the third token was in flight when the KV cache was taken away
        assert _sample((request, 5)) == [5]
        request.decode()
    request.output_ids = [5, 5]
    request.prefill(tokens=5)  # the first piece of its new prompt
    assert _sample((request, 5)) == [5]
    request.prefill()
    assert token_number(request) == 3
    sampled = []
    while not sampled or sampled[-1] != 2:
        sampled += _sample((request, 5))
        request.decode()
    assert [*request.output_ids, *sampled] == [5, 5, 5, 5, 2]


def test_a_step_beyond_the_end_is_still_an_end():
    request = FakeRequest(prompt_tokens=4)
    request.prefill()
    for _ in range(3):
        request.decode()
    assert _sample((request, 2)) == [2]


def test_a_prompt_in_pieces_is_not_ended():
    request = FakeRequest(prompt_tokens=10)
    request.prefill(tokens=6)
    assert token_number(request) < 1
    assert _sample((request, 1)) == [5]


def test_schedulers_do_not_read_the_fields():
    assert SLO_FIELD not in (LENGTH_FIELD, EOS_FIELD)
    assert set(custom_params(5, [2])) == {LENGTH_FIELD, EOS_FIELD}


# Figures


def _answer(ttft_s=1.0, jct_s=3.0, tokens=11, **fields):
    return {
        "ttft_s": ttft_s,
        "jct_s": jct_s,
        "arrival_s": 0.0,
        "prompt_tokens": 20,
        "wanted_tokens": tokens,
        "output_tokens": tokens,
        "retractions": 0,
        "slo_ms": None,
        "output_ids": [5, 2],
        "error": None,
        **fields,
    }


def _run(system, repeat=0, kvc_tokens=4096, answers=None, counters=None):
    answers = [_answer()] if answers is None else answers
    return Run(system, kvc_tokens, repeat, 0.0, 12.0, figures(answers), counters or {}, answers)


def test_figures_of_a_run():
    found = figures(
        [
            _answer(ttft_s=1.0, jct_s=3.0, tokens=11, retractions=2),
            _answer(ttft_s=2.0, jct_s=6.0, tokens=21, arrival_s=2.0),
            _answer(ttft_s=3.0, jct_s=3.0, tokens=1),
        ]
    )
    assert found["output_tokens_per_s"] == pytest.approx(33 / 8)
    assert found["mean_jct_s"] == pytest.approx(4.0)
    assert found["p99_jct_s"] == pytest.approx(np.percentile([3.0, 6.0, 3.0], 99))
    assert found["mean_ttft_s"] == pytest.approx(2.0)
    assert found["mean_tpot_ms"] == pytest.approx(200.0)
    assert found["preemptions"] == 2
    assert found["slo_met"] is None


def test_an_answer_that_failed_misses_its_slo_and_counts_in_nothing_else():
    found = figures(
        [
            _answer(slo_ms=3000.0),
            _answer(slo_ms=2999.0),
            _answer(slo_ms=9000.0, ttft_s=None, jct_s=None, tokens=0, error="aborted"),
            _answer(),
        ]
    )
    assert found["slo_met"] == pytest.approx(1 / 3)
    assert found["mean_jct_s"] == pytest.approx(3.0)


def test_a_run_without_answers_has_no_figures():
    found = figures([_answer(ttft_s=None, jct_s=None, tokens=0, error="refused")])
    assert found["mean_jct_s"] is None
    assert found["output_tokens_per_s"] is None


def test_spread():
    assert Spread.of([3.0, None, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([None]) is None
    assert spread_text(Spread(1234.5, 1000.0, 2000.0), 0) == "1,234 [1,000, 2,000]"
    assert spread_text(Spread(2.0, 1.999, 2.001), 1) == "2.0"
    assert spread_text(None, 1) == "-"


def test_ratios_are_taken_repeat_by_repeat():
    jct_s = {"stock": (2.0, 4.0, 8.0), "econoserve": (1.0, 4.0, 2.0)}
    runs = [
        _run(system, repeat, answers=[_answer(jct_s=value)])
        for system, values in jct_s.items()
        for repeat, value in enumerate(values)
    ]
    row = next(row for row in compare(runs) if row.metric.key == "mean_jct_s")
    assert row.stock == Spread(4.0, 2.0, 8.0)
    assert row.econoserve == Spread(2.0, 1.0, 4.0)
    assert row.ratio == Spread(0.5, 0.25, 1.0)


def test_a_ratio_to_nothing_is_left_out():
    row = next(
        row
        for row in compare([_run("stock"), _run("econoserve", answers=[_answer(retractions=3)])])
        if row.metric.key == "preemptions"
    )
    assert row.ratio is None


def test_outputs_are_compared_within_a_pair():
    pairs = {0: ([5, 2], [5, 2]), 1: ([5, 6, 2], [5, 7, 2]), 2: ([5, 2], [5])}
    runs = [
        _run(system, repeat, answers=[_answer(output_ids=ids)])
        for repeat, pair in pairs.items()
        for system, ids in zip(("stock", "econoserve"), pair, strict=True)
    ]
    compared, differences = compare_outputs(runs)
    assert compared == 3
    assert differences == [Difference(4096, 1, 0, 1, 6, 7), Difference(4096, 2, 0, 1, 2, None)]
    assert "1 of 3 greedy outputs" in checks_text(runs)
    assert compare_outputs(runs[:1]) == (0, [])


def test_failures_are_named():
    answers = [_answer(), _answer(output_tokens=10), _answer(error="aborted")]
    run = _run("econoserve", answers=answers, counters={"planning_errors": 2})
    assert len(run.failures) == 3
    assert "request 1: 10 output tokens instead of 11" in run.failures[0]
    assert "3 failures in 3 responses" in checks_text([run])
    assert "exactly the intended length" in checks_text([_run("stock")])


# Reports and the command line


def test_the_table_has_a_row_per_size_and_metric():
    runs = [_run(system, 0, kvc) for kvc in (4096, 8192) for system in ("stock", "econoserve")]
    lines = table(compare(runs)).splitlines()
    assert len(lines) == 2 + 2 * 7  # no SLOs
    assert sum("4,096" in line for line in lines) == 1
    assert "share of SLOs met" not in "\n".join(lines)


def test_reports_hold_results_and_no_paths(tmp_path):
    runs = [_run("stock"), _run("econoserve", counters={"parked": 3})]
    arguments = ["--json", str(tmp_path / "x.json"), "--workload", "trace", str(tmp_path / "t.csv")]
    settings = {"model": "demo model", "kvc_tokens": [4096], "lengths": {"mean": 3.5}}
    data = as_json(runs, settings, arguments)
    text = json.dumps(data)
    page = as_markdown(runs, settings, arguments)
    for written in (text, page):
        assert str(tmp_path) not in written
        assert "--workload trace t.csv" in written
    assert "output_ids" not in text
    assert data["runs"][1]["counters"] == {"parked": 3}
    assert data["machine"] == machine()
    assert "| output tokens/s" in page
    assert "4,096" in page


def test_the_command_leaves_out_output_files():
    arguments = ["--json", "a.json", "--quick", "--markdown=/x/b.md", "--rate", "4"]
    assert command(arguments) == "python -m benchmark.scheduler_comparison.run --quick --rate 4"


def test_systems_take_turns():
    order = command_line.order_of_runs(2, (4096, 8192))
    assert order[:4] == [
        (0, 4096, "stock"),
        (0, 4096, "econoserve"),
        (0, 8192, "stock"),
        (0, 8192, "econoserve"),
    ]
    assert [system for _, _, system in order[4:6]] == ["econoserve", "stock"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "0"], "--requests 0"),
        (["--rate", "0"], "--rate 0"),
        (["--rate", "nan"], "--rate nan"),
        (["--slo-fraction", "2"], "--slo-fraction 2"),
        (["--workload", "trace"], "only trace takes a file"),
        (["--workload", "uniform", "x.csv"], "only trace takes a file"),
        (["--setting", "tfs"], "--setting tfs"),
        (["--model-path", "/nonexistent/model"], "config.json"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def _model(folder):
    (folder / "config.json").write_text('{"vocab_size": 100, "eos_token_id": 2}')
    return folder


def test_a_whole_comparison_with_a_fake_engine(tmp_path, monkeypatch, capsys):
    calls = []

    def fake(runner, system, kvc_tokens):
        calls.append((system, kvc_tokens))
        return {
            "start_s": 1.0,
            "counters": {"parked": 1} if system == "econoserve" else {},
            "answers": [_answer(tokens=request.output_tokens) for request in runner.requests],
        }

    monkeypatch.setattr(command_line.Runner, "run", fake)
    monkeypatch.setattr(command_line, "cpu_busy_share", lambda: 0.5)
    page, data = tmp_path / "page.md", tmp_path / "data.json"
    arguments = ["--quick", "--model-path", str(_model(tmp_path)), "--setting", "tfs=256"]
    assert command_line.main([*arguments, "--json", str(data), "--markdown", str(page)]) == 0
    assert calls == [("stock", 4096), ("econoserve", 4096)]
    printed, warned = capsys.readouterr()
    assert "up to 50% of the CPUs" in warned
    assert "output tokens/s" in printed
    assert "all 120 responses" in printed
    assert json.loads(data.read_text())["settings"]["econoserve_settings"] == {"tfs": 256}
    assert str(tmp_path) not in page.read_text() + data.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--max-new-tokens", "20"], "--max-new-tokens 20"), (["--kvc", "600"], "--kvc 600")],
)
def test_requests_that_cannot_fit_are_refused(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit):
        command_line.main(["--model-path", str(_model(tmp_path)), *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("finished", [0, 3])
def test_a_system_that_crashes_is_reported_and_finished_runs_are_kept(
    tmp_path, monkeypatch, capsys, finished
):
    results = [{"start_s": 1.0, "counters": {}, "answers": [_answer()]}] * finished

    def crash(runner, system, kvc_tokens):
        if not results:
            raise command_line.RunFailed(f"{system}: exit status 9")
        return results.pop()

    monkeypatch.setattr(command_line.Runner, "run", crash)
    monkeypatch.setattr(command_line, "cpu_busy_share", lambda: None)
    assert command_line.main(["--model-path", str(_model(tmp_path))]) == 1
    printed, warned = capsys.readouterr()
    assert "exit status 9" in warned
    assert ("mean JCT" in printed) == (finished > 0)


def test_cpu_busy_share_is_a_share():
    busy = cpu_busy_share(0.05)
    assert busy is None or 0.0 <= busy <= 1.0


def test_infinite_rates_are_a_burst():
    options = command_line.build_parser().parse_args(["--rate", "inf"])
    assert math.isinf(options.rate)
