"""Many requests at once in a small KV cache: all are served, and what they took comes back."""

import random

from live_server import KVC_TOKENS
from traffic import Answer, Planned, mixed, prompt_ids, stream_all

COUNTERS = (
    "total_parked",
    "total_resumed",
    "total_chunked",
    "total_mixed_batches",
    "total_allocation_failures",
    "total_planning_errors",
)


def test_sixty_streams_share_a_small_cache(server):
    before = server.state()
    plans = mixed(seed=7, count=60)
    held = sum(len(plan.prompt_ids) + plan.output_tokens for plan in plans)
    assert held > 4 * before["capacity_tokens"], "the load would fit at once"
    answers = stream_all(server, plans)
    for plan, answer in zip(plans, answers, strict=True):
        assert (answer.output_tokens, answer.finish_reason) == (plan.output_tokens, "length")
    server.assert_drained()
    after = server.state()
    counted = {name: after[name] - before[name] for name in COUNTERS}
    assert counted["total_parked"] > 0, counted
    assert counted["total_resumed"] > 0, counted
    assert counted["total_chunked"] > 0, counted
    assert counted["total_mixed_batches"] > 0, counted
    assert counted["total_allocation_failures"] == 0, counted
    assert counted["total_planning_errors"] == 0, counted

    # Waiting with one's KV, and sharing passes with others, must not change a word.
    short = [index for index, plan in enumerate(plans) if plan.output_tokens <= 20][:6]
    alone: list[Answer] = [stream_all(server, [plans[index]])[0] for index in short]
    assert alone == [answers[index] for index in short]


def test_prompt_as_large_as_the_cache_is_served_among_others(server):
    large = Planned(prompt_ids(random.Random(1), KVC_TOKENS - 24), 12)
    plans = [*mixed(seed=2, count=10), large, *mixed(seed=3, count=10)]
    for plan, answer in zip(plans, stream_all(server, plans), strict=True):
        assert (answer.output_tokens, answer.finish_reason) == (plan.output_tokens, "length")
