"""Lengths like those of ShareGPT's conversations, by formula.

Owns the two distributions; they are ours, fitted by eye to what is published about that trace: a
mean prompt near 160 tokens, a mean response near 340, both with a long tail.
"""

import math
from collections.abc import Sequence

import numpy as np

from benchmark.scheduler_comparison.workload import Request

PROMPT_MEDIAN_TOKENS = 80
PROMPT_SIGMA = 1.2
OUTPUT_MEDIAN_TOKENS = 230
OUTPUT_SIGMA = 0.9
LEAST_TOKENS = 4
LONGEST_TOKENS = 1024


def draw_requests(
    count: int, scale: float, rate_per_s: float, token_ids: Sequence[int], seed: int
) -> list[Request]:
    """Draw the requests of a run.

    Args:
        count: how many.
        scale: all lengths are multiplied by it, for slow machines.
        rate_per_s: mean arrivals per second, or infinity for a burst at time 0.
        token_ids: tokens that prompts are made of.
        seed: of all random numbers.

    Returns:
        The requests in the order of their arrival, without SLOs.
    """
    rng = np.random.default_rng(seed)

    def lengths(median: float, sigma: float) -> list[int]:
        drawn = np.clip(rng.lognormal(math.log(median), sigma, count), None, LONGEST_TOKENS)
        return np.maximum(np.rint(drawn * scale), LEAST_TOKENS).astype(int).tolist()

    prompts = lengths(PROMPT_MEDIAN_TOKENS, PROMPT_SIGMA)
    outputs = lengths(OUTPUT_MEDIAN_TOKENS, OUTPUT_SIGMA)
    if math.isinf(rate_per_s):
        arrivals = [0.0] * count
    else:
        arrivals = np.cumsum(rng.exponential(1 / rate_per_s, count)).tolist()
    choices = np.asarray(token_ids)
    return [
        Request(tuple(rng.choice(choices, prompt).tolist()), output, arrival)
        for prompt, output, arrival in zip(prompts, outputs, arrivals, strict=True)
    ]


def longest_output_tokens(scale: float) -> int:
    """The longest response there can be.

    Args:
        scale: factor on all lengths.

    Returns:
        Tokens.
    """
    return max(round(LONGEST_TOKENS * scale), LEAST_TOKENS)
