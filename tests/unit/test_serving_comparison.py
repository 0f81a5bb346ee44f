"""The servers' comparison: what is read from runs at a few rates, and what is only a bound."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark.paper.claims import Reach
from benchmark.serving.comparison import (
    Attained,
    attained,
    compare,
    goodput_ratio,
    uneven,
)
from benchmark.serving.summary import table, targets

PEERS = ("sglang", "vllm")


def runs(system, ssr, *, jct_s=(1.0, 1.0), kvc="tight", served=10, workload="azure"):
    """A run at 4 and one at 8 requests per second."""
    return [
        {
            "workload": workload,
            "kvc": kvc,
            "system": system,
            "load": rate / 10,
            "rate_rps": rate,
            "repeat": 0,
            "ssr": share,
            "requests": 10,
            "served": served,
            "mean_jct_s": mean_s,
            "p99_jct_s": 3 * mean_s,
            "mean_normalised_latency_s": mean_s / 100,
        }
        for rate, share, mean_s in zip((4.0, 8.0), ssr, jct_s, strict=True)
    ]


def test_goodput_is_read_between_rates_and_a_bound_beyond_them():
    between = attained([(4.0, 0.5), (2.0, 1.0)])
    assert between == Attained(pytest.approx(2.4), 2.0, 4.0)
    assert between.reach is Reach.EXACT
    none = attained([(2.0, 0.8), (4.0, 0.1)])
    assert none == Attained(2.0, 0.0, 2.0)  # no straight line to an SSR that nobody measured
    assert none.reach is Reach.AT_MOST
    every = attained([(2.0, 0.95), (4.0, 0.9)])
    assert every == Attained(4.0, 4.0, math.inf)
    assert every.reach is Reach.AT_LEAST
    assert attained([(2.0, 0.4), (4.0, 1.0)]).low_rps == 0.0  # the first fall counts


def test_a_ratio_of_bounds_is_a_bound_or_nothing():
    exact, low, high = Attained(6.0, 4.0, 8.0), Attained(4.0, 0.0, 4.0), Attained(8, 8, math.inf)
    assert goodput_ratio(exact, exact).least == 0.5
    assert goodput_ratio(exact, exact).reach is Reach.EXACT
    assert (goodput_ratio(exact, low).value, goodput_ratio(exact, low).reach) == (
        1.5,
        Reach.AT_LEAST,
    )
    assert goodput_ratio(high, exact).reach is goodput_ratio(high, low).reach is Reach.AT_LEAST
    assert goodput_ratio(high, low).least == 2.0
    assert goodput_ratio(exact, high).reach is goodput_ratio(low, exact).reach is Reach.AT_MOST
    assert goodput_ratio(low, high).reach is Reach.AT_MOST
    assert goodput_ratio(exact, high).least == 0.0
    assert goodput_ratio(low, low) is goodput_ratio(high, high) is None


def test_we_are_compared_with_the_better_peer():
    records = [
        *runs("econoserve", (1.0, 0.95), jct_s=(1.0, 2.0)),
        *runs("sglang", (1.0, 0.8), jct_s=(0.5, 4.0)),
        *runs("vllm", (0.5, 0.2), jct_s=(2.0, 3.0)),
    ]
    (found,) = compare(records, "econoserve", PEERS)
    assert found.peer == "sglang"
    assert found.by_system["sglang"].rate_rps == pytest.approx(6.0)
    assert found.goodput.value == pytest.approx(8.0 / 6.0)
    assert found.goodput.reach is Reach.AT_LEAST
    assert found.saturated_rps == 8.0  # where both peers miss it
    assert found.jct == pytest.approx(2.0 / 3.0)
    assert (found.throughput.value, found.throughput.reach) == (1.0, Reach.AT_LEAST)
    assert found.p99_jct == pytest.approx(2.0)  # at 4 per second, which SGLang serves well


def test_throughput_is_compared_at_equal_latency():
    records = [
        *runs("econoserve", (1.0, 0.95), jct_s=(1.0, 4.0)),
        *runs("sglang", (1.0, 0.8), jct_s=(1.0, 2.0)),
    ]
    (found,) = compare(records, "econoserve", PEERS)
    assert found.throughput.value == pytest.approx(6.0 / 8.0)  # the logarithm is linear
    assert found.throughput.reach is Reach.EXACT


def test_means_without_the_requests_that_were_not_served_are_not_compared():
    records = [
        *runs("econoserve", (1.0, 0.95), served=9),
        *runs("sglang", (1.0, 0.8)),
    ]
    (found,) = compare(records, "econoserve", PEERS)
    assert found.goodput is not None
    assert found.jct is found.throughput is found.p99_jct is None


def test_nothing_is_compared_without_a_peer():
    (found,) = compare(runs("econoserve", (1.0, 0.5)), "econoserve", PEERS)
    assert found.by_system["econoserve"].rate_rps == pytest.approx(4.8)
    assert found.goodput is found.jct is found.peer is None
    assert "-" in table([found], ["econoserve"])


def test_systems_that_lack_runs_are_told():
    records = [*runs("econoserve", (1.0, 0.5)), *runs("vllm", (1.0, 0.5))[:1]]
    assert uneven(records) == ["vllm lacks 1 of 2 runs"]


def test_targets_say_how_much_they_rest_on_bounds():
    records = []
    for kvc, ours, theirs in (
        ("very-tight", (1.0, 0.95), (1.0, 0.8)),
        ("tight", (1.0, 0.8), (1.0, 0.8)),
        ("ample", (1.0, 1.0), (1.0, 0.95)),
    ):
        records += runs("econoserve", ours, kvc=kvc) + runs("sglang", theirs, kvc=kvc)
    found = compare(records, "econoserve", PEERS)
    goodput, ample, jct, p99 = targets(found)
    assert f"{math.sqrt(8 / 6):.2f} (target" in goodput
    assert "2 of 2 settings, 1 lower bounds among them" in goodput
    assert goodput.endswith(f"at least {math.sqrt(1.0 * 0.5):.2f}")
    assert "-" in ample
    assert "0 of 1 settings" in ample  # both serve every rate
    assert "2 of 3 settings" in jct
    assert "greatest: 1.00" in p99
    page = table(found, ["econoserve", "sglang"])
    assert "\u2265 8.00" in page
    assert "6.00 (4-8)" in page
