"""The servers' comparison without a server: what is sent, and how servers are started."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmark.cpu_engine.systems import server_command  # noqa: E402
from benchmark.scheduler_comparison.workload import Vocabulary  # noqa: E402
from benchmark.serving.measure import Settings  # noqa: E402
from benchmark.serving.records import (  # noqa: E402
    Cell,
)
from benchmark.serving.systems import (  # noqa: E402
    KVC_TOKENS,
    NAMES,
    VLLM_BLOCK_TOKENS,
    check_kvc,
    common_body,
    request_body,
    request_headers,
    system,
)
from benchmark.serving.workloads import (  # noqa: E402
    CONTEXT_TOKENS,
    LONGEST_OUTPUT_TOKENS,
    LONGEST_PROMPT_TOKENS,
    MAX_TOKENS,
    WORKLOADS,
    Request,
    generate,
    rate_rps,
)
from econoserve.core.types import Slo  # noqa: E402

VOCABULARY = Vocabulary(tuple(range(6, 500)), (2,))


def request(tokens):
    slo = Slo(ttft_s=0.5, tpot_s=0.1)
    return Request((6,) * 20, tokens, 0.0, slo, "chat")


@pytest.mark.parametrize("name", WORKLOADS)
def test_requests_are_the_same_for_a_seed_and_fit_the_servers(name):
    workload = WORKLOADS[name]
    requests = generate(workload, 60, 5.0, 3, VOCABULARY, trace=None)
    assert requests == generate(workload, 60, 5.0, 3, VOCABULARY, trace=None)
    assert requests != generate(workload, 60, 5.0, 4, VOCABULARY, trace=None)
    assert requests[0].arrival_s == 0.0
    assert requests == sorted(requests, key=lambda one: one.arrival_s)
    assert all(1 <= len(one.prompt_ids) <= LONGEST_PROMPT_TOKENS for one in requests)
    assert all(1 <= one.output_tokens <= LONGEST_OUTPUT_TOKENS for one in requests)
    assert {token for one in requests for token in one.prompt_ids} <= set(VOCABULARY.prompt_ids)
    assert LONGEST_OUTPUT_TOKENS < MAX_TOKENS
    assert LONGEST_PROMPT_TOKENS + MAX_TOKENS <= CONTEXT_TOKENS <= min(KVC_TOKENS.values())


def test_another_rate_only_moves_the_arrivals():
    slow, fast = (
        generate(WORKLOADS["classes"], 40, rate, 3, VOCABULARY, trace=None) for rate in (1.0, 4.0)
    )
    assert [replace(one, arrival_s=0.0) for one in slow] == [
        replace(one, arrival_s=0.0) for one in fast
    ]
    assert slow[-1].arrival_s == pytest.approx(4 * fast[-1].arrival_s)


def test_runs_of_a_server_share_no_prompts():
    settings = Settings(requests=40)
    cells = [Cell(0, "tight", NAMES[0], name, load) for name in WORKLOADS for load in (0.4, 0.8)]
    seen: set[tuple[int, ...]] = set()
    for cell in cells:
        long = {
            one.prompt_ids[:64]
            for one in settings.requests_of(cell, VOCABULARY)
            if len(one.prompt_ids) >= 64
        }
        assert long and not long & seen
        seen |= long


def test_systems_get_the_same_requests():
    settings = Settings(requests=5)
    first = settings.requests_of(Cell(1, "tight", NAMES[0], "azure", 0.8), VOCABULARY)
    assert first == settings.requests_of(Cell(1, "tight", NAMES[1], "azure", 0.8), VOCABULARY)
    assert first != settings.requests_of(Cell(2, "tight", NAMES[0], "azure", 0.8), VOCABULARY)


def test_workloads_with_long_objectives_arrive_for_longer():
    settings = Settings(arrivals_s=15.0)
    for workload in WORKLOADS.values():
        assert settings.count(workload, 4.0) == 60 * workload.span
        longest_s = max(one.slo.e2e_s or 0.0 for one in workload.classes)
        assert longest_s <= workload.span * settings.arrivals_s / 3


def test_conversations_are_whole_and_keep_the_traces_order(tmp_path):
    # Six turns of each of 50 conversations, one turn of all after the other.
    turns = [
        {"input_length": 512 * (2 + turn), "output_length": 10 + 2 * number}
        | {"hash_ids": [0, *range(100 * number + 1, 100 * number + 2 + turn)]}
        for turn in range(6)
        for number in range(50)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in turns))
    requests = generate(WORKLOADS["mooncake"], 24, 5.0, 3, VOCABULARY, trace=trace)
    conversations = {}
    for request in requests:
        conversations.setdefault(request.output_tokens, []).append(request.prompt_ids)
    assert len(conversations) == 4
    for turns_of_one in conversations.values():
        assert [len(prompt) for prompt in turns_of_one] == [16 * (2 + turn) for turn in range(6)]
        for earlier, later in itertools.pairwise(turns_of_one):
            assert later[: len(earlier)] == earlier
    others = generate(WORKLOADS["mooncake"], 24, 5.0, 4, VOCABULARY, trace=trace)
    assert {one.output_tokens for one in others} != set(conversations)
    # A trace that is too short begins again.
    assert len(generate(WORKLOADS["mooncake"], 310, 5.0, 3, VOCABULARY, trace=trace)) == 310


def test_shared_prefixes_are_shared_with_and_without_a_trace(tmp_path):
    rows = [
        {"input_length": 512 * 5, "output_length": 40 + n, "hash_ids": [0, 1, 2, 3, 10 + n]}
        for n in range(8)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    requests = generate(WORKLOADS["mooncake"], 8, 5.0, 3, VOCABULARY, trace=trace)
    assert len({one.prompt_ids[:64] for one in requests}) == 1
    assert len({one.prompt_ids[64:] for one in requests}) == 8
    assert [len(one.prompt_ids) for one in requests] == [80] * 8
    assert [one.output_tokens for one in requests] == [round((40 + n) / 2) for n in range(8)]
    drawn = generate(WORKLOADS["mooncake"], 60, 5.0, 3, VOCABULARY, trace=None)
    assert len({one.prompt_ids[:10] for one in drawn}) < 30 < len({one.prompt_ids for one in drawn})


def test_objectives_depend_on_the_class_only():
    requests = generate(WORKLOADS["classes"], 50, 5.0, 3, VOCABULARY, slo_scale=2.0)
    slos = {(one.service_class, one.slo) for one in requests}
    assert slos == {
        ("interactive", Slo(ttft_s=0.5, tpot_s=0.03)),
        ("batch", Slo(e2e_s=20.0)),
    }


def test_load_is_in_proportion_to_the_rate():
    workload = WORKLOADS["sharegpt"]
    for kvc in KVC_TOKENS:
        low, high = (rate_rps(workload, load, kvc) for load in (0.4, 1.6))
        assert high == pytest.approx(4 * low, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_no_request_states_its_length_where_a_scheduler_reads(name):
    sent = [request(tokens) for tokens in (7, 300)]
    bodies = [
        {**common_body(name, "model", "processor"), **request_body(name, one, (2,))} for one in sent
    ]
    hidden = "vllm_xargs" if name == "vllm" else "custom_params"
    assert [body.pop(hidden)["benchmark_length"] for body in bodies] == [7, 300]
    assert bodies[0] == bodies[1]
    assert bodies[0]["max_tokens"] == MAX_TOKENS
    assert "ignore_eos" not in bodies[0]
    assert (
        request_headers(sent[0])
        == request_headers(sent[1])
        == {
            "x-slo-ttft-ms": "500",
            "x-slo-tpot-ms": "100",
        }
    )


def test_vllm_ends_responses_by_the_rule_of_the_others():
    """The module imports vLLM; its decision only needs rows and counts."""
    source = (ROOT / "benchmark/serving/vllm_lengths.py").read_text()
    for field in ("benchmark_length", "benchmark_eos"):
        assert f'"{field}"' in source
        assert field in request_body("vllm", request(11), (2,))["vllm_xargs"]
    assert f"benchmark.serving.vllm_lengths:{'EndOnTime'}" in system("vllm").arguments.values()
    assert "class EndOnTime" in source


def test_servers_start_on_equal_terms():
    check_kvc()
    lines = {name: server_command(system(name), Path("m"), 8192, 1) for name in NAMES}

    def value(name, flag):
        return lines[name][lines[name].index(flag) + 1]

    assert {value(name, "--dtype") for name in NAMES} == {"bfloat16"}
    for name in ("econoserve", "sglang"):
        assert value(name, "--max-total-tokens") == "8192"
        assert value(name, "--context-length") == str(CONTEXT_TOKENS)
        assert value(name, "--max-running-requests") == value("vllm", "--max-num-seqs")
    assert value("vllm", "--block-size") == str(VLLM_BLOCK_TOKENS)
    blocks = int(value("vllm", "--num-gpu-blocks-override"))
    assert (blocks - 1) * VLLM_BLOCK_TOKENS == 8192  # vLLM keeps its first block empty
    assert value("vllm", "--max-model-len") == str(CONTEXT_TOKENS)
    same_engine = [
        line[3:] for line in (lines["econoserve"], lines["sglang"])
    ]  # after interpreter and module
    assert same_engine[0] == same_engine[1]
    policy = server_command(system("econoserve:vllm"), Path("m"), 8192, 1)
    assert policy[policy.index("--econoserve-policy") + 1] == "vllm"
    assert "econoserve.launch_server" in policy
    for wrong in ("orca", "sglang:vllm"):
        with pytest.raises(ValueError, match=wrong):
            system(wrong)
