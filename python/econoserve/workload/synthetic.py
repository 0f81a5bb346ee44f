"""Lengths drawn from published statistics, for runs without any trace file.

Owns the drawing; the statistics and their sources are in ``synthetic.json``. Between the stated
quantiles the logarithm of a length is linear in the normal score, so that two quantiles make a
log-normal distribution. Beyond the last ones it goes on likewise, up to the stated limits.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import NormalDist

import numpy as np

from econoserve.prediction.request import RequestFeatures
from econoserve.workload.trace import CAP_TOKENS, TraceError, TraceRequest


@dataclass(frozen=True, slots=True)
class LengthQuantiles:
    """A distribution of lengths, by its quantiles.

    Attributes:
        scores: normal scores of the quantiles' levels, ascending, at least two.
        tokens: the quantiles.
        limits_tokens: least and greatest length.
    """

    scores: tuple[float, ...]
    tokens: tuple[float, ...]
    limits_tokens: tuple[int, int]

    @classmethod
    def of(cls, quantiles: dict[str, float], limits_tokens: list[int]) -> "LengthQuantiles":
        """From what a file says.

        Args:
            quantiles: lengths in tokens by level, such as ``{"0.5": 100, "0.9": 300}``.
            limits_tokens: least and greatest length.

        Returns:
            The distribution.
        """
        normal, levels = NormalDist(), sorted(quantiles, key=float)
        scores = tuple(normal.inv_cdf(float(level)) for level in levels)
        least, most = limits_tokens
        return cls(scores, tuple(float(quantiles[level]) for level in levels), (least, most))

    def at(self, scores: np.ndarray) -> np.ndarray:
        """Lengths at normal scores.

        Args:
            scores: standard normal values.

        Returns:
            Whole tokens within the limits.
        """
        known, logs = np.array(self.scores), np.log(self.tokens)
        place = np.clip(np.searchsorted(known, scores) - 1, 0, len(known) - 2)
        slopes = np.diff(logs) / np.diff(known)
        values = np.exp(logs[place] + slopes[place] * (scores - known[place]))
        return np.clip(np.rint(values), *self.limits_tokens).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Synthetic:
    """A workload's lengths.

    Attributes:
        source: where its statistics are from.
        prompt: of the prompts.
        output: of the responses.
        rank_correlation: between the normal scores of the two.
    """

    source: str
    prompt: LengthQuantiles
    output: LengthQuantiles
    rank_correlation: float


@cache
def synthetic_workloads() -> dict[str, Synthetic]:
    """The built-in workloads.

    Returns:
        By name.
    """
    text = files("econoserve.workload").joinpath("synthetic.json").read_text(encoding="utf-8")
    return {
        name: Synthetic(
            fields["source"],
            LengthQuantiles.of(fields["prompt_tokens"], fields["limits_tokens"]["prompt"]),
            LengthQuantiles.of(fields["output_tokens"], fields["limits_tokens"]["output"]),
            fields["rank_correlation"],
        )
        for name, fields in json.loads(text).items()
    }


def draw_lengths(name: str, count: int, seed: int) -> list[TraceRequest]:
    """Requests with drawn lengths, all at 0 s.

    Args:
        name: key of ``synthetic_workloads()``.
        count: how many, at least 1.
        seed: of the lengths.

    Returns:
        The requests. The first ones of a larger count are those of a smaller one, so that runs of
        different lengths can be compared.

    Raises:
        TraceError: there is no such workload.
    """
    known = synthetic_workloads()
    if name not in known:
        raise TraceError(f"trace synthetic:{name}: choose one of {', '.join(known)}")
    workload = known[name]
    first, other = np.random.default_rng(seed).standard_normal((count, 2)).T
    rho = workload.rank_correlation
    prompts = workload.prompt.at(first)
    outputs = workload.output.at(rho * first + np.sqrt(1.0 - rho**2) * other)
    return [
        TraceRequest(0.0, RequestFeatures(prompt, CAP_TOKENS), output)
        for prompt, output in zip(prompts.tolist(), outputs.tolist(), strict=True)
    ]
