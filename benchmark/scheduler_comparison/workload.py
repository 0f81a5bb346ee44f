"""The requests of a comparison: prompts, hidden output lengths, arrival times and SLOs.

Owns everything random in the benchmark; the same seed gives the same requests on every machine.
Lengths, tokens, arrivals and SLOs are drawn from separate streams, so that changing one leaves the
others as they were.
"""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_RANGE = (26, 256)
"""Prompt tokens of ``lognormal`` and ``uniform``, both ends included."""

UNIFORM_OUTPUT_RANGE = (26, 256)
LOGNORMAL_OUTPUT_RANGE = (8, 400)
LOGNORMAL_MEDIAN_TOKENS = 80
LOGNORMAL_SIGMA = 0.8
"""Our choice: a mean of 1.4 times the median, and 2 % of the responses at the upper end."""

TRACE_COLUMNS = (
    ("input_tokens", "output_tokens"),
    ("prompt_tokens", "output_tokens"),
    ("input_length", "output_length"),
    ("ContextTokens", "GeneratedTokens"),
    ("num_prefill_tokens", "num_decode_tokens"),
)
"""Names of the two columns that a trace may use."""

_LENGTHS, _TOKENS, _ARRIVALS, _SLOS = range(4)


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        prompt_ids: token ids of its prompt.
        output_tokens: length of its response, EOS included; hidden from the schedulers.
        arrival_s: when it is sent, from the start of the run.
        slo_ms: limit from arrival to last token, if it has one.
    """

    prompt_ids: tuple[int, ...]
    output_tokens: int
    arrival_s: float = 0.0
    slo_ms: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The request as plain values.

        Returns:
            A dict that ``from_json`` reads.
        """
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Request":
        """Read what ``to_json`` wrote.

        Args:
            fields: the dict.

        Returns:
            The request.
        """
        return cls(**{**fields, "prompt_ids": tuple(fields["prompt_ids"])})


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the benchmark must know of a model's tokens.

    Attributes:
        prompt_ids: tokens that prompts may be made of: all but the special ones.
        eos_ids: tokens that end a response, at least one.
    """

    prompt_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]

    @classmethod
    def of_model(cls, folder: Path) -> "Vocabulary":
        """Read a model's folder.

        Args:
            folder: holds ``config.json``, and if the model has them ``generation_config.json``
                and ``tokenizer.json``.

        Returns:
            Its vocabulary.

        Raises:
            ValueError: the folder is no model, or its model has no EOS token.
        """
        config = _read_json(folder / "config.json")
        if "vocab_size" not in config:
            raise ValueError(f"model folder {folder}: no config.json with a vocab_size in it")
        eos: list[int] = []
        for settings in (config, _read_json(folder / "generation_config.json")):
            value = settings.get("eos_token_id")
            eos += [] if value is None else value if isinstance(value, list) else [value]
        if not eos:
            raise ValueError(f"model folder {folder}: no eos_token_id in config.json")
        added = _read_json(folder / "tokenizer.json").get("added_tokens", [])
        special = {*eos, *(token["id"] for token in added)}
        plain = tuple(token for token in range(config["vocab_size"]) if token not in special)
        return cls(prompt_ids=plain, eos_ids=tuple(dict.fromkeys(eos)))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What to draw.

    Attributes:
        kind: ``lognormal``, ``uniform`` or ``trace``.
        requests: how many, at least 1.
        seed: of all random numbers.
        rate_per_s: mean arrivals per second (Poisson), or infinity for a burst at time 0.
        slo_fraction: share of the requests that have an SLO, in [0, 1].
        slo_ms: their limit from arrival to last token.
        trace: the CSV file of a ``trace`` workload.
        trace_scale: a trace's lengths are multiplied by it.
        longest_prompt_tokens: a trace's scaled prompts are cut to it.
        longest_output_tokens: a trace's scaled outputs are cut to it.
    """

    kind: str = "lognormal"
    requests: int = 200
    seed: int = 1
    rate_per_s: float = math.inf
    slo_fraction: float = 0.0
    slo_ms: float = 10_000.0
    trace: Path | None = None
    trace_scale: float = 0.1
    longest_prompt_tokens: int = 1024
    longest_output_tokens: int = 400


def generate(spec: WorkloadSpec, vocabulary: Vocabulary) -> list[Request]:
    """Draw the requests of a run.

    Args:
        spec: what to draw.
        vocabulary: what prompts are made of.

    Returns:
        The requests in the order of their arrival.

    Raises:
        ValueError: the kind is unknown, or a trace is missing, unreadable or too short.
    """
    lengths = _lengths(spec, np.random.default_rng((spec.seed, _LENGTHS)))
    tokens = np.random.default_rng((spec.seed, _TOKENS))
    arrivals = _arrivals_s(spec, np.random.default_rng((spec.seed, _ARRIVALS)))
    limited = round(spec.slo_fraction * spec.requests)
    shuffled = np.random.default_rng((spec.seed, _SLOS)).permutation(spec.requests)
    with_slo = set(shuffled[:limited].tolist())
    return [
        Request(
            prompt_ids=tuple(tokens.choice(vocabulary.prompt_ids, prompt).tolist()),
            output_tokens=output,
            arrival_s=arrivals[number],
            slo_ms=spec.slo_ms if number in with_slo else None,
        )
        for number, (prompt, output) in enumerate(lengths)
    ]


def _lengths(spec: WorkloadSpec, rng: np.random.Generator) -> list[tuple[int, int]]:
    if spec.kind == "trace":
        if spec.trace is None:
            raise ValueError("workload trace: give a CSV file")
        return _from_trace(spec, spec.trace, rng)
    prompts = rng.integers(*PROMPT_RANGE, size=spec.requests, endpoint=True)
    if spec.kind == "uniform":
        outputs = rng.integers(*UNIFORM_OUTPUT_RANGE, size=spec.requests, endpoint=True)
    elif spec.kind == "lognormal":
        drawn = rng.lognormal(math.log(LOGNORMAL_MEDIAN_TOKENS), LOGNORMAL_SIGMA, spec.requests)
        outputs = np.clip(np.rint(drawn), *LOGNORMAL_OUTPUT_RANGE).astype(int)
    else:
        raise ValueError(f"workload {spec.kind!r}: give lognormal, uniform or trace FILE.csv")
    return list(zip(prompts.tolist(), outputs.tolist(), strict=True))


def _from_trace(spec: WorkloadSpec, path: Path, rng: np.random.Generator) -> list[tuple[int, int]]:
    rows = read_trace(path)
    if len(rows) < spec.requests:
        raise ValueError(f"trace {path.name}: {len(rows)} requests, {spec.requests} are wanted")
    picked = np.sort(rng.choice(len(rows), spec.requests, replace=False)).tolist()

    def scaled(tokens: int, longest: int) -> int:
        return min(max(round(tokens * spec.trace_scale), 1), longest)

    return [
        (
            scaled(rows[i][0], spec.longest_prompt_tokens),
            scaled(rows[i][1], spec.longest_output_tokens),
        )
        for i in picked
    ]


def read_trace(path: Path) -> list[tuple[int, int]]:
    """Read the lengths in a CSV file.

    Args:
        path: a file with a header; its two columns have one of the names in ``TRACE_COLUMNS``.

    Returns:
        Prompt and output tokens of each request that has both.

    Raises:
        ValueError: there is no such file, no such columns, or a cell is not a number.
    """
    if not path.exists():
        raise ValueError(f"trace {path.name}: no such file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        names = next((pair for pair in TRACE_COLUMNS if set(pair) <= set(header)), None)
        if names is None:
            known = "; ".join(", ".join(pair) for pair in TRACE_COLUMNS)
            raise ValueError(f"trace {path.name}: columns {', '.join(header)}; known are {known}")
        rows = []
        for line, row in enumerate(reader, start=2):
            try:
                prompt, output = (int(float(row[name])) for name in names)
            except (TypeError, ValueError) as error:
                raise ValueError(f"trace {path.name}, line {line}: {error}") from error
            if prompt > 0 and output > 0:
                rows.append((prompt, output))
    return rows


def _arrivals_s(spec: WorkloadSpec, rng: np.random.Generator) -> list[float]:
    if math.isinf(spec.rate_per_s):
        return [0.0] * spec.requests
    return np.cumsum(rng.exponential(1.0 / spec.rate_per_s, spec.requests)).tolist()


def describe(requests: Sequence[Request]) -> dict[str, Any]:
    """The sizes of a workload, for a report.

    Args:
        requests: at least one.

    Returns:
        Counts, and means, medians and extremes in tokens.
    """
    prompts = [len(request.prompt_ids) for request in requests]
    outputs = [request.output_tokens for request in requests]

    def sizes(values: list[int]) -> dict[str, float]:
        return {
            "min": min(values),
            "median": float(np.median(values)),
            "mean": round(float(np.mean(values)), 1),
            "max": max(values),
            "total": sum(values),
        }

    return {
        "requests": len(requests),
        "prompt_tokens": sizes(prompts),
        "output_tokens": sizes(outputs),
        "with_slo": sum(request.slo_ms is not None for request in requests),
        "last_arrival_s": round(max(request.arrival_s for request in requests), 3),
    }
