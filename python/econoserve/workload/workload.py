"""A workload from its description: which trace, how many requests, when they arrive, by when due.

Lengths and times are drawn from separate streams: another rate leaves the lengths as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from econoserve.core.checks import check_least
from econoserve.core.types import Slo
from econoserve.workload.arrivals import gamma, poisson, scaled
from econoserve.workload.objectives import with_slo
from econoserve.workload.readers import read_csv, read_jsonl
from econoserve.workload.servegen import read_servegen
from econoserve.workload.synthetic import draw_lengths
from econoserve.workload.trace import TraceError, TraceRequest, within_context

SYNTHETIC = "synthetic:"

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
        requests: how many at most, at least 1; a file's first ones that fit into the context.
        arrivals: ``trace`` for scaled time stamps, ``poisson``, or ``gamma:CV``.
        slo: objectives of every request.
        seed: of all that is drawn.

    Raises:
        ValueError: a value is out of range.
    """

    trace: str
    rate_rps: float
    requests: int = 500
    arrivals: str = "poisson"
    slo: Slo = field(default_factory=Slo)
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, requests=1, seed=0)
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
        return draw_lengths(spec.trace.removeprefix(SYNTHETIC), SPARE * spec.requests, spec.seed)
    path = Path(spec.trace)
    if not path.is_file():
        raise TraceError(f"trace {spec.trace}: no such file; give a file or {SYNTHETIC}NAME")
    if path.name.endswith(".tar.xz"):
        return read_servegen(path, SPARE * spec.requests, spec.seed)
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.suffix == ".csv":
        return read_csv(path)
    raise TraceError(f"trace {spec.trace}: give a file that ends in .csv, .jsonl or .tar.xz")
