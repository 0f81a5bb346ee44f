"""Prefills and decodes on separate instances: small cases come out by hand, nothing is lost."""

import json
import random
from dataclasses import replace

import pytest

from econoserve.cli import main
from econoserve.core.types import Outcome, Slo
from econoserve.prediction.request import RequestFeatures
from econoserve.sim.cluster import Clock, run_events
from econoserve.sim.decoding import DecodeBatch
from econoserve.sim.disaggregated import Disaggregated
from econoserve.sim.placement import Parallelism, Phase, Placement, parse_placement
from econoserve.sim.profile import ProfileError, load_profile
from econoserve.sim.records import RequestRecord
from econoserve.sim.run import RunSpec, simulate, stage_machines
from econoserve.sim.stages import Job, Pipeline, StageMachine, blocks_of
from econoserve.sim.timing import Pass
from econoserve.workload.trace import TraceRequest
from econoserve.workload.workload import WorkloadSpec

PLACEMENT = parse_placement("prefill=2x1x1,decode=1x1x2")
SPEC = RunSpec(
    "distserve",
    WorkloadSpec("synthetic:sharegpt", 8.0, 80, slo=Slo(ttft_s=0.25, tpot_s=0.1), seed=3),
    "a100",
    "opt-13b",
    placement=PLACEMENT,
)


class Flat:
    """Every pass takes a second."""

    def seconds(self, work):
        return 1.0


def request(arrival_s, prompt, output):
    return TraceRequest(arrival_s, RequestFeatures(prompt, 10_000), output)


def served(requests, prefill, decode):
    clock = Clock()
    system = Disaggregated(prefill, decode, clock, requests[0].arrival_s)
    assert run_events(system, clock, requests)
    for server in system.servers:
        assert server._free_blocks == server._machine.blocks
        assert server._meter.held == server._meter.useful == server.load == 0
    return system


def machine(tokens=16_000, **fields):
    return StageMachine(tokens, Flat(), **fields)


def times_of(system):
    return [(record.first_token_s, record.end_s) for record in system.records]


def test_a_request_by_hand():
    # Computed until 1 s, moved for half a second, then two tokens more.
    system = served([request(0.0, 10, 3)], [machine()], [machine(link_s_per_token=0.05)])
    assert times_of(system) == [(1.0, 3.5)]
    # 10 tokens are held there for 1.5 s, here for 0.5 s while they move, then 11 and 12.
    use = system.use
    assert use.held == pytest.approx(15 + 5 + 11 + 12)
    assert use.useful == pytest.approx(10 + 11 + 12)
    assert use.offered == pytest.approx(2 * 16_000 * 3.5)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kvc_tokens", [1000, 1600, 2400])
def test_a_small_kvc_that_waiting_prompts_fill_still_serves_all(kvc_tokens, seed):
    workload = WorkloadSpec("synthetic:sharegpt", 20.0, 300, seed=seed)
    placement = parse_placement("prefill=1x1x1,decode=1x1x1")
    spec = replace(SPEC, workload=workload, placement=placement, capacity_tokens=kvc_tokens)
    result = simulate(spec)
    assert all(record.outcome is Outcome.FINISHED for record in result.records)
    assert result.figures["preemptions"] > 0


@pytest.mark.parametrize("stages", [1, 2])
def test_prompts_that_fill_all_blocks_make_room_for_the_first(stages):
    # Both prompts come before one of them can run, and fill the last token of all blocks.
    requests = [request(0.0, 32, 40), request(0.0, 1568, 20)]
    decode = machine(1600, stages=stages)
    system = served(requests, [machine()], [decode])
    assert all(record.outcome is Outcome.FINISHED for record in system.records)
    assert system.records[1].preemptions == 1


def test_a_response_of_one_token_is_never_moved():
    system = served([request(0.0, 10, 1)], [machine()], [machine(link_s_per_token=9.0)])
    assert times_of(system) == [(1.0, 1.0)]


def test_prompts_are_batched_as_they_came_within_the_tokens_of_a_batch():
    arrivals = [(0.0, 8000), (0.0, 500), (0.1, 7000), (0.2, 2000), (0.3, 100)]
    requests = [request(at_s, prompt, 1) for at_s, prompt in arrivals]
    firsts = [
        first for first, _ in times_of(served(requests, [machine(64_000)], [machine(64_000)]))
    ]
    assert firsts == [1.0, 2.0, 2.0, 3.0, 3.0]


def test_a_prompt_longer_than_a_batch_is_computed_alone():
    requests = [request(0.0, 9000, 1), request(0.0, 10, 1)]
    system = served(requests, [machine(64_000)], [machine(64_000)])
    assert times_of(system) == [(1.0, 1.0), (2.0, 2.0)]


def test_kvc_moves_one_request_after_the_other():
    requests = [request(0.0, 10, 2), request(0.0, 20, 2)]
    system = served(requests, [machine()], [machine(link_s_per_token=0.1)])
    # The first decodes from 2 to 3 s; the second has arrived then.
    assert times_of(system) == [(1.0, 3.0), (1.0, 5.0)]
    at_rest = served(requests, [machine()], [machine()])
    assert times_of(at_rest) == [(1.0, 2.0), (1.0, 2.0)]


def test_a_prompt_stays_until_there_is_memory_and_holds_up_others():
    # Two blocks each: a request decodes with two, a prompt holds one.
    requests = [request(0.1 * number, 16, 4) for number in range(4)]
    system = served(requests, [machine(32)], [machine(32)])
    # Decodes run one after the other; the last prompt waits until the second one is fetched at 4 s.
    assert times_of(system) == [(1.0, 4.0), (2.0, 7.0), (3.0, 10.0), (5.0, 13.0)]


def test_what_fits_nowhere_is_refused():
    system = served([request(0.0, 20, 20), request(0.0, 20, 4)], [machine(64)], [machine(32)])
    assert [record.outcome for record in system.records] == [Outcome.REJECTED, Outcome.FINISHED]


def test_the_last_to_join_gives_way_and_comes_back():
    # The second joins when the first has decoded once: until then it is more than 5 % of the KVC.
    # Both fit with a block each; from their third token on they need two, of three.
    requests = [request(0.0, 14, 5), request(0.0, 14, 5)]
    system = served(requests, [machine(64)], [machine(48, move_s_per_token=0.01)])
    first, second = system.records
    assert (first.preemptions, second.preemptions) == (0, 1)
    # At 4 s 16 tokens of the second move out, and after the end of the first one in again; then it
    # has two tokens to go.
    assert first.end_s == pytest.approx(5.16)
    assert second.end_s == pytest.approx(7.32)
    assert second.recomputed_tokens == 0


def test_stages_work_at_the_same_time():
    pipeline = Pipeline(2)
    # A long batch, then a short one, which waits for it in the second stage.
    assert pipeline.enter(0.0, 2.0) == 4.0
    assert pipeline.free_s == 2.0
    assert pipeline.enter(2.0, 0.5) == 4.5
    assert pipeline.enter(2.5, 0.5, wait_s=3.0) == 6.5
    # Two prompts arrive one after the other; each takes two stages of half a second and a hop.
    requests = [request(0.0, 10, 1), request(0.1, 10, 1)]
    system = served(requests, [machine(stages=2)], [machine()])
    assert [first for first, _ in times_of(system)] == pytest.approx([1.004, 1.506])


def test_each_stage_of_decodes_has_a_batch_of_its_own():
    requests = [request(0.0, 10, 4), request(1.2, 10, 4)]
    system = served(requests, [machine()], [machine(stages=2)])
    # The second joins the other batch, half a pass later: both decode a token a second.
    (_, first), (_, second) = times_of(system)
    assert first == 4.0
    assert second == pytest.approx(2.5 + 3.0)
    alone = served(requests[:1], [machine()], [machine(stages=2)])
    assert times_of(alone)[0] == (1.0, 4.0)


def test_requests_go_where_the_fewest_are():
    requests = [request(0.0, 10, 50), request(0.0, 10, 2), request(1.5, 10, 2)]
    system = served(requests, [machine(), machine()], [machine(), machine()])
    # The third goes to the first prefill instance, and decodes where the second one has ended.
    assert times_of(system) == [(1.0, 50.0), (1.0, 2.0), (2.5, 3.5)]


def test_batches_count_the_blocks_that_open():
    draw = random.Random(5)
    batch, jobs, held = DecodeBatch(), {}, {}
    for step in range(400):
        if draw.random() < 0.3:
            rid = f"r{step}"
            prompt, output = draw.randrange(1, 60), draw.randrange(2, 60)
            record = RequestRecord(rid, 0.0, prompt, output)
            jobs[rid] = Job(request(0.0, prompt, output), record, prompt, 1)
            held[rid] = prompt
            batch.join(jobs[rid])
        if jobs and draw.random() < 0.1:
            rid = draw.choice(sorted(jobs))
            batch.leave(jobs.pop(rid))
            del held[rid]
        opening = sum(blocks_of(tokens + 1) > blocks_of(tokens) for tokens in held.values())
        assert batch.opening == opening
        work = batch.begin()
        held = {rid: tokens + 1 for rid, tokens in held.items()}
        assert (work.decoding, work.context_tokens) == (len(held), sum(held.values()))
        for job in batch.end():
            rid = job.record.rid
            assert job.produced == job.request.output_tokens
            assert job.held == held.pop(rid)
            del jobs[rid]


@pytest.mark.parametrize("seed", range(8))
def test_all_end_and_nothing_is_held(seed):
    draw = random.Random(seed)
    at_s, requests = 0.0, []
    for _ in range(150):
        at_s += draw.expovariate(0.5 + seed / 4)
        requests.append(request(at_s, draw.randrange(1, 150), draw.randrange(1, 120)))
    stages = 1 + seed % 3
    prefill = [machine(640, stages=stages) for _ in range(1 + seed % 2)]
    decode = [
        machine(640, stages=stages, link_s_per_token=0.002, move_s_per_token=0.001)
        for _ in range(2)
    ]
    system = served(requests, prefill, decode)
    for record in system.records:
        assert record.outcome is Outcome.FINISHED
        assert record.ttft_s >= 1.0
        assert record.jct_s >= record.output_tokens * (1 - 1e-9)
    assert 0 < system.use.useful <= system.use.held <= system.use.offered
    if seed > 3:
        assert sum(record.preemptions for record in system.records) > 0


def test_the_same_again_is_the_same_and_more_instances_serve_sooner():
    first, again = simulate(SPEC), simulate(SPEC)
    assert json.dumps(first.figures) == json.dumps(again.figures)
    assert first.records == again.records and first.figures["gpus"] == 4
    double = simulate(replace(SPEC, instances=2))
    assert double.figures["gpus"] == 8
    assert double.figures["mean_jct_s"] < first.figures["mean_jct_s"]


def test_figures_that_are_not_counted_are_none_and_not_nought():
    figures = simulate(SPEC).figures
    assert figures["backlog_share"] is figures["kvc_useful_utilisation_backlog"] is None
    assert figures["iterations"] is figures["mean_forward_tokens"] is None


def test_a_slow_link_delays_what_follows_the_first_token():
    slow = simulate(replace(SPEC, link_bytes_per_s=25e9 / 8)).figures
    fast = simulate(SPEC).figures
    assert slow["mean_ttft_s"] == pytest.approx(fast["mean_ttft_s"])
    assert slow["mean_tpot_s"] > fast["mean_tpot_s"]


def test_machines_follow_the_profile():
    placement = parse_placement("prefill=2x1x1,decode=1x4x2")
    prefill, decode = stage_machines(SPEC, placement, load_profile("a100", "opt-13b"))
    assert (len(prefill), len(decode)) == (1, 2)
    # DistServe's table: 163,008 and 356,752 tokens.
    assert prefill[0].capacity_tokens == pytest.approx(163_008, rel=0.06)
    assert decode[0].capacity_tokens == pytest.approx(356_752, rel=0.06)
    # 2 x 40 layers x 5120 x 2 bytes over 300 GB/s.
    assert decode[0].link_s_per_token == pytest.approx(819_200 / 300e9)
    assert decode[0].stages == 4


def test_profiles_know_only_what_was_measured():
    profile = load_profile("a100", "opt-66b")
    assert profile.tensor_choices == [2, 3, 4, 8]
    assert profile.on(4).time == profile.time and profile.on(4) == profile.on(4, 1)
    assert profile.on(8).memory.capacity_tokens > profile.on(4).memory.capacity_tokens
    with pytest.raises(ProfileError, match="tensor=5: give one of 2, 3, 4, 8"):
        profile.on(5)
    with pytest.raises(ProfileError, match="pipeline=3: give a divisor of its 64 layers"):
        profile.on(4, 3)


def test_placements_are_read_and_counted():
    one = Phase(Parallelism(2, 1), 3)
    assert parse_placement("prefill=2x1x3, decode=1x2x1") == Placement(
        one, Phase(Parallelism(1, 2), 1)
    )
    placement = parse_placement("prefill=2x1x3,decode=1x2x1")
    assert placement.gpus == 8 and placement.times(2).gpus == 16
    assert parse_placement(str(placement.times(2))) == placement.times(2)
    for text in ("", "prefill=2x1x3", "prefill=0x1x1,decode=1x1x1", "decode=1x1x1,prefill=1x1x1"):
        with pytest.raises(ValueError, match="give prefill=TPxPPxN,decode=TPxPPxN"):
            parse_placement(text)


def test_a_placement_belongs_to_distserve():
    for fields in ({"policy": "plus"}, {"placement": None}):
        with pytest.raises(ValueError, match="give a placement to distserve"):
            replace(SPEC, **fields)
    with pytest.raises(ValueError, match="tensor=2: the placement states it"):
        replace(SPEC, tensor=2)


def test_the_command_compares_with_replicas(capsys):
    arguments = "simulate --policy vllm_v1 distserve --rate 3 --num-requests 30 --jobs 1"
    arguments += " --hardware a100 --model opt-13b --disaggregate prefill=1x1x1,decode=1x1x1"
    arguments += " --instances 2 --link-gb-per-s 3.125 --output json"
    assert main(arguments.split()) == 0
    replicas, apart = json.loads(capsys.readouterr().out)
    assert (replicas["gpus"], apart["gpus"]) == (2, 4)
    assert replicas["placement"] is None
    assert apart["placement"] == "prefill=1x1x1,decode=1x1x1"
    assert replicas["served"] == apart["served"] == 30


def test_the_comparison_adds_what_ray_takes():
    from benchmark.simulator.distserve import WithRay

    for stages, prefill_s in ((1, 1.0 + 2e-5 + 1e-3), (2, 1.0 + 4e-5)):
        time = WithRay(Flat(), stages)
        assert time.seconds(Pass(1, 200, 200**2)) == pytest.approx(prefill_s)
        assert time.seconds(Pass(decoding=2, context_tokens=500)) == pytest.approx(
            1 + stages * 5e-5
        )
