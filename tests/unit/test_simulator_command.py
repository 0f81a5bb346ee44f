"""econoserve simulate and econoserve report: their output, their errors, and what they leave."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from econoserve import runs
from econoserve.cli import main
from econoserve.sim.run import RunSpec
from econoserve.workload.workload import WorkloadSpec

MACHINE = ["--hardware", "a100", "--model", "opt-13b"]
RUN = ["--policy", "plus", "--rate", "3", "--num-requests", "12", *MACHINE]
APART = ["--disaggregate", "prefill=1x1x1,decode=1x1x1"]
SWEEP = ["--policy", "sdo", "plus", "vllm_v1", "--rate", "3", "6", "--num-requests", "15", *MACHINE]


def simulated(capsys, *arguments):
    assert main(["simulate", *arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A file with the results of a sweep."""
    rest = ["--slo", "e2e=20", "--output", "json", "--series", "40", "--jobs", "2"]
    run = subprocess.run(
        [sys.executable, "-m", "econoserve.cli", "simulate", *SWEEP, *rest],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    path = tmp_path_factory.mktemp("results") / "sweep.json"
    path.write_text(run.stdout)
    return path


def test_what_is_not_measured_is_not_printed(capsys):
    result = json.loads(simulated(capsys, *RUN, "--output", "json"))
    assert result["ssr"] is result["goodput_rps"] is result["ssr_by_demand"] is None
    assert result["slo"] == {} and "series" not in result
    heading, _, line = simulated(capsys, *RUN).splitlines()
    cells = dict(zip(*([cell.strip() for cell in row.split("|")] for row in (heading, line))))  # noqa: B905
    assert cells["SSR"] == cells["goodput/s"] == "-" and float(cells["served/s"]) > 0


def test_with_objectives_each_tenth_has_its_ssr(capsys):
    result = json.loads(simulated(capsys, *RUN, "--slo", "e2e=9", "--output", "json"))
    assert 0 < result["ssr"] < 1 and len(result["ssr_by_demand"]) == 10
    # What demands more takes longer where nobody waits.
    assert result["ssr_by_demand"][0] == 1 and result["ssr_by_demand"][-1] == 0
    assert result["slo"] == {"e2e_s": 9.0}


def test_records_have_a_line_for_each_request_of_each_run(capsys, tmp_path):
    lines, table = tmp_path / "records.jsonl", tmp_path / "records.csv"
    for path in (lines, table):
        simulated(capsys, *SWEEP, "--slo", "e2e=9", "--jobs", "1", "--records", str(path))
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(rows) == 6 * 15
    assert {(row["policy"], row["rate_rps"]) for row in rows} == {
        (policy, rate) for policy in ("sdo", "plus", "vllm_v1") for rate in (3.0, 6.0)
    }
    for row in rows:
        assert row["arrival_s"] < row["first_token_s"] <= row["end_s"]
        assert row["met"] == (row["jct_s"] <= 9.0) and row["outcome"] == "finished"
        assert row["demand_token_iterations"] >= row["prompt_tokens"] * row["output_tokens"]
    with table.open(newline="") as file:
        again = list(csv.DictReader(file))
    assert list(again[0]) == list(rows[0])
    assert [float(row["jct_s"]) for row in again] == [row["jct_s"] for row in rows]


def test_records_of_refused_requests_have_no_times(capsys, tmp_path):
    path = tmp_path / "records.jsonl"
    arguments = ["--policy", "orca", "--rate", "3", "--num-requests", "12", *MACHINE]
    simulated(capsys, *arguments, "--kvc-tokens", "700", "--records", str(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["met"] for row in rows} == {None}
    for row in rows:
        assert (row["jct_s"] is None) == (row["outcome"] == "rejected")


def parsed(path):
    """The page as a tree: it is well-formed XML, too."""
    text = path.read_text()
    assert text.startswith("<!DOCTYPE html>\n")
    # Nothing is loaded from elsewhere.
    assert not re.search(r'(src|href)="(?!#)', text) and "@import" not in text
    assert not re.search(r"url\((?!#)", text) and "<script" not in text
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def captions(tree):
    return [caption.text for caption in tree.iter("figcaption")]


def test_a_report_of_results_shows_tables_and_plots(capsys, results, tmp_path):
    page = tmp_path / "page.html"
    assert main(["report", str(results), "--out", str(page), "--title", "A <page>"]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    tree = parsed(page)
    assert tree.find("head/title").text == "A <page>"
    assert len(tree.findall(".//tbody/tr")) == 6
    assert [caption.split()[0] for caption in captions(tree)] == [
        "Latency",
        "SSR",
        "SSR",
        "Distribution",
        "KVC",
        "EconoServe's",
    ]
    drawings = list(tree.iter("{http://www.w3.org/2000/svg}svg"))
    assert len(drawings) == 6
    for drawing in drawings:
        assert drawing.get("role") == "img" and drawing.get("aria-label")
        assert len(list(drawing.iter("{http://www.w3.org/2000/svg}path"))) > 5
    words = " ".join(tree.itertext())
    assert "facebook/opt-13b" in words and "trace" in words and "vllm_v1" in words
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    # Colours are the page's, for light and for dark.
    style = "".join(drawings[0].itertext()) + ElementTree.tostring(drawings[0], "unicode")
    assert "var(--ink)" in style and "var(--c0)" in style
    assert not re.search(r"#0[123]0\d0\d", page.read_text())
    assert "prefers-color-scheme: dark" in page.read_text()


def test_a_report_is_the_same_for_the_same_results(results, tmp_path):
    pages = [tmp_path / name for name in ("a.html", "b.html")]
    for page in pages:
        assert main(["report", str(results), "--out", str(page)]) == 0
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_report_does_runs_itself_and_puts_other_settings_apart(results, tmp_path):
    page = tmp_path / "page.html"
    assert main(["report", str(results), *RUN, "--out", str(page), "--series", "10"]) == 0
    tree = parsed(page)
    assert len(tree.findall(".//table")) == 2 and len(tree.findall(".//tbody/tr")) == 7
    # A single rate and policy: no plots against these.
    assert [caption.split()[0] for caption in captions(tree)[6:]] == ["Distribution", "KVC"]


def test_a_report_keeps_placements_and_links_apart(capsys, tmp_path):
    run = ["--policy", "distserve", *RUN[2:], "--output", "json", "--disaggregate"]
    ways = (
        ["prefill=1x1x2,decode=1x1x1"],
        ["prefill=1x1x1,decode=1x1x2"],
        ["prefill=1x1x1,decode=1x1x2", "--link-gb-per-s", "16"],
    )
    found = [json.loads(simulated(capsys, *run, *way)) for way in ways]
    assert len({result["capacity_tokens"] for result in found}) == 1
    file, page = tmp_path / "found.json", tmp_path / "page.html"
    file.write_text(json.dumps([*found, {**found[0], "tensor": 2}]))
    assert main(["report", str(file), "--out", str(page)]) == 0
    tree = parsed(page)
    words = " ".join(tree.itertext())
    assert len(tree.findall(".//table")) == 4
    assert "prefill=1x1x2,decode=1x1x1" in words and "1.6e+10" in words
    assert "tensor parallelism" in words


def test_all_commands_take_prefix_caching_and_late_results(capsys, tmp_path):
    trace, how = tmp_path / "trace.jsonl", ["--prefix-caching", "blocks", "--results", "late"]
    rows = [
        {"timestamp": n, "input_length": 600, "output_length": 20 + n, "hash_ids": [n, 100 + n]}
        for n in range(20)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    how += ["--trace", str(trace)]
    plain = json.loads(simulated(capsys, *RUN, *how[4:], "--output", "json"))
    late = json.loads(simulated(capsys, *RUN, *how, "--output", "json"))
    assert (plain["prefix_caching"], plain["results"]) == ("off", "at-once")
    assert (late["prefix_caching"], late["results"]) == ("blocks", "late")
    assert late["mean_ttft_s"] > plain["mean_ttft_s"]
    file, page = tmp_path / "plain.json", tmp_path / "page.html"
    file.write_text(json.dumps(plain))
    assert main(["report", str(file), *RUN, *how, "--out", str(page)]) == 0
    words = " ".join(parsed(page).itertext())
    assert "at-once" in words and "late" in words
    assert len(re.findall("results known", words)) >= 2
    search = ["--policy", "plus", *MACHINE, "--slo", "e2e=30", "--num-requests", "20"]
    search += ["--min-duration-s", "0", "--tolerance", "0.5", *how, "--output", "json"]
    capsys.readouterr()
    assert main(["capacity", *search]) == 0
    assert '"results": "late"' in capsys.readouterr().out


@pytest.mark.parametrize("keeps", ["prompts", "blocks"])
def test_prefix_caching_needs_a_trace_with_names_of_blocks(capsys, keeps):
    assert main(["simulate", *RUN, "--prefix-caching", keeps]) == 2
    said = capsys.readouterr().err
    assert f"--prefix-caching {keeps}: trace synthetic:sharegpt names no blocks" in said


def test_distserve_has_no_router_and_states_none(capsys):
    run = ["--policy", "distserve", *APART, *RUN[2:]]
    assert json.loads(simulated(capsys, *run, "--output", "json"))["router"] is None


def test_distserve_has_no_late_results(capsys):
    run = ["--policy", "distserve", *APART, *RUN[2:]]
    assert main(["simulate", *run, "--results", "late"]) == 2
    assert "results=late (--results): distserve has neither" in capsys.readouterr().err


def test_a_missing_link_is_told_before_anything_runs(capsys, tmp_path):
    machine = [
        "--hardware",
        "h200",
        "--model",
        "llama-3.1-8b",
        "--records",
        str(tmp_path / "r.csv"),
    ]
    assert main(["simulate", *RUN, *APART, "--policy", "plus", "distserve", *machine]) == 2
    told = capsys.readouterr()
    assert "--link-gb-per-s is missing: profile h200/llama-3.1-8b states none" in told.err
    assert not told.out and not list(tmp_path.iterdir())


def test_it_is_told_where_requests_are_left_out(capsys):
    trace = ["--trace", "synthetic:mooncake-conversation"]
    assert main(["simulate", *RUN, *trace, "--output", "json"]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert 0 < result["requests"] < 12 and result["left_out"] > 0
    assert f"{result['requests']} requests, not 12: {result['left_out']} of the trace" in told.err
    assert main(["simulate", *RUN]) == 0
    assert "requests, not" not in capsys.readouterr().err


def test_simulate_prints_the_page_of_a_run(capsys, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(simulated(capsys, *RUN, "--output", "html"))
    assert len(captions(parsed(page))) == 2


def test_without_series_the_page_says_so(capsys, tmp_path):
    plain, page = tmp_path / "plain.json", tmp_path / "page.html"
    plain.write_text(simulated(capsys, *RUN, "--output", "json"))
    assert main(["report", str(plain), "--out", str(page)]) == 0
    tree = parsed(page)
    assert captions(tree) == [] and "No series over time" in " ".join(tree.itertext())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "give what econoserve simulate --output json printed"),
        ("[]", "no results"),
        ("[3]", "policy of result 1 is None"),
        ('{"policy": "plus", "rate_rps": "x"}', "rate_rps of result 1 is 'x'"),
    ],
)
def test_results_of_another_form_are_refused(capsys, tmp_path, text, words):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    assert main(["report", str(path), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert "wrong.json: " in error and words in error


def test_a_report_of_nothing_says_what_to_give(capsys, results):
    assert main(["report"]) == 2
    assert "give files with results, or --policy, --rate, --hardware" in capsys.readouterr().err
    assert main(["report", str(results), "--policy", "plus"]) == 2
    assert "--policy starts runs, which need more: give --rate, --h" in capsys.readouterr().err


def test_without_matplotlib_nothing_is_run(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["simulate", *RUN, "--output", "html"]) == 2
    assert "pip install 'econoserve[report]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--jobs", "0"], "argument --jobs: 0: give a whole number of 1 or more"),
        (["--rate", "0"], "argument --rate: 0: give requests per second, more than 0"),
        (["--rate", "nan"], "argument --rate: nan: give requests"),
        (["--overhead-ms", "-1"], "argument --overhead-ms: -1: give milliseconds, 0 or more"),
        (["--kvc-tokens", "1"], "argument --kvc-tokens: 1: give a whole number of 2 or more"),
        (["--num-requests", "0"], "argument --num-requests: 0: give a whole number of 1"),
        (["--max-running", "x"], "argument --max-running: x: give a whole number of 1"),
        (["--seed", "-1"], "argument --seed: -1: give a whole number of 0 or more"),
        (["--arrivals", "gamma:0"], "argument --arrivals: arrivals 'gamma:0': give trace"),
        (["--slo", "jct=3"], "argument --slo: slo 'jct=3': give ttft="),
        (["--predictor", "none"], "argument --predictor: predictor 'none' is not known"),
        (["--records", "a.txt"], "argument --records: a.txt: give a file that ends in .jsonl or"),
        (["--records", "nowhere/a.csv"], "nowhere/a.csv: there is no folder nowhere; make it"),
    ],
)
def test_errors_name_the_flag_that_was_typed(capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *RUN, *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", ""], "--model is missing: with --hardware a100 give one of opt-13b, opt-66b"),
        (["--model", "x"], "--model x: with --hardware a100 give one of opt-13b"),
        (["--hardware", "x"], "--hardware x: choose one of a100"),
        (["--trace", "no.csv"], "plus at rate 3: trace no.csv: no such file"),
        (["--kvc-tokens", "9"], "no request fits into a context of 8 tokens"),
        (["--series", "9"], "--series 9: a table shows none: add --output json"),
        (["--link-gb-per-s", "3"], "--link-gb-per-s 3.0: only --policy distserve uses it"),
        ([*APART], "--disaggregate prefill=1x1x1,decode=1x1x1: only --policy distserve uses it"),
        (
            [*APART, "--policy", "distserve", "--tensor", "2"],
            "--tensor 2: the placement of distserve states it",
        ),
    ],
)
def test_errors_say_what_to_do(capsys, arguments, words):
    assert main(["simulate", *RUN, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_errors_of_a_worker_name_its_run(capsys):
    rest = ["--num-requests", "5", "--trace", "no.csv", "--jobs", "2", *MACHINE]
    before = children(os.getpid())
    assert main(["simulate", "--policy", "d", "plus", "--rate", "2.5", *rest]) == 2
    assert "d at rate 2.5: trace no.csv: no such file" in capsys.readouterr().err
    assert children(os.getpid()) == before


@pytest.fixture
def deaf_to_sigterm():
    """A handler of SIGTERM that the runs' processes inherit."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("deaf_to_sigterm")
def test_a_mistake_of_ours_keeps_its_trace_and_names_its_run(monkeypatch):
    def broken(spec):
        raise KeyError("r1")

    monkeypatch.setattr(runs, "simulate", broken)
    workload = WorkloadSpec("synthetic:sharegpt", 3.0, 5)
    specs = [RunSpec(policy, workload, "a100", "opt-13b") for policy in ("d", "plus")]
    with pytest.raises(KeyError) as raised:
        list(runs.run_all(specs, 2))
    assert raised.value.__notes__ == ["in the run of d at rate 3"]


def children(pid):
    """Processes that a process started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def test_one_run_is_interrupted_without_a_trace(capsys, monkeypatch):
    def interrupted(spec):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "simulate", interrupted)
    assert main(["simulate", *RUN]) == 130
    assert capsys.readouterr().err == "econoserve simulate: interrupted\n"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_command_leaves_nothing(how):
    arguments = ["--policy", "plus", "--rate", "6", "7", "--num-requests", "30000", "--jobs", "2"]
    command = [sys.executable, "-m", "econoserve.cli", "simulate", *arguments, *MACHINE]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests that run in the background of a shell ignore it, and so would the command.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    workers, deadline = [], time.monotonic() + 60
    while time.monotonic() < deadline and len(workers) < 2:
        workers = children(process.pid)
        time.sleep(0.02)
    assert len(workers) == 2
    # Into the loop that waits for the runs, and the runs themselves.
    time.sleep(1)
    if how == signal.SIGINT:
        # As from a terminal: Ctrl-C is for all processes of the group.
        os.killpg(process.pid, how)
    else:
        process.kill()
    _, error = process.communicate(timeout=30)
    assert "Traceback" not in error
    if how == signal.SIGINT:
        assert process.returncode == 130 and "simulate: interrupted" in error
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").is_dir() for pid in workers):
        time.sleep(0.02)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").is_dir()]
