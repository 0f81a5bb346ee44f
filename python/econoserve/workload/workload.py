"""A workload from its description: which trace, how many requests, when they arrive, by when due.

Lengths and times are drawn from separate streams: another rate leaves the lengths as they are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from econoserve.core.checks import check_least
from econoserve.core.types import Slo
from econoserve.workload.arrivals import gamma, poisson, scaled
from econoserve.workload.objectives import with_slo
from econoserve.workload.readers import read_csv, read_jsonl
from econoserve.workload.servegen import WHOLE, read_servegen
from econoserve.workload.synthetic import draw_lengths
from econoserve.workload.trace import TraceError, TraceRequest, within_context

SYNTHETIC = "synthetic:"
SERVEGEN = ".tar.xz"
READERS = {".csv": read_csv, ".jsonl": read_jsonl}

SPARE = 4
"""Synthetic requests drawn for each one wanted, since some exceed a model's context. Ours."""

Arrivals = Callable[[list[TraceRequest], float, int], list[TraceRequest]]
"""Gives requests their times, for a rate in requests per second and a seed."""


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What to serve.

    Attributes:
        trace: ``synthetic:NAME``, or the path of a trace: ``.csv`` (Azure, vidur, lists of
            lengths), ``.jsonl`` (Mooncake, LLMServingSim), ``.tar.xz`` (ServeGen).
        rate_rps: mean arrivals per second, more than 0.
        requests: how many at most, at least 1; a file's first ones that fit into the context,
            but of a ServeGen archive so many over its whole time.
        arrivals: ``trace`` for scaled time stamps, ``poisson``, or ``gamma:CV``.
        slo: objectives of every request.
        seed: of all that is drawn.
        window_h: only this part of a file with times, in hours from its begin: from, and until.

    Raises:
        ValueError: a value is out of range.
    """

    trace: str
    rate_rps: float
    requests: int = 500
    arrivals: str = "poisson"
    slo: Slo = field(default_factory=Slo)
    seed: int = 0
    window_h: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_least(self, requests=1, seed=0)
        if self.window_h is not None and not 0 <= self.window_h[0] < self.window_h[1]:
            raise ValueError(f"window_h={self.window_h}: give two hours, 0 or more, ascending")
        arrival_process(self.arrivals)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests to serve.

    Attributes:
        requests: by arrival.
        left_out: requests of the trace that exceed the model's context.
    """

    requests: list[TraceRequest]
    left_out: int


def make_workload(spec: WorkloadSpec, context_tokens: int) -> Workload:
    """Make the requests of a run.

    Args:
        spec: what to serve.
        context_tokens: the model's longest context; longer requests are left out.

    Returns:
        The workload; the same for equal arguments.

    Raises:
        TraceError: the trace cannot be read, or no request of it fits into the context.
        ValueError: the rate is not more than 0.
    """
    if spec.trace.endswith(SERVEGEN):
        fitting, left_out = _servegen(spec, context_tokens)
    else:
        fitting, left_out = within_context(_read(spec), context_tokens, spec.requests)
    if not fitting:
        raise TraceError(
            f"trace {spec.trace}: no request fits into a context of {context_tokens} tokens: "
            "choose another trace or model, or more KVC"
        )
    arrive = arrival_process(spec.arrivals)
    requests = arrive(fitting, spec.rate_rps, spec.seed + 1)
    return Workload(with_slo(requests, spec.slo), left_out)


def arrival_process(text: str) -> Arrivals:
    """What gives requests their times.

    Args:
        text: ``trace``, ``poisson`` or ``gamma:CV``.

    Returns:
        The process.

    Raises:
        ValueError: there is no such process.
    """
    if text == "trace":
        return lambda requests, rate_rps, seed: scaled(requests, rate_rps)
    if text == "poisson":
        return poisson
    name, _, value = text.partition(":")
    try:
        cv = float(value)
    except ValueError:
        cv = 0.0
    if name != "gamma" or not cv > 0:
        raise ValueError(f"arrivals {text!r}: give trace, poisson, or gamma:CV with a CV above 0")
    return lambda requests, rate_rps, seed: gamma(requests, rate_rps, cv, seed)


def _read(spec: WorkloadSpec) -> list[TraceRequest]:
    if spec.trace.startswith(SYNTHETIC):
        if spec.window_h is not None:
            raise TraceError(f"trace {spec.trace} has no times: leave out --trace-window")
        return draw_lengths(spec.trace.removeprefix(SYNTHETIC), SPARE * spec.requests, spec.seed)
    path = _file(spec.trace)
    if path.suffix not in READERS:
        known = ", ".join((*READERS, SERVEGEN))
        raise TraceError(f"trace {spec.trace}: give a file that ends in one of {known}")
    requests = READERS[path.suffix](path)
    if spec.window_h is None:
        return requests
    begin_s, end_s = (hours * 3600 for hours in spec.window_h)
    within = [request for request in requests if begin_s <= request.arrival_s < end_s]
    if not within or requests[-1].arrival_s <= 0:
        raise TraceError(
            f"trace {spec.trace} has no requests in --trace-window: its last arrives after "
            f"{requests[-1].arrival_s / 3600:.2f} hours"
        )
    return within


def _servegen(spec: WorkloadSpec, context_tokens: int) -> tuple[list[TraceRequest], int]:
    """As ``within_context`` gives them, of the whole time: more are drawn until enough fit."""
    path, drawn = _file(spec.trace), float(spec.requests)
    window_s = WHOLE
    if spec.window_h is not None:
        window_s = spec.window_h[0] * 3600, spec.window_h[1] * 3600
    while True:
        requests = read_servegen(path, math.ceil(drawn), spec.seed, window_s)
        fitting, left_out = within_context(requests, context_tokens, len(requests))
        if not fitting or len(fitting) >= spec.requests:
            break
        drawn *= max(1.1 * spec.requests / len(fitting), 1.1)
    if len(fitting) > spec.requests:
        draw = np.random.default_rng((spec.seed, len(fitting)))
        kept = draw.choice(len(fitting), spec.requests, replace=False)
        fitting = [fitting[index] for index in sorted(kept.tolist())]
    return fitting, left_out


def _file(trace: str) -> Path:
    path = Path(trace)
    if not path.is_file():
        raise TraceError(f"trace {trace}: no such file; give a file or {SYNTHETIC}NAME")
    return path
