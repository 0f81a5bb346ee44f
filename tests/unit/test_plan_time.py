"""The planning benchmark: what it measures, and what it prints last."""

import json
import subprocess
import sys
from pathlib import Path

from benchmark.core.plan_time import GROWTH, SIZES, Timing, growth, machine, measure
from econoserve.core.kvc import KvcMode

ROOT = Path(__file__).parents[2]


def test_the_machine_keeps_its_queue_and_its_pool():
    under_test = machine(KvcMode.RISK, 4096, running=8, queued=30)
    costs = [under_test.step() for _ in range(150)]
    assert max(cost.running for cost in costs) > 4
    assert all(cost.plan_s > 0 and cost.books_s >= 0 for cost in costs)


def test_a_timing_has_the_promised_fields():
    timing = measure(KvcMode.EXACT, 8, 30, 4096, iterations=20)
    assert (timing.mode, timing.running, timing.queued) == ("exact", 8, 30)
    assert 0 < timing.median_us <= timing.p99_us


def test_the_growth_is_fitted_over_the_logarithm_of_the_queue():
    timings = [
        Timing("exact", 256, queued, 50.0 + i, 90.0, 1.0, 250.0)
        for i, queued in enumerate((1_000, 10_000, 100_000))
    ]
    assert growth(timings).startswith("exact: 47 us +1.0 us per tenfold queue")


def test_started_as_a_script_its_last_line_is_json():
    answer = subprocess.run(
        [sys.executable, "benchmark/core/plan_time.py", "--quick", "--json", "--modes", "exact"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    rows = json.loads(answer.stdout.splitlines()[-1])
    wanted = {*SIZES, *((256, queued) for queued in GROWTH if queued <= 10_000)}
    assert {(row["running"], row["queued"]) for row in rows} == wanted
    for row in rows:
        assert {"mode", "running", "queued", "median_us", "p99_us"} <= row.keys()
        assert row["mode"] == "exact" and 0 < row["median_us"] <= row["p99_us"]
