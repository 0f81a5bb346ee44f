"""The trial of the paper's claims: what is kept and what is run again, and how claims are read."""

import math
from dataclasses import replace

import pytest

from benchmark.paper import report, run
from benchmark.paper.bounds import bounds, demand
from benchmark.paper.claims import (
    Reach,
    Value,
    fewer_gpus,
    geometric_mean,
    jct_reductions,
    over,
    rate_at_latency,
    ssr_increases,
    ssr_ratios,
    throughput_ratios,
)
from benchmark.paper.grid import CELLS, FRACTIONS, QUICK, Paper
from benchmark.paper.known import Known
from benchmark.paper.plan import STAGES, best_peer, needed
from benchmark.paper.search import highest
from benchmark.paper.store import Line, Store, StoreError, code_version
from benchmark.paper.tables import TABLES
from benchmark.paper.tasks import Placing, Rate
from econoserve.prediction.request import RequestFeatures
from econoserve.workload.trace import TraceRequest

CELL = CELLS[0]
PAPER = Paper((CELL,), QUICK)
DONE = Line(True, {"ssr": 1.0}, 0.5)


def request(prompt_tokens, output_tokens):
    return TraceRequest(0.0, RequestFeatures(prompt_tokens, 1000), output_tokens)


def test_demand_is_the_tokens_held_summed_over_the_iterations():
    # Its prompt of 5 in the first iteration, then 6, then 7.
    assert demand(request(5, 3)) == 5 + 6 + 7


def test_the_bounds_leave_out_a_tenth():
    # One of ten has the long response, another the long prompt.
    requests = [request(10, 1)] * 8 + [request(10, 20), request(30, 1)]
    found = bounds(requests)
    heavy = 10 * 20 + 190
    assert found.lengths == pytest.approx((80 + heavy + 30) / (80 + 30))
    assert found.prompts == pytest.approx((80 + heavy + 30) / (80 + heavy))
    assert bounds(requests[:9]).lengths == 1.0, "nine requests have no tenth to give up"


@pytest.mark.parametrize("capacity", range(-40, 60, 7))
@pytest.mark.parametrize("start", [-5, 0, 17])
def test_a_search_finds_the_highest_rate_wherever_it_begins(capacity, start):
    search, runs = highest(start), 0
    index = next(search)
    with pytest.raises(StopIteration) as end:
        while True:
            runs += 1
            index = search.send(index <= capacity)
    assert end.value.value == capacity and runs <= 12
    if start in (capacity, capacity + 1):
        assert runs == 2


@pytest.mark.parametrize(("attains", "found"), [(True, 63), (False, None)])
def test_a_search_without_an_end_gives_up(attains, found):
    search = highest(0)
    next(search)
    with pytest.raises(StopIteration) as end:
        while True:
            search.send(attains)
    assert end.value.value == found


def test_the_rate_at_a_latency_is_read_between_the_runs():
    curve = [(1.0, 0.1), (2.0, 0.4), (3.0, 0.2), (4.0, 0.8)]
    # Half way in the logarithm, on the last way up.
    assert rate_at_latency(curve, 0.4) == (pytest.approx(3.5), Reach.EXACT)
    assert rate_at_latency(curve, 0.2) == (3.0, Reach.EXACT)
    assert rate_at_latency(curve, 0.8) == (4.0, Reach.AT_LEAST)
    assert rate_at_latency(curve, 0.05) == (1.0, Reach.AT_MOST)


def test_the_claims_of_known_sweeps():
    def figures(latency_s, jct_s, ssr):
        return {"mean_normalised_latency_s": latency_s, "mean_jct_s": jct_s, "ssr": ssr}

    theirs = {1.0: figures(0.1, 10.0, 0.8), 2.0: figures(1.0, 40.0, 0.0)}
    ours = {1.0: figures(0.05, 5.0, 0.9), 2.0: figures(0.1, 10.0, 0.5), 4.0: figures(0.2, 20, 0.1)}
    assert throughput_ratios(ours, theirs, "c") == [
        Value(pytest.approx(2.0), "c, 1"),
        Value(2.0, "c, 2", Reach.AT_LEAST),
    ]
    assert [v.value for v in jct_reductions(ours, theirs, "c")] == [0.5, 0.75]
    assert [v.value for v in ssr_increases(ours, theirs, "c")] == pytest.approx([0.1, 0.5])
    # Where theirs meets nobody's SLO there is no ratio.
    assert [v.value for v in ssr_ratios(ours, theirs, "c")] == pytest.approx([0.125])
    # Who serves nobody has no latency, so that any other is below it.
    nobody = theirs | {2.0: figures(None, None, 0.0)}
    assert throughput_ratios(ours, nobody, "c")[1] == Value(2.0, "c, 2", Reach.AT_LEAST)
    assert throughput_ratios(nobody, theirs, "c")[1] == Value(0.5, "c, 2")
    assert [v.value for v in jct_reductions(ours, nobody, "c")] == [0.5]
    found = over(jct_reductions(ours, theirs, "c"))
    assert (found.least.value, found.median, found.most.where) == (0.5, 0.625, "c, 2")
    assert over([]) is None
    assert fewer_gpus(4.0, 1.0) == 0.75
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_a_line_is_found_by_all_settings_of_its_run(tmp_path):
    store = Store(tmp_path / "runs.jsonl", "one")
    task = Rate(PAPER.spec(CELL, "plus", 3.0), whole=False)
    store.add(task.settings, DONE)
    for again in (
        store,
        Store(tmp_path / "runs.jsonl", "one"),
        Store(tmp_path / "runs.jsonl", None),
    ):
        assert again.get(task.key) == DONE and len(again) == 1
        for other in (
            PAPER.spec(CELL, "full", 3.0),
            PAPER.spec(CELL, "plus", 3.1),
            PAPER.spec(CELL, "plus", 3.0, "oracle"),
            PAPER.spec(replace(CELL, max_running=7), "plus", 3.0),
            replace(PAPER, seed=1).spec(CELL, "plus", 3.0),
            Paper((CELL,), files={CELL.lengths: "some.csv"}).spec(CELL, "plus", 3.0),
        ):
            assert again.get(Rate(other, whole=False).key) is None


def test_peers_have_the_defaults_that_their_servers_take_on_a_gpu():
    def constants(hardware, policy):
        cell = next(cell for cell in CELLS if cell.hardware == hardware)
        return PAPER.spec(cell, policy, 3.0).constants

    large = {"max_seqs": 1024, "max_batch_tokens": 8192}
    assert constants("rtx-pro-6000", "vllm_v1") == large
    assert constants("a100", "vllm_v1") == {"max_seqs": 256}
    assert constants("rtx-pro-6000", "sarathi") == {"max_seqs": 1024}
    assert constants("rtx-pro-6000", "plus") == constants("rtx-4090", "sglang") == {}


def test_lines_of_other_code_are_not_used_unless_asked_for(tmp_path):
    path = tmp_path / "runs.jsonl"
    task = Rate(PAPER.spec(CELL, "plus", 3.0), whole=False)
    Store(path, "one").add(task.settings, DONE)
    changed = Store(path, "two")
    assert (len(changed), changed.stale, changed.get(task.key)) == (0, 1, None)
    assert Store(path, "two", keep=True).get(task.key) == DONE
    redone = replace(DONE, wall_s=0.7)
    changed.add(task.settings, redone)
    assert Store(path, None).get(task.key) == redone, "the last line says which code"
    assert Store(path, None, keep=True).versions == {"one", "two"}


def test_half_a_line_is_dropped_and_other_files_are_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    task = Rate(PAPER.spec(CELL, "plus", 3.0), whole=False)
    Store(path, "one").add(task.settings, DONE)
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    store = Store(path, "one")
    assert len(store) == 1 and path.read_text() == whole
    path.write_text("something else\n" + whole)
    with pytest.raises(StoreError, match="line 1"):
        Store(path, "one")


def test_a_run_that_was_ended_early_is_no_answer_where_the_whole_is_asked_for():
    spec = PAPER.spec(CELL, "plus", 3.0)
    ended = Line(False, {}, 0.1)
    assert Rate(spec, whole=False).done(ended) and not Rate(spec, whole=True).done(ended)
    assert Rate(spec, whole=True).done(DONE) and Rate(spec, whole=False).done(DONE)
    assert Rate(spec, whole=True).key == Rate(spec, whole=False).key


def test_the_version_of_the_code_is_that_of_the_sources():
    assert code_version() == code_version() and len(code_version()) == 16


class Fake:
    """Answers each task from known capacities, at once."""

    CAPACITY_RPS = {"plus": 9.0, "vllm_v1": 6.0, "past_future": 7.0, "sglang": 3.0, "vllm": 2.0}

    def __init__(self, store):
        self.store, self.done = store, []

    def __call__(self, task):
        self.done.append(task)
        if isinstance(task, Placing):
            figures = {"rate_rps": 4.0, "gpus": 2, "placement": "prefill=1x1x1,decode=1x1x1"}
            return self.store.add(task.settings, Line(True, figures, 1.0))
        rate_rps = task.spec.workload.rate_rps
        load = rate_rps / self.CAPACITY_RPS.get(task.spec.policy, 5.0)
        attained = load <= 1
        figures = {
            "ssr": 1 - 0.1 * load,
            "ssr_by_demand": [1.0] * 9 + [1 - min(load, 1.0)],
            "mean_normalised_latency_s": math.exp(load),
            "mean_jct_s": 10 * load,
            "p99_jct_s": 30 * load,
            "p99_ttft_s": load,
            "kvc_useful_utilisation": 0.5,
            "kvc_useful_utilisation_backlog": None,
            "backlog_share": 0.0,
        }
        line = Line(attained, figures if attained or task.whole else {}, 1.0)
        return self.store.add(task.settings, line)


def test_the_plan_asks_for_nothing_twice_and_ends(tmp_path):
    path = tmp_path / "runs.jsonl"
    fake = Fake(Store(path, "one"))
    asked = []
    known = Known(PAPER, fake.store)
    while tasks := needed(known, list(STAGES)):
        asked.append(tasks[0])
        fake(tasks[0])
    texts = [task.key for task in asked]
    whole_too = len(texts) - len(set(texts))
    # A run ended early may be asked for once more, to its end.
    assert whole_too == sum(
        text in texts[:number] and task.whole
        for number, (task, text) in enumerate(zip(asked, texts, strict=True))
    )
    known = Known(PAPER, Store(path, "one"))
    assert needed(known, list(STAGES)) == [], "a second call has nothing to do"
    assert (
        known.capacity(CELL, "plus").rate_rps
        <= 9.0
        < PAPER.rate_rps(known.capacity(CELL, "plus").index + 1)
    )
    peer, rate_rps = best_peer(known, CELL)
    assert peer == "vllm_v1" or rate_rps <= 7.0
    fractions = sorted(known.sweep(CELL, "plus"))
    assert fractions[: len(FRACTIONS)] == list(FRACTIONS) and max(fractions) == 4.0


def test_the_report_of_a_tiny_store(tmp_path, monkeypatch, capsys):
    path = tmp_path / "runs.jsonl"
    fake = Fake(Store(path, "one"))
    known = Known(PAPER, fake.store)
    while tasks := needed(known, list(STAGES)):
        fake(tasks[0])
    page = tmp_path / "page.md"
    marks = "".join(f"<!-- begin {name} -->\nold\n<!-- end {name} -->\n" for name in TABLES)
    page.write_text(f"# Claims\n\n{marks}\nText that stays.\n")
    told = ["--quick", "--cells", CELL.name, "--out", str(path)]
    report.main([*told, "--page", str(page)])
    text = page.read_text()
    assert "old" not in text and text.endswith("Text that stays.\n")
    known = Known(PAPER, Store(path, None))
    plus, best = known.capacity(CELL, "plus").rate_rps, best_peer(known, CELL)
    row = next(line for line in TABLES["capacities"](known).splitlines() if CELL.name in line)
    assert f"{plus / best[1]:.2f}" in row and best[0] in row
    assert TABLES["capacities"](known) in text
    of_best = next(
        [cell.strip() for cell in line.split("|")]
        for line in TABLES["competition"](known).splitlines()
        if "best of today's" in line
    )
    ratio = f"{plus / best[1]:.2f}x"
    assert of_best[2:7] == [ratio, ratio, ratio, f"`{CELL.name}`", "1"]
    said = capsys.readouterr().err
    assert "0 runs are missing" in said and f"the figures now in {page} mean nothing" in said
    report.main([*told, "--page", str(page)])
    assert page.read_text() == text, "the same store gives the same page"
    with pytest.raises(SystemExit):
        report.main(["--out", str(tmp_path / "none.jsonl")])
    assert "no run is in it" in capsys.readouterr().err


def test_an_empty_store_makes_tables_of_dashes(tmp_path):
    known = Known(PAPER, Store(tmp_path / "runs.jsonl", "one"))
    for name, write in TABLES.items():
        text = write(known)
        assert text.startswith("| "), name
        assert text.splitlines()[0].split("|")[1].strip(), f"{name}: more cells than headings"
    assert " - " in TABLES["capacities"](known)


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="begin NAME"):
        report.refresh("nothing here", {"settings": "|"})


def test_a_folder_that_is_not_there_is_refused_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run.main(["--quick", "--out", str(tmp_path / "nowhere" / "runs.jsonl")])
    assert end.value.code == 2
    assert "argument --out" in (said := capsys.readouterr().err) and "there is no folder" in said


@pytest.mark.parametrize(
    "arguments", [["--cells", "nowhere"], ["--trace", "sharegpt=/nowhere.csv"], ["--trace", "x=y"]]
)
def test_errors_name_the_flag(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run.main([*arguments, "--out", str(tmp_path / "runs.jsonl")])
    assert end.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_the_command_runs_goes_on_and_reports(tmp_path, capsys):
    path, plots = tmp_path / "runs.jsonl", tmp_path / "plots"
    told = ["--quick", "--cells", CELL.name, "--out", str(path)]
    run.main([*told, "--jobs", "2", "--stages", "capacity", "sweep"])
    said = capsys.readouterr().out
    assert "1.79x knowing all lengths" in said and " runs done" in said
    whole = path.read_text()
    run.main([*told, "--jobs", "1", "--stages", "capacity", "sweep"])
    assert "0 runs done" in capsys.readouterr().out and path.read_text() == whole
    pytest.importorskip("matplotlib", reason="matplotlib draws the plots: install '.[dev]'")
    report.main([*told, "--plots", str(plots)])
    drawn = sorted(file.name for file in plots.glob("*.svg"))
    assert drawn == [f"paper-{name}.svg" for name in ("capacity", "demand", "latency", "ssr")]
    for name in ("capacity", "demand", "latency", "ssr"):
        assert (plots / f"paper-{name}.svg").stat().st_size < 60_000


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path):
    broken, path = replace(CELL, hardware="abacus"), tmp_path / "runs.jsonl"
    store = Store(path, "one")
    paper = Paper((broken, CELLS[1]), QUICK)
    failed = run.measure(paper, store, ["ablation"], jobs=1)
    assert len(failed) == 1 and "abacus/opt-13b" in failed[0] and "no profile" in failed[0]
    known = Known(paper, store)
    assert [task.spec.hardware for task in needed(known, ["ablation"])] == ["abacus"]
    assert known.capacity(CELLS[1], "full", "oracle") is not None
