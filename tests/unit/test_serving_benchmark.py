"""The servers' comparison without a server: keys, figures and reports."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmark.serving import command  # noqa: E402
from benchmark.serving.client import parse_metrics  # noqa: E402
from benchmark.serving.figures import (  # noqa: E402
    by_class,
    figures,
    request_records,
    wrong_lengths,
)
from benchmark.serving.measure import Settings  # noqa: E402
from benchmark.serving.records import (  # noqa: E402
    Cell,
    SettingsDiffer,
    Store,
    merge,
    missing,
    order,
)
from benchmark.serving.report import as_html, as_markdown, as_plot  # noqa: E402
from benchmark.serving.systems import (  # noqa: E402
    NAMES,
    cached_tokens,
    preemptions,
    recomputed_tokens,
)
from benchmark.serving.workloads import (  # noqa: E402
    Request,
)
from econoserve.core.types import Slo  # noqa: E402

SLO = Slo(ttft_s=0.5, tpot_s=0.1)


def request(tokens=11, arrival_s=0.0, slo=SLO, service_class="chat"):
    return Request((6,) * 20, tokens, arrival_s, slo, service_class)


def answer(ttft_s=0.1, jct_s=0.6, tokens=11, error=None):
    return {"lag_s": 0.0, "ttft_s": ttft_s, "jct_s": jct_s, "tokens": tokens, "error": error}


def record(cell, ssr, jct_s=1.0, rate=None):
    outcomes = request_records([request()] * 10, [answer()] * 10)
    return {
        **{name: getattr(cell, name) for name in Cell.__slots__},
        **figures(outcomes),
        "rate_rps": rate if rate is not None else 10 * cell.load,
        "classes": by_class([request()] * 10, outcomes),
        "ssr": ssr,
        "mean_jct_s": jct_s,
        "preemptions": 3,
        "recomputed_tokens": None,
        "cached_tokens": 12,
        "kvc_use_mean": 0.5,
        "cpu_ms_per_token": 0.7,
        "busy_before": 0.01,
        "client_lag_s": 0.002,
        "client_has_precedence": True,
        "errors": [],
    }


def test_order_takes_turns_and_every_run_comes_once():
    servers = order(3, ("tight", "ample"), NAMES, ("azure", "classes"), (0.4, 0.8))
    cells = [cell for server in servers for cell in server]
    assert len(cells) == len(set(cells)) == 3 * 2 * 3 * 2 * 2
    for server in servers:
        assert len({(cell.repeat, cell.kvc, cell.system) for cell in server}) == 1
    firsts = [servers[3 * part][0].system for part in range(6)]
    assert set(firsts[::2]) == set(NAMES)
    assert firsts[0] != firsts[1]


def test_a_run_is_resumed_where_it_ended(tmp_path):
    servers = order(1, ("tight",), NAMES[:2], ("azure",), (0.4, 0.8))
    store = Store(tmp_path / "out")
    store.open({"seed": 1, "scale": (1, 2)})
    for cell in servers[0]:
        store.add(cell, {"ssr": 1.0}, {"ttft_s": [0.1]})
    records = tmp_path / "out" / "records.jsonl"
    records.write_text(records.read_text()[:-9])  # cut off within the last line
    again = Store(tmp_path / "out")
    again.open({"seed": 1, "scale": (1, 2)})
    assert missing(servers, again.read()) == [[servers[0][1]], servers[1]]
    again.add(servers[0][1], {"ssr": 0.5}, {"ttft_s": [0.2]})
    found = Store(tmp_path / "out").read()
    assert [(Cell.of(row), row["ssr"]) for row in found] == [
        (servers[0][0], 1.0),
        (servers[0][1], 0.5),
    ]
    assert again.read_requests()[servers[0][1]]["ttft_s"] == [0.2]
    with pytest.raises(SettingsDiffer, match="seed was 1 and is now 2"):
        again.open({"seed": 2, "scale": (1, 2)})


def test_results_are_merged_with_those_of_the_same_terms(tmp_path):
    path = tmp_path / "serving.json"
    first, second = (Cell(0, "tight", name, "azure", 0.4) for name in NAMES[:2])
    terms = {"seed": 1}
    merge(path, terms, {"date": "a", "systems": {"x": 1}}, [record(first, 0.5)])
    facts = {"date": "b", "systems": {"y": 2}}
    merge(path, terms, facts, [record(first, 0.7), record(second, 0.6)])
    found = json.loads(path.read_text())
    assert [(row["system"], row["ssr"]) for row in found["records"]] == [
        (NAMES[0], 0.7),
        (NAMES[1], 0.6),
    ]
    assert found["facts"] == {"date": "b", "systems": {"x": 1, "y": 2}}
    with pytest.raises(SettingsDiffer, match="seed"):
        merge(path, {"seed": 2}, {}, [])


def test_figures_of_known_requests():
    requests = [request(arrival_s=at_s) for at_s in (0.0, 1.0, 2.0, 3.0)]
    answers = [
        answer(),
        answer(ttft_s=0.6, jct_s=1.0),  # first token too late
        answer(jct_s=2.1),  # 200 ms for each token after the first
        answer(error="timeout", ttft_s=None, jct_s=None, tokens=0),
    ]
    found = figures(request_records(requests, answers))
    assert found["ssr"] == 0.25
    assert found["served"] == 3
    assert found["span_s"] == pytest.approx(4.1)  # the third ends at 2.0 + 2.1
    assert found["goodput_rps"] == pytest.approx(1 / 4.1, rel=1e-3)
    assert found["throughput_tokens_per_s"] == pytest.approx(33 / 4.1, rel=1e-3)
    assert found["mean_jct_s"] == pytest.approx((0.6 + 1.0 + 2.1) / 3, rel=1e-3)
    assert found["p50_ttft_s"] == pytest.approx(0.1)
    assert found["p50_tpot_s"] == pytest.approx(0.05)
    assert "kvc_utilisation" not in found


def test_classes_are_told_apart():
    requests = [request(), request(service_class="batch", slo=Slo(e2e_s=1.0))]
    found = by_class(requests, request_records(requests, [answer(ttft_s=0.7), answer()]))
    assert found["chat"]["ssr"] == 0.0
    assert found["batch"] == {"requests": 1, "ssr": 1.0, "mean_jct_s": 0.6}


def test_wrong_lengths_are_found():
    requests = [request(), request(), request()]
    answers = [answer(), answer(tokens=12), answer(tokens=3, error="timeout")]
    assert wrong_lengths(requests, answers) == ["request 1: 12 output tokens, 11 are right"]


def test_metrics_are_summed_over_labels():
    text = '# TYPE a counter\na{x="1 2"} 2.0\na{x="2",mode="m"} 3\nb{kind="k"} 1e3\nc NaN\n'
    assert parse_metrics(text) == {"a": 5.0, "a[m]": 3.0, "b": 1000.0, "b[k]": 1000.0}


def test_recomputed_tokens_are_those_beyond_the_first_time():
    counters = {
        "sglang:realtime_tokens_total[prefill_compute]": 150.0,
        "sglang:prefill_effective_tokens_total[input]": 110.0,
        "econoserve:preemptions_total": 9.0,
        "econoserve:preemptions_total[park]": 7.0,
        "econoserve:preemptions_total[recompute]": 2.0,
        "econoserve:allocation_failures_total": 1.0,
    }
    assert recomputed_tokens("sglang", counters) == 40.0
    assert recomputed_tokens("econoserve:vllm", counters) == 40.0
    assert recomputed_tokens("vllm", counters) is None
    assert preemptions("econoserve", counters) == 3.0
    assert cached_tokens("econoserve:vllm", {"sglang:cached_tokens_total": 7.0}) == 7.0
    assert cached_tokens("vllm", {"vllm:prefix_cache_hits_total": 32.0}) == 32.0
    assert cached_tokens("sglang", counters) == 0.0
    assert preemptions("sglang", counters) == 0.0


@pytest.fixture
def facts():
    options = SimpleNamespace()
    terms = command.describe(options, Settings())
    systems = {"vllm": {"start_s": 3.0}}
    return {**terms, "date": "2026-01-01", "command": "python -m x", "systems": systems}


def test_reports_show_every_system_and_rate(facts):
    records = [
        record(Cell(repeat, kvc, name, "classes", load), 0.95 - load / 4 - repeat / 100)
        for repeat in (0, 1, 2)
        for kvc in ("tight", "ample")
        for name in NAMES
        for load in (0.4, 0.8)
    ]
    page = as_markdown(records, facts)
    for kvc in ("tight", "ample"):
        section = page[page.index(f"## interactive and batch, KVC {kvc}") :]
        rows = re.findall(r"\|\s+(\d+)\s+\|\s+`(\w+)`", section.split("SSR of each")[0])
        assert rows == [(rate, name) for rate in ("4", "8") for name in NAMES]
    assert "0.840" in page  # the median of the repeats
    html = as_html(records, facts)
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 7
    for drawing in (*drawings, as_plot(records)):
        ElementTree.fromstring(drawing)
    # A head and a line for each system and rate, two tables a setting; the summary.
    assert html.count("<tr>") == 2 * 2 * (1 + 6) + 1 + 2
    assert "var(--c0)" in as_plot(records)
    assert facts["machine"]["cpu_model"] in html


def test_reports_hold_without_anything_served(facts):
    outcomes = request_records([request()] * 4, [answer(None, None, 0, "timeout")] * 4)
    cell = Cell(0, "tight", "vllm", "classes", 0.4)
    failed = {**record(cell, 0.0), **figures(outcomes), "errors": ["timeout"]}
    failed["jct_percentiles_s"] = []
    failed["classes"] = by_class([request()] * 4, outcomes)
    assert failed["mean_jct_s"] is failed["classes"]["chat"]["mean_jct_s"] is None
    assert "runs with a request that ended in an error: 1" in as_markdown([failed], facts)
    assert "<svg" in as_html([failed], facts)


def test_command_line_is_checked(capsys, tmp_path):
    for wrong in (
        ["--repeats", "0"],
        ["--rates", "-1"],
        ["--systems", "orca"],
        ["--arrivals-s", "0"],
    ):
        with pytest.raises(SystemExit):
            command.main(["--out", str(tmp_path / "o"), *wrong])
        assert wrong[0].strip("-").split("-")[0][:6] in capsys.readouterr().err


def test_runs_with_a_late_client_are_told_and_measured_again(facts, capsys, tmp_path):
    cells = [Cell(0, "tight", name, "sharegpt", 1.0) for name in NAMES[:2]]
    records = [record(cells[0], 1.0), {**record(cells[1], 1.0), "client_lag_s": 0.3}]
    assert "late in 1 of 2 runs (sglang 1)" in as_markdown(records, facts)
    assert "WARNING" not in as_markdown(records[:1], facts)
    store = Store(tmp_path)
    for cell, one in zip(cells, records, strict=True):
        store.add(cell, one, {})
    for flags, left in (([], 0), (["--repeat-late"], 1)):
        assert command.main(["--out", str(tmp_path), "--quick", "--plan", *flags]) == 0
        assert f"{left} of 2 runs" in capsys.readouterr().err


def test_plan_says_how_much_is_left_and_starts_nothing(capsys, tmp_path):
    assert command.main(["--out", str(tmp_path / "o"), "--plan"]) == 0
    said = capsys.readouterr().err
    assert "540 of 540 runs on 27 servers" in said
    assert not (tmp_path / "o" / "logs").exists()
    assert command.command_line(["--out", "/a/b", "--quick"]).endswith("--out b --quick")
