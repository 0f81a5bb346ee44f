"""The simulator's figures: what is measured, what is not, and what happened over time."""

import json
from dataclasses import replace

import pytest

from econoserve.core.types import Outcome, Preemption, Slo
from econoserve.policies import make_policy
from econoserve.policies.vllm_v1 import VllmV1, VllmV1Config
from econoserve.prediction.oracle import Oracle
from econoserve.prediction.request import RequestFeatures
from econoserve.report.page import page
from econoserve.report.table import COLUMNS, cells
from econoserve.runs import settings_of
from econoserve.sim.instance import Instance, Machine
from econoserve.sim.records import KvcUse, RequestRecord, summarise
from econoserve.sim.run import RunSpec, serve, simulate
from econoserve.sim.series import Series
from econoserve.workload.trace import TraceRequest
from econoserve.workload.workload import WorkloadSpec

TIMES = ("jct_s", "ttft_s", "tpot_s", "latency_s")
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


def one_block_at_a_time(series=None, policy=None):
    """Two requests for a KVC that holds one of them."""
    requests = [
        TraceRequest(0.0, RequestFeatures(10, 1000), output, slo=Slo()) for output in (5, 2)
    ]
    truth = {id(request.features): request.output_tokens for request in requests}
    oracle = Oracle(0.5, lambda features: truth[id(features)])
    policy = policy or make_policy("vllm_v1", 16)
    instance = Instance(Machine(16, Flat()), policy, oracle, series)
    serve(instance, requests)
    return instance


def record(prompt, output, end_s, slo=Slo(e2e_s=1.0)):  # noqa: B008
    return RequestRecord("r", 0.0, prompt, output, slo, Outcome.FINISHED, 0.5, end_s)


def test_kvc_in_a_backlog_leaves_out_the_run_down():
    instance = one_block_at_a_time()
    figures = summarise(instance.records, instance.use)
    # For 5 s the first holds 10 to 14 tokens while the second waits, which then holds 10 and 11.
    assert figures["kvc_useful_utilisation_backlog"] == pytest.approx(60 / (16 * 5))
    assert figures["kvc_useful_utilisation"] == pytest.approx(81 / (16 * 7))
    assert figures["backlog_share"] == pytest.approx(5 / 7)
    # Two prompts, and five more output tokens.
    assert figures["iterations"] == 7
    assert figures["mean_forward_tokens"] == pytest.approx(25 / 7)


def test_without_a_backlog_there_is_no_figure_of_it():
    workload = replace(SPEC.workload, requests=2, rate_rps=0.01)
    figures = simulate(replace(SPEC, workload=workload)).figures
    assert figures["kvc_useful_utilisation_backlog"] is None and figures["backlog_share"] == 0


@pytest.mark.parametrize("policy", ["plus", "vllm_v1", "srtf"])
def test_the_part_in_a_backlog_is_part_of_the_whole(policy):
    spec = replace(SPEC, policy=policy)
    figures = simulate(spec).figures
    within = figures["kvc_useful_utilisation_backlog"] * figures["backlog_share"]
    assert 0 < within <= figures["kvc_useful_utilisation"] <= figures["kvc_utilisation"]
    assert 0 < figures["backlog_share"] < 1


def test_demand_is_what_a_request_holds_summed_over_its_iterations():
    # 10 in its prompt's pass, then 11, 12 and 13.
    assert record(10, 4, 1.0).demand_token_iterations == 46
    assert record(10, 1, 1.0).demand_token_iterations == 10


def test_ssr_is_stated_for_each_tenth_of_the_demand():
    # The heaviest fifth is late.
    records = [record(100, size, 0.9 if size <= 16 else 2.0) for size in range(20, 0, -1)]
    figures = summarise(records, KvcUse(1.0, 1.0, 2.0))
    assert figures["ssr_by_demand"] == [1.0] * 8 + [0.0] * 2 and figures["ssr"] == 0.8
    few = summarise(records[:3], KvcUse(1.0, 1.0, 2.0))["ssr_by_demand"]
    assert len(few) == 10 and few.count(None) == 7


def test_without_objectives_nothing_is_said_about_them():
    workload = replace(SPEC.workload, slo=Slo(), requests=10)
    figures = simulate(replace(SPEC, workload=workload)).figures
    assert [figures[name] for name in ("ssr", "goodput_rps", "ssr_by_demand")] == [None] * 3
    assert figures["throughput_rps"] > 0


def nobody_served():
    """Figures of a run that refused everybody."""
    records = [record(100, 5, 1.0) for _ in range(10)]
    for one in records:
        one.outcome = Outcome.REJECTED
    return summarise(records, KvcUse(1.0, 0.0, 2.0))


def test_who_serves_nobody_has_no_times():
    figures = nobody_served()
    times = {name: value for name, value in figures.items() if name.endswith(TIMES)}
    assert len(times) == 11 and set(times.values()) == {None}
    assert (figures["served"], figures["ssr"], figures["throughput_rps"]) == (0, 0.0, 0.0)
    assert summarise([record(100, 1, 1.0)], KvcUse(1.0, 1.0, 2.0))["mean_tpot_s"] is None


@pytest.mark.parametrize("rates", [(2.0,), (2.0, 4.0)])
def test_tables_and_pages_show_runs_that_serve_nobody(rates):
    ends = simulate(replace(SPEC, workload=replace(SPEC.workload, requests=10))).figures
    runs = [
        {**settings_of(SPEC), "policy": policy, "rate_rps": rate_rps, "wall_s": 1.0, **figures}
        for policy, figures in (("d", ends | nobody_served()), ("plus", ends))
        for rate_rps in rates
    ]
    shown = dict(zip(COLUMNS, cells(runs[0]), strict=True))
    assert shown["mean_jct_s"] == shown["p99_jct_s"] == shown["mean_tpot_s"] == "-"
    html = page(json.loads(json.dumps(runs, allow_nan=False)), "runs")
    parts = html.partition("parts, one by one")[2].partition("</svg>")[0]
    assert "served per second" in parts and "mean JCT, s" not in parts


def test_a_series_by_hand():
    series = Series(8)
    one_block_at_a_time(series)
    columns = series.columns()
    assert columns["time_s"] == [0, 1, 2, 3, 4, 5, 6]
    assert columns["kvc_held_tokens"] == [10, 11, 12, 13, 14, 10, 11] == columns["kvc_used_tokens"]
    assert columns["waiting"] == [1, 1, 1, 1, 1, 0, 0]
    assert columns["running"] == [0, 1, 1, 1, 1, 0, 1]
    assert columns["forward_tokens"] == [10, 1, 1, 1, 1, 10, 1]
    assert columns["tfs_tokens"] == [None] * 7


def test_a_series_has_the_target_of_when_a_pass_began():
    class Learns(VllmV1):
        learned = 0

        def on_iteration(self, work, elapsed_s):
            self.learned += 1

        def tfs_tokens(self, decoding, tpot_s):
            return self.learned

    series = Series(8)
    one_block_at_a_time(series, Learns(VllmV1Config(capacity_tokens=16)))
    assert series.columns()["tfs_tokens"] == [0, 1, 2, 3, 4, 5, 6]


def test_a_series_has_a_bounded_number_of_points():
    series = Series(4)
    one_block_at_a_time(series)
    columns = series.columns()
    assert columns["step_s"] == 2.0 and columns["time_s"] == [0, 2, 4, 6]
    assert columns["kvc_held_tokens"] == [10.5, 12.5, 12, 11]


def test_a_series_changes_nothing():
    plain, watched = simulate(SPEC), simulate(replace(SPEC, series_points=50))
    series = watched.figures.pop("series")
    assert watched.figures == plain.figures and watched.records == plain.records
    assert 25 <= len(series["time_s"]) <= 50
    assert all(len(values) == len(series["time_s"]) for values in list(series.values())[1:])
    assert max(series["kvc_held_tokens"]) <= 3000
    assert all(tfs is not None and tfs > 0 for tfs in series["tfs_tokens"])


def test_plus_knows_what_it_costs_to_move_kvc(monkeypatch):
    # Sent to host memory, since that is cheaper than to compute it again on this hardware.
    moved = []
    follow = Instance._follow

    def watch(self, plan, now_s):
        moved.extend(how for _, how in plan.preempt)
        return follow(self, plan, now_s)

    monkeypatch.setattr(Instance, "_follow", watch)
    simulate(replace(SPEC, workload=replace(SPEC.workload, requests=300)))
    assert Preemption.OFFLOAD in moved
