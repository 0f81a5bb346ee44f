"""The placement search finds what trying everything finds, where that can be tried."""

import json
from dataclasses import replace
from itertools import product

import pytest

from econoserve.cli import main
from econoserve.core.types import Slo
from econoserve.sim.capacity import capacity, lasting, measure
from econoserve.sim.placement import Parallelism, Phase, Placement, parse_placement
from econoserve.sim.placement_search import (
    Limits,
    Stage,
    best_placement,
    fewest_gpus,
    measure_phase,
    parallelisms,
    phase_slo,
)
from econoserve.sim.profile import load_profile
from econoserve.sim.run import RunSpec
from econoserve.workload.workload import WorkloadSpec

SPEC = RunSpec(
    "distserve",
    WorkloadSpec("synthetic:sharegpt", 8.0, 150, slo=Slo(ttft_s=0.25, tpot_s=0.1), seed=3),
    "a100",
    "opt-13b",
    placement=parse_placement("prefill=1x1x1,decode=1x1x1"),
)
FEW = Limits(gpus=3, instance_gpus=2, evaluate=3)


def every_placement(most_gpus):
    kinds = [Parallelism(*pair) for pair in ((1, 1), (1, 2), (2, 1))]
    for prefill, decode, count, others in product(kinds, kinds, range(1, 4), range(1, 4)):
        placement = Placement(Phase(prefill, count), Phase(decode, others))
        if placement.gpus <= most_gpus:
            yield placement


def test_the_best_for_its_gpus_is_among_the_few_that_are_tried():
    found = best_placement(SPEC, limits=FEW, min_duration_s=20.0, tolerance=0.02)
    assert len(found.tried) == FEW.evaluate
    assert (found.placement, found.rate_rps) in found.tried
    rates = {
        placement: capacity(
            replace(SPEC, placement=placement), min_duration_s=20.0, tolerance=0.02
        ).rate_rps
        for placement in every_placement(FEW.gpus)
    }
    best = max(rate_rps / placement.gpus for placement, rate_rps in rates.items())
    ours = found.rate_rps / found.placement.gpus
    # The bracket may be closed elsewhere, so that two searches agree to their tolerance only.
    assert ours == pytest.approx(best, rel=0.04)
    assert found.figures["ssr"] >= 0.9 and found.figures["gpus"] == found.placement.gpus


def test_fewer_gpus_do_not_sustain_the_rate():
    spec = replace(SPEC, workload=replace(SPEC.workload, rate_rps=25.0, requests=300))
    found = fewest_gpus(spec, limits=replace(FEW, gpus=5), min_duration_s=20.0)
    run = lasting(spec, 25.0, 20.0)
    assert measure(replace(run, placement=found.placement)).figures == found.figures
    assert found.placement.gpus > 2
    for placement in every_placement(found.placement.gpus - 1):
        assert not measure(replace(run, placement=placement)).attained, placement


def test_a_rate_that_is_too_high_is_no_answer():
    spec = replace(SPEC, workload=replace(SPEC.workload, rate_rps=500.0))
    found = fewest_gpus(spec, limits=replace(FEW, gpus=2), min_duration_s=1.0)
    assert (found.placement, found.rate_rps, found.figures) == (None, 0.0, {})


def test_phases_alone_sustain_no_less_than_together():
    kind = Parallelism(1, 1)
    together = capacity(SPEC, min_duration_s=20.0).rate_rps
    for stage in Stage:
        trial = measure_phase(stage, kind, lasting(SPEC, together, 20.0), 0.9)
        assert trial.attained
        too_fast = measure_phase(stage, kind, lasting(SPEC, 200.0, 20.0), 0.9)
        assert not too_fast.attained


def test_instances_that_cannot_hold_the_model_are_left_out():
    profile = load_profile("a100", "opt-66b")
    kinds = parallelisms(profile, 8)
    # 66 billion parameters leave KVC on two GPUs of 80 GiB; 64 layers go in two or four stages.
    assert kinds == [
        Parallelism(*pair)
        for pair in ((2, 1), (2, 2), (2, 4), (3, 1), (3, 2), (4, 1), (4, 2), (8, 1))
    ]


def test_every_phase_needs_an_objective():
    assert phase_slo(Stage.PREFILL, Slo(ttft_s=1.0, tpot_s=2.0)) == Slo(ttft_s=1.0)
    assert phase_slo(Stage.DECODE, Slo(ttft_s=1.0, tpot_s=2.0)) == Slo(tpot_s=2.0)
    assert phase_slo(Stage.DECODE, Slo(e2e_s=9.0)) == Slo(e2e_s=9.0)
    spec = replace(SPEC, workload=replace(SPEC.workload, slo=Slo(ttft_s=1.0)))
    with pytest.raises(ValueError, match="nothing limits decodes: give ttft and tpot, or e2e"):
        best_placement(spec)


def test_the_command_searches_beside_other_policies(capsys):
    arguments = "capacity --policy distserve vllm_v1 --num-requests 60 --min-duration-s 5"
    arguments += " --hardware a100 --model opt-13b --slo ttft=0.25,tpot=0.1 --tolerance 0.2"
    arguments += " --max-gpus 2 --evaluate 1 --start-rate 4 --jobs 2 --output json"
    assert main(arguments.split()) == 0
    apart, replicas = json.loads(capsys.readouterr().out)
    assert apart["placement"] == "prefill=1x1x1,decode=1x1x1"
    assert apart["gpus"] == 2 and len(apart["phases"]) == 2
    assert apart["placements"] == [
        {"placement": apart["placement"], "gpus": 2, "rate_rps": apart["rate_rps"]}
    ]
    assert replicas["placement"] is None and replicas["rate_rps"] > 0


def test_the_command_takes_no_copies_of_a_placement_that_is_searched_for(capsys):
    arguments = "capacity --policy distserve --instances 4 --hardware a100 --model opt-13b"
    assert main([*arguments.split(), "--slo", "ttft=0.25,tpot=0.1"]) == 2
    said = capsys.readouterr().err
    assert "--instances 4" in said and "leave it out, and give --max-gpus" in said
