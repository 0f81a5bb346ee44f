"""The search for a capacity: it finds what is known, and its shortcut changes no answer."""

import json
import math
from dataclasses import replace

import pytest

from econoserve.capacity import COLUMNS, cells
from econoserve.cli import main
from econoserve.core.types import Outcome, Slo
from econoserve.sim.capacity import (
    MOST_REQUESTS,
    Misses,
    Trial,
    attains,
    capacity,
    fewest_instances,
    lasting,
    measure,
)
from econoserve.sim.records import RequestRecord
from econoserve.sim.run import RunSpec, simulate
from econoserve.workload.workload import WorkloadSpec

SPEC = RunSpec(
    "vllm_v1",
    WorkloadSpec("synthetic:sharegpt", 8.0, 60, slo=Slo(ttft_s=2.0, tpot_s=0.1), seed=3),
    "a100",
    "opt-13b",
)


class Sustains:
    """A fake that attains up to a known rate for each replica, and counts its runs."""

    def __init__(self, rate_rps, of_trace=math.inf):
        self.rate_rps, self.of_trace = rate_rps, of_trace
        self.asked = []

    def __call__(self, spec, attain):
        rate_rps, requests = spec.workload.rate_rps, min(spec.workload.requests, self.of_trace)
        self.asked.append(spec)
        attained = rate_rps <= self.rate_rps * spec.instances
        return Trial(rate_rps, spec.instances, requests, attained, {"rate": rate_rps})


@pytest.mark.parametrize("known_rps", [0.3, 3.7, 8.0, 100.0])
def test_bisection_finds_a_known_capacity(known_rps):
    run = Sustains(known_rps)
    found = capacity(SPEC, run=run, tolerance=0.01)
    assert found.rate_rps <= known_rps < found.above_rps <= found.rate_rps * 1.01
    assert found.figures == {"rate": found.rate_rps}
    assert len(found.trials) == len(run.asked) < 20
    for spec in run.asked:
        assert spec.workload.requests == max(60, math.ceil(1200 * spec.workload.rate_rps))


def test_a_tolerance_below_what_numbers_can_tell_apart_comes_to_an_end():
    run = Sustains(3.7)
    found = capacity(SPEC, run=run, tolerance=1e-17)
    assert (found.rate_rps, found.above_rps) == (3.7, math.nextafter(3.7, 4))
    assert len(run.asked) < 80


def test_the_table_marks_a_rate_that_nothing_bounds():
    at = list(COLUMNS).index("rate_rps")
    assert cells({"rate_rps": 2.0, "above_rps": None})[at] == "at least 2.000"
    assert cells({"rate_rps": 2.0, "above_rps": 2.1})[at] == "2.000"
    assert cells({"rate_rps": 2.0})[at] == "2.000"


def test_nothing_and_everything_attain():
    assert capacity(SPEC, run=Sustains(0.0)).rate_rps == 0.0
    assert capacity(SPEC, run=Sustains(0.0)).figures == {}
    assert math.isinf(capacity(SPEC, run=Sustains(math.inf)).above_rps)


@pytest.mark.parametrize("capacity_rps", [math.inf, 3000.0])
def test_a_lax_objective_does_not_make_runs_without_end(capacity_rps):
    run = Sustains(capacity_rps)
    found = capacity(SPEC, run=run, start_rps=1.0)
    # At 2,048 per second, 20 minutes would have too many.
    assert (found.rate_rps, found.above_rps) == (1024.0, math.inf)
    assert max(spec.workload.requests for spec in run.asked) <= MOST_REQUESTS


def test_more_requests_than_that_are_run_if_they_are_stated_or_the_trace_has_no_more():
    stated = replace(SPEC, workload=replace(SPEC.workload, requests=2 * MOST_REQUESTS))
    assert math.isfinite(capacity(stated, run=Sustains(3000.0), min_duration_s=60.0).above_rps)
    run = Sustains(3000.0, of_trace=1000)
    found = capacity(SPEC, run=run, start_rps=1.0)
    assert found.rate_rps <= 3000.0 < found.above_rps <= found.rate_rps * 1.02


@pytest.mark.parametrize("rate_rps, needed", [(0.5, 1), (1.0, 1), (1.1, 2), (12.5, 13), (16.0, 16)])
def test_the_fewest_replicas_for_a_rate(rate_rps, needed):
    spec = replace(SPEC, workload=replace(SPEC.workload, rate_rps=rate_rps))
    assert fewest_instances(spec, run=Sustains(1.0)).instances == needed
    assert fewest_instances(spec, run=Sustains(1.0), most=16).instances == needed


def test_too_few_replicas_are_no_answer():
    found = fewest_instances(SPEC, run=Sustains(1.0), most=5)
    assert (found.instances, found.figures) == (0, {})
    assert [trial.instances for trial in found.trials] == [1, 2, 4, 5]


def test_shares_are_counted_exactly():
    assert attains(9, 10, 0.9) and not attains(8, 10, 0.9)
    assert attains(2700, 3000, 0.9) and not attains(2699, 3000, 0.9)
    assert attains(10, 10, 1.0) and not attains(9, 10, 1.0)


@pytest.mark.parametrize("slo", [SPEC.workload.slo, Slo(e2e_s=24.0), Slo(tpot_s=0.045)])
def test_the_shortcut_changes_no_answer(slo):
    answers = set()
    for rate_rps in (0.5, 2.0, 12.0, 48.0):
        workload = replace(SPEC.workload, rate_rps=rate_rps, requests=150, slo=slo)
        spec = replace(SPEC, workload=workload, capacity_tokens=20_000)
        whole = simulate(spec).figures
        trial = measure(spec)
        assert trial.attained == (whole["ssr"] >= 0.9)
        assert trial.figures in ({}, whole)
        answers.add((trial.attained, not trial.figures))
    # Some attain, and some end early.
    assert {(True, False), (False, True)} <= answers


def test_a_request_in_flight_is_late_when_nothing_can_help_it():
    slo = Slo(ttft_s=1.0, tpot_s=0.5)
    waiting, slow, done = (RequestRecord(rid, 10.0, 5, 11, slo) for rid in "abc")
    slow.first_token_s = 10.5
    done.first_token_s, done.end_s, done.outcome = 10.5, 15.5, Outcome.FINISHED
    assert done.met
    for now_s, missed in ((11.0, 0), (11.1, 1), (15.5, 1), (15.6, 2)):
        records = [waiting, slow, done]
        for allowed in range(3):
            assert Misses(allowed)(now_s, records) == (missed > allowed), (now_s, allowed)


def test_real_runs_last_as_long_as_asked():
    spec = lasting(SPEC, 2.0, 100.0)
    assert (spec.workload.rate_rps, spec.workload.requests) == (2.0, 200)
    assert lasting(SPEC, 2.0, 10.0).workload.requests == 60


def test_more_than_can_be_found_is_refused():
    for constants, words in (
        ({"attain": 0.0}, "attain=0.0: give a share"),
        ({"tolerance": 0.0}, "tolerance=0.0: give a share"),
        ({"min_duration_s": -1.0}, "min_duration_s=-1.0: give 0 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            capacity(SPEC, **constants)
    with pytest.raises(ValueError, match="no objective is stated"):
        capacity(replace(SPEC, workload=replace(SPEC.workload, slo=Slo())))


def test_the_command_prints_the_same_again(capsys):
    arguments = "capacity --policy vllm_v1 --num-requests 60 --min-duration-s 10 --tolerance 0.1"
    arguments += " --hardware a100 --model opt-13b --slo ttft=2,tpot=0.1 --output json"
    printed = []
    for _ in range(2):
        assert main(arguments.split()) == 0
        printed.append(json.loads(capsys.readouterr().out))
        assert printed[-1].pop("wall_s") > 0
    first, again = printed
    assert first == again
    assert first["ssr"] >= 0.9 and first["above_rps"] <= first["rate_rps"] * 1.1
    assert first["runs"] == len(first["trials"])


def test_the_command_finds_replicas(capsys):
    arguments = "capacity --policy vllm_v1 plus --num-requests 200 --min-duration-s 1 --jobs 1"
    arguments += " --gpus-for 60 --hardware a100 --model opt-13b --slo ttft=0.5,tpot=0.1"
    assert main(arguments.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [name.strip() for name in lines[0].split("|")]
    for line in lines[2:]:
        row = dict(zip(names, line.split("|"), strict=True))
        assert 2 <= int(row["GPUs"]) == int(row["instances"]) <= 8
        assert float(row["SSR"]) >= 0.9


def test_the_command_explains_what_is_wrong(capsys):
    arguments = "capacity --policy plus --hardware a100 --model opt-13b"
    assert main(arguments.split()) == 2
    assert "no objective is stated" in capsys.readouterr().err
    assert main([*arguments.split(), "--link-gb-per-s", "3"]) == 2
    assert "--link-gb-per-s 3.0: only --policy distserve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "column", "shown"),
    [("--start-rate 1", "rate", "none"), ("--gpus-for 1 --max-instances 2", "instances", "over 2")],
)
def test_the_table_says_that_nothing_was_found(capsys, more, column, shown):
    arguments = "capacity --policy plus --hardware a100 --model opt-13b --slo e2e=0.001"
    arguments += f" --num-requests 5 --min-duration-s 0 {more}"
    assert main(arguments.split()) == 0
    heading, _, line = capsys.readouterr().out.splitlines()
    names = [name.strip() for name in heading.split("|")]
    assert line.split("|")[names.index(column)].strip() == shown
