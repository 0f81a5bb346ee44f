"""Mode ``skyline`` with a risk level: the moments, the grid, and the level itself."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model import claims, open_claims

from econoserve.core.risk import CELLS, RiskLedger
from econoserve.core.skyline import SkylineLedger

CAPACITY = 300


distributions = st.lists(
    st.tuples(
        st.integers(0, 60), st.lists(st.integers(1, 100), min_size=4, max_size=4).map(sorted)
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200)
@given(distributions, st.integers(0, 14))
def test_risk_knows_mean_and_variance_of_the_occupancy(drawn, steps):
    ledger = RiskLedger(10_000, points=4)
    for number, (held, outcomes) in enumerate(drawn):
        ledger.take(f"c{number}", held)
        ledger.promise(f"c{number}", response=tuple(outcomes))
        ledger.start(f"c{number}")
    ledger.trial(0)
    survivors = [
        (held + steps, [end - steps for end in outcomes if end >= steps])
        for held, outcomes in drawn
        if outcomes[-1] > steps
    ]
    for number, (_, outcomes) in enumerate(drawn):
        if outcomes[-1] <= steps:
            ledger.close(f"c{number}")
    for _ in range(steps):
        ledger.advance(tuple(f"c{n}" for n, (_, ends) in enumerate(drawn) if ends[-1] > steps))
    ledger.trial(0)
    grid, ((mean, variance),) = ledger.occupancy()
    before = ledger.step
    for index, (end, mean_tokens, variance_tokens2) in enumerate(
        zip(grid, mean, variance, strict=True)
    ):
        exact_mean = exact_variance = 0.0
        for held, ends in survivors:
            alive = sum(left > before - ledger.step for left in ends) / len(ends)
            alive = 1.0 if index == 0 else alive
            size = held + end - ledger.step
            exact_mean += alive * size
            exact_variance += alive * (1 - alive) * size * size
        assert mean_tokens == pytest.approx(exact_mean, abs=1e-6)
        assert variance_tokens2 == pytest.approx(exact_variance, rel=1e-6, abs=1e-3)
        before = end


@settings(max_examples=300)
@given(claims, st.integers(0, 60), st.integers(1, 80))
def test_with_certain_lengths_risk_is_the_skyline(simple, tokens, length):
    risk, skyline = RiskLedger(CAPACITY), SkylineLedger(CAPACITY)
    used = open_claims(risk, simple)
    open_claims(skyline, simple)
    assert risk.trial(used).headroom_tokens == skyline.trial(used).headroom_tokens
    if risk.trial(used).fits(tokens, (length,) * risk.points):
        assert skyline.trial(used).fits(tokens, (length,))
    elif length in {claim.left - 1 for claim in simple if claim.decodes}:
        # Its end is a point of the grid, so nothing is rounded.
        assert not skyline.trial(used).fits(tokens, (length,))


def test_a_coarse_grid_admits_little_less():
    skyline, risk = SkylineLedger(100_000), RiskLedger(100_000)
    draw = random.Random(3)
    for number in range(4 * CELLS):
        held, left = draw.randint(50, 300), draw.randint(1, 500)
        for ledger in (skyline, risk):
            ledger.take(f"c{number}", held)
            ledger.promise(f"c{number}", response=(left,) * ledger.points)
            ledger.start(f"c{number}")
    exact, coarse = (ledger.trial(0).headroom_tokens for ledger in (skyline, risk))
    assert 0.97 * exact < coarse <= exact


DRAWS = 20_000
SIGMAS = 4
"""By so many standard deviations a rate may exceed its expectation at any of some 400 steps."""


def full(ledger, response):
    """How many claims of 60 tokens with such a response a ledger admits."""
    number = 0
    while ledger.trial(60 * number).fits(60, response):
        ledger.take(f"c{number}", 60)
        ledger.promise(f"c{number}", response=response)
        ledger.start(f"c{number}")
        number += 1
    return number


def overflow_rates(lengths, number, capacity, seed):
    """How often the occupancy exceeds the capacity at each step, over draws of all lengths."""
    ends = np.random.default_rng(seed).choice(lengths, (DRAWS, number))
    return [
        float(((ends >= step).sum(axis=1) * (60 + step) > capacity).mean())
        for step in {*lengths[:: len(lengths) // 8], *range(1, max(lengths), 5)}
    ]


@pytest.mark.parametrize("risk", [0.01, 0.1])
def test_at_each_step_the_risk_is_no_more_than_chosen_and_not_much_less(risk):
    draw = random.Random(7)
    lengths = sorted(int(draw.lognormvariate(4.5, 0.8)) + 1 for _ in range(4000))
    response = tuple(lengths[(2 * i + 1) * len(lengths) // 16] for i in range(8))
    ledger = RiskLedger(20_000, risk=risk)
    number = full(ledger, response)
    bound = risk + SIGMAS * math.sqrt(risk * (1 - risk) / DRAWS)
    as_promised = max(overflow_rates(response, number, ledger.capacity_tokens, seed=1))
    assert risk / 3 < as_promised <= bound
    # The ledger knows eight outcomes; the true distribution lies within their steps.
    assert max(overflow_rates(lengths, number, ledger.capacity_tokens, seed=2)) <= bound
