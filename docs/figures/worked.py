"""Small examples of what the scheduling core decides, worked out by its own classes.

Owns the numbers behind docs/scheduling.md, and nothing of how they are drawn.
"""

import itertools
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from econoserve.core.cost import CostModel, TfsConfig
from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.core.ledger import Ledger
from econoserve.core.lengths import LengthPrediction
from econoserve.core.nested import NestedLedger, Nesting
from econoserve.core.trial import Trial


@dataclass(frozen=True, slots=True)
class Held:
    """A claim of the first example.

    Attributes:
        name: of the request.
        held_tokens: KVC that it holds.
        response_tokens: predicted RL still to come; 0 for a parked prompt.
    """

    name: str
    held_tokens: int
    response_tokens: int


CAPACITY = 100
CLAIMS = (Held("A", 14, 32), Held("B", 18, 8), Held("C", 10, 4), Held("P", 8, 0))
CANDIDATES = (Held("1", 4, 2), Held("2", 4, 12), Held("3", 20, 20), Held("4", 34, 20))
REFUSED = Held("5", 40, 20)
SPREAD = (0.5, 0.7, 0.85, 1.0, 1.1, 1.25, 1.45, 1.8)
"""Eight equally likely lengths in relation to the predicted one, which is their lower median."""


def prediction(response_tokens: int) -> LengthPrediction:
    """A prediction around a length.

    Args:
        response_tokens: the RL predicted at level 0.5.

    Returns:
        The distribution.
    """
    lengths = tuple(max(round(response_tokens * share), 1) for share in SPREAD)
    return LengthPrediction(lengths, level=0.5, cap_tokens=1000)


def first_ledger(config: KvcConfig) -> tuple[Ledger, int]:
    """The ledger of the first example.

    Args:
        config: what it admits.

    Returns:
        The ledger with ``CLAIMS``, and the KVC in use.
    """
    ledger = config.ledger(CAPACITY)
    for claim in CLAIMS:
        ledger.take(claim.name, claim.held_tokens)
        if claim.response_tokens:
            response = prediction(claim.response_tokens).outcomes(0, ledger.points)
            ledger.promise(claim.name, 0, response)
            ledger.start(claim.name)
    return ledger, ledger.held_tokens


def room_after(config: KvcConfig, candidate: Held) -> int:
    """What is left at the tightest moment once a candidate is admitted.

    Args:
        config: what the ledger admits.
        candidate: a prompt and its predicted RL.

    Returns:
        Tokens; negative where the ledger refuses it.
    """
    ledger, used_tokens = first_ledger(config)
    trial: Trial = ledger.trial(used_tokens)
    response = prediction(candidate.response_tokens).outcomes(0, ledger.points)
    fits = trial.fits(candidate.held_tokens, response)
    trial.take(candidate.name, candidate.held_tokens, response)
    if fits != (trial.headroom_tokens >= 0):
        raise AssertionError(f"{config}: what fits {candidate} is not what it leaves")
    return trial.headroom_tokens


@dataclass(frozen=True, slots=True)
class Stay:
    """A claim in another's promise, as it is drawn.

    Attributes:
        start: step at which it begins.
        length: tokens that it takes, one a step.
        bottom: lowest of the slots that it is drawn in.
        depth: guests between it and the owner, and one; 0 for the owner.
    """

    start: int
    length: int
    bottom: float
    depth: int


def nest(nesting: Nesting, length: int) -> tuple[list[Stay], float]:
    """One response with slots of its own, and always the longest guest that the ledger admits.

    Args:
        nesting: how far promises are shared.
        length: RL of the owner, also the size of the KVC.

    Returns:
        The stays, and the mean use of the promise in the owner's time.
    """
    ledger = NestedLedger(length, buffer_tokens=0, nesting=nesting)
    ledger.promise("owner", 0, (length,))
    ledger.start("owner")
    stays = {"owner": Stay(0, length, 0.0, 0)}
    used = 0.0
    for step in range(length):
        while guest := next(
            (
                tokens
                for tokens in range(length // 2, 0, -1)
                if ledger.trial(ledger.held_tokens).count((tokens,), 1)
            ),
            0,
        ):
            rid = f"guest {len(stays)}"
            ledger.promise(rid)
            host = ledger.trial(ledger.held_tokens).start(rid, (guest,))
            ledger.promise(rid, 0, (guest,), host)
            ledger.start(rid)
            inn = stays[ledger[rid].host]
            # Drawn in the upper half of what its host has still to take.
            bottom = inn.bottom + inn.length - (inn.start + inn.length - step) / 2
            stays[rid] = Stay(step, guest, bottom, inn.depth + 1)
        alive = [rid for rid in stays if rid in ledger]
        before = ledger.held_tokens
        ledger.advance(alive)
        used += (before + ledger.held_tokens) / 2
        for rid in alive:
            if stays[rid].start + stays[rid].length == ledger.step:
                ledger.close(rid)
    return list(stays.values()), used / length**2


def lognormal(median_tokens: int, sigma: float = 0.5, points: int = 64) -> tuple[int, ...]:
    """The lengths of one kind of request.

    Args:
        median_tokens: half of them are shorter.
        sigma: standard deviation of the logarithm.
        points: how many.

    Returns:
        Equally likely lengths, ascending.
    """
    levels = (NormalDist().inv_cdf((point + 0.5) / points) for point in range(points))
    return tuple(max(round(median_tokens * math.exp(sigma * level)), 1) for level in levels)


KINDS = (40, 80, 160, 320)
"""Median RLs of the four kinds of requests."""

BURST_CAPACITY = 8000
OUTLOOK_STEPS = 520


@dataclass(frozen=True, slots=True)
class Outlook:
    """The occupancy that a ledger with risk expects, and what it is by full enumeration.

    Attributes:
        risk: that the ledger accepts.
        z: standard deviations that stand for it.
        grid: last step of each cell.
        mean: the ledger's mean in each cell, in tokens.
        margin: its mean plus z standard deviations.
        steps: from now on.
        exact_mean: the mean at each step.
        exact_bound: what the occupancy exceeds with that risk, at each step.
        by_median: the skyline over predicted lengths at level 0.5.
        by_mean: the skyline over mean lengths.
    """

    risk: float
    z: float
    grid: np.ndarray
    mean: np.ndarray
    margin: np.ndarray
    steps: np.ndarray
    exact_mean: np.ndarray
    exact_bound: np.ndarray
    by_median: np.ndarray
    by_mean: np.ndarray


def mixed(number: int, level: float) -> tuple[int, LengthPrediction]:
    """A request of a burst of four kinds.

    Args:
        number: in the burst.
        level: at which one length is promised.

    Returns:
        Its prompt tokens and what is known of its RL.
    """
    lengths = lognormal(KINDS[number % len(KINDS)])
    return 20 + 23 * number % 100, LengthPrediction(lengths, level, cap_tokens=2000)


def fill(config: KvcConfig, level: float) -> tuple[Ledger, int]:
    """Let a burst begin in an empty KVC, until one does not fit.

    Args:
        config: what the ledger admits.
        level: at which one length is promised.

    Returns:
        The ledger and how many decode.
    """
    ledger = config.ledger(BURST_CAPACITY)
    for number in itertools.count():
        prompt_tokens, known = mixed(number, level)
        response = known.outcomes(0, ledger.points)
        if not ledger.trial(ledger.held_tokens).fits(prompt_tokens, response):
            return ledger, number
        ledger.take(str(number), prompt_tokens)
        ledger.promise(str(number), 0, response)
        ledger.start(str(number))
    raise AssertionError("a burst has no end")


def occupancy(claims: list[tuple[int, np.ndarray]], step: int) -> np.ndarray:
    """The distribution of what claims hold, by enumeration.

    Args:
        claims: tokens held at step 0, and equally likely lengths, of each.
        step: when.

    Returns:
        The probability of each number of tokens.
    """
    chance = np.ones(1)
    for held, lengths in claims:
        alive, size = float((lengths >= step).mean()), held + step
        more = np.zeros(len(chance) + size)
        more[: len(chance)] += (1 - alive) * chance
        more[size:] += alive * chance
        chance = more
    return chance


def overflow(count: int) -> float:
    """How likely the first of a burst exceed the KVC at the worst step, with nobody behind them.

    Args:
        count: how many of them run.

    Returns:
        A probability.
    """
    claims = []
    for number in range(count):
        prompt_tokens, known = mixed(number, 0.5)
        claims.append((prompt_tokens, np.array(known.quantiles_tokens)))
    steps = range(0, max(KINDS), 8)
    return max(float(occupancy(claims, step)[BURST_CAPACITY + 1 :].sum()) for step in steps)


def outlook() -> Outlook:
    """Fill a ledger with risk, and compare it with an enumeration of the same claims.

    Returns:
        What it expects.
    """
    config = KvcConfig(KvcMode.RISK, reserve_fraction=0.0)
    ledger, count = fill(config, 0.5)
    grid, ((mean, variance),) = ledger.occupancy()
    steps = np.arange(0, OUTLOOK_STEPS + 1, 2)
    bursts = [mixed(number, 0.5) for number in range(count)]
    claims = [(held, np.array(known.outcomes(0, ledger.points))) for held, known in bursts]
    exact_mean, bound = [], []
    for step in steps:
        alive = [(lengths >= step).mean() * (held + step) for held, lengths in claims]
        exact_mean.append(float(sum(alive)))
        chance = occupancy(claims, int(step))
        bound.append(int(chance.cumsum().searchsorted(1 - config.risk)))
    return Outlook(
        config.risk,
        ledger.z,
        grid,
        mean,
        mean + ledger.z * np.sqrt(variance),
        steps,
        np.array(exact_mean),
        np.array(bound),
        sum(np.where(steps <= known.tokens, held + steps, 0) for held, known in bursts),
        sum(np.where(steps <= known.mean_tokens, held + steps, 0) for held, known in bursts),
    )


def renewals() -> list[tuple[int, int]]:
    """What a response is promised that goes on and on.

    Returns:
        Tokens that are out, and the RL promised then.
    """
    _, known = mixed(2, 0.5)
    asked = [(0, known.tokens)]
    while len(asked) < 5:
        out = asked[-1][1] - KvcConfig().lead_tokens
        asked.append((out, known.given(out)))
    return asked


def target(decoding: int, context_tokens: int, tpot_s: float | None) -> int:
    """The TFS that the first cost model leads to.

    Args:
        decoding: requests that decode.
        context_tokens: their context.
        tpot_s: the tightest TPOT objective among them, if any.

    Returns:
        Tokens.
    """
    slack_s = math.inf if tpot_s is None else tpot_s
    return TfsConfig().tokens(CostModel(), decoding, context_tokens, slack_s)
