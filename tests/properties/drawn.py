"""What the tests of the policies draw: requests, configurations, and machines less kind."""

from hypothesis import strategies as st
from machine import Request, World
from prefixes import Segment

from econoserve.core.cost import TfsConfig
from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.core.late import Late
from econoserve.core.lengths import LengthPrediction
from econoserve.core.nested import Nesting
from econoserve.core.order import LengthOrder, Order, OrderConfig
from econoserve.core.types import Slo
from econoserve.core.victims import VictimConfig
from econoserve.policies.econoserve import EconoServeConfig

CAPACITY = 200

SLOS = (Slo(), Slo(ttft_s=0.2), Slo(e2e_s=1.0), Slo(tpot_s=0.02))


def exact(tokens):
    return LengthPrediction((tokens,), level=1.0, cap_tokens=tokens)


worlds = st.builds(
    World,
    rows=st.sampled_from((1, 2, 3, 5, 256)),
    skips=st.none() | st.integers(0, 99),
    timed=st.booleans(),
    cached=st.booleans(),
)
"""Machines with few rows, that leave out parts of a plan, and so on."""

followers = st.builds(
    World, rows=st.sampled_from((1, 3, 256)), timed=st.booleans(), cached=st.booleans()
)
"""The same, but they follow the plan."""


orders = st.builds(
    OrderConfig,
    order=st.sampled_from(Order),
    length_order=st.sampled_from(LengthOrder),
    window_s=st.sampled_from((0.05, 1.0)),
)
kvcs = st.builds(
    KvcConfig,
    mode=st.sampled_from(KvcMode),
    reserve_fraction=st.sampled_from((0.0, 0.02, 0.2)),
    lead_tokens=st.sampled_from((0, 8)),
    buffer_tokens=st.sampled_from((0, 2)),
    nesting=st.sampled_from(Nesting),
    risk=st.sampled_from((0.01, 0.4)),
)
configs = st.builds(
    EconoServeConfig,
    capacity_tokens=st.just(CAPACITY),
    kvc=kvcs,
    order=orders,
    tfs=st.integers(1, 128).map(TfsConfig) | st.just(TfsConfig(limits_tokens=(8, 256))),
    parked_fraction=st.sampled_from((0.0, 0.2, 0.8)),
    late=st.sampled_from(Late),
    victims=st.sampled_from((VictimConfig(), VictimConfig(offload_s_per_token=1e-9))),
    starvation_s=st.sampled_from((0.05, 30.0)),
)


@st.composite
def paths(draw, prompt):
    """The beginning of a prompt that others share: a root, and a branch of it."""
    path = ()
    for size in (40, 20):
        if prompt <= sum(segment.tokens for segment in path) + size or draw(st.booleans()):
            break
        parent = path[-1].name if path else "root"
        path += (Segment(f"{parent}/{draw(st.integers(0, 1))}", size),)
    return path


ALWAYS = st.just(True)


@st.composite
def workloads(draw, most=25, wrong=False, spare=0, parkable=ALWAYS, slos=SLOS):
    """Requests whose lengths are known, or wrongly predicted; ``spare`` KVC is left by each."""
    requests = []
    for number in range(draw(st.integers(1, most))):
        prompt = draw(st.integers(1, 120))
        true = draw(st.integers(1, min(100, CAPACITY - spare - prompt - 1)))
        prediction = exact(true)
        if wrong:
            quantiles = draw(st.lists(st.integers(1, 120), max_size=6).map(sorted))
            level = draw(st.sampled_from((0.3, 0.8, 1.0)))
            prediction = LengthPrediction(tuple(quantiles), level, CAPACITY - prompt - 1)
        slo = draw(st.sampled_from(slos))
        arrival = draw(st.integers(0, 60))
        requests.append(
            Request(
                f"r{number}",
                arrival,
                prompt,
                true,
                prediction,
                slo,
                parkable=draw(parkable),
                path=draw(paths(prompt)),
            )
        )
    return requests


def work(requests):
    return sum(request.prompt_tokens + request.true_tokens for request in requests)


def run_some(machine, steps):
    for _ in range(steps):
        if machine.alive():
            machine.step()
