"""Stages that time both systems: iterations, throughput with room for all, goodput with little.

Owns what is called throughput, goodput and overhead here.
"""

import math
from typing import Any

import numpy as np

from benchmark.gpu.context import SEED, Check, StageFailed, failures
from benchmark.gpu.lengths import draw_requests
from benchmark.gpu.pair import SYSTEMS, Engine, Setup, both, turns
from benchmark.gpu.sizes import Load, Sizes
from benchmark.scheduler_comparison.figures import Spread, figures
from benchmark.scheduler_comparison.worker import ECONOSERVE, STOCK
from benchmark.scheduler_comparison.workload import Request

WARMUP_SEED = 1001
WARMUP_REQUESTS = 32
FEW_REQUESTS = 4
LOAD_FACTOR = 1.2
"""Arrivals per second in goodput runs, as a multiple of what stock SGLang completes in a burst."""

SLO_FACTOR = 5.0
"""The SLO in goodput runs, as a multiple of the mean time of a request with few beside it."""


def unconstrained(check: Check, load: Load) -> dict[str, Any]:
    """Iteration times of both systems, and their throughput when all requests have room."""
    sizes = check.sizes
    setup = check.setup(load.model, load.dtype, load.free_kvc_tokens, load.scale)
    works = _works(load.free_requests, load, setup, math.inf, sizes.repeats)
    with both(setup, check.logs(f"unconstrained-{load.model}")) as engines:
        decode = _decode_times(engines, load, sizes)
        mixed = _mixed_times(engines[ECONOSERVE], load, sizes, decode[ECONOSERVE])
        _warm_up(engines, load, setup)
        runs = [
            {"system": system, "repeat": repeat, **_burst(engines[system], works[repeat])}
            for repeat, system in turns(sizes.repeats)
        ]
    return {
        "decode": decode,
        "mixed": mixed,
        "overhead": overhead(decode, sizes.overhead_batch),
        "throughput": ratio_of(runs, "output_tokens_per_s"),
        "runs": runs,
    }


def _decode_times(
    engines: dict[str, Engine], load: Load, sizes: Sizes
) -> dict[str, list[dict[str, Any]]]:
    """Decode iterations of each batch and context that fit the KVC, in turns."""
    points: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    for context_tokens in sizes.contexts:
        for running in load.batches:
            longest = context_tokens + sizes.decode_tokens + 8
            if running * longest > 0.8 * load.free_kvc_tokens:
                continue
            times: dict[str, list[float]] = {system: [] for system in SYSTEMS}
            for _, system in turns(sizes.repeats):
                timed = engines[system].ask(
                    "decode",
                    running=running,
                    context_tokens=context_tokens,
                    new_tokens=sizes.decode_tokens,
                )
                times[system].append(timed["iteration_ms"])
            for system in SYSTEMS:
                spread = Spread.of(times[system])
                points[system].append(
                    {
                        "running": running,
                        "context_tokens": context_tokens,
                        "iteration_ms": spread.median,
                        "range_ms": [spread.lowest, spread.highest],
                    }
                )
    return points


def _mixed_times(
    engine: Engine, load: Load, sizes: Sizes, decode: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Mixed iterations of EconoServe: what prompts add, on top of the decode iteration."""
    found = []
    for running in sizes.mixed_batches:
        base_ms = _nearest_ms(decode, running)
        for tokens in sizes.mixed_prompts:
            timed = engine.ask(
                "mixed", running=running, prompt_tokens=tokens, prompts=sizes.mixed_count
            )
            added_ms = timed["added_ms"]
            found.append(
                {
                    **timed,
                    "running": running,
                    "prompt_tokens": tokens,
                    "context_tokens": running * (16 + 2 * sizes.mixed_count),
                    "iteration_ms": None if added_ms is None else base_ms + added_ms,
                }
            )
    return found


def _nearest_ms(decode: list[dict[str, Any]], running: int) -> float:
    """Time of a decode iteration with short contexts, between the batches that were timed."""
    shortest = min(one["context_tokens"] for one in decode)
    known = sorted(
        (one["running"], one["iteration_ms"]) for one in decode if one["context_tokens"] == shortest
    )
    return float(np.interp(running, *zip(*known, strict=True)))


def overhead(decode: dict[str, list[dict[str, Any]]], running: int) -> dict[str, Any]:
    """What EconoServe adds to a decode iteration.

    Args:
        decode: iteration times by system.
        running: the batch to tell it at, or the largest one below.

    Returns:
        The batch, and the ``added`` share at the shortest context.
    """
    pairs = [
        (mine["running"], mine["iteration_ms"] / theirs["iteration_ms"] - 1)
        for mine, theirs in zip(decode[ECONOSERVE], decode[STOCK], strict=True)
        if mine["running"] <= running
    ]
    largest = max(batch for batch, _ in pairs)
    return {"running": largest, "added": next(share for batch, share in pairs if batch == largest)}


def goodput(check: Check, load: Load) -> dict[str, Any]:
    """Requests per second that keep their SLO when the KVC is short and arrivals are many."""
    sizes = check.sizes
    setup = check.setup(load.model, load.dtype, load.bound_kvc_tokens, load.scale)
    with both(setup, check.logs(f"goodput-{load.model}")) as engines:
        _warm_up(engines, load, setup)
        few = engines[STOCK].ask(
            "burst", requests=_requests(FEW_REQUESTS, load, setup, math.inf, WARMUP_SEED)
        )
        burst = _requests(load.bound_requests, load, setup, math.inf, SEED)
        full = _burst(engines[STOCK], burst)
        slo_ms = SLO_FACTOR * 1e3 * figures(few["answers"])["mean_jct_s"]
        rate_per_s = LOAD_FACTOR * full["requests_per_s"]
        works = _works(load.bound_requests, load, setup, rate_per_s, sizes.repeats, slo_ms)
        runs = [
            {"system": system, "repeat": repeat, **_burst(engines[system], works[repeat])}
            for repeat, system in turns(sizes.repeats)
        ]
    return {
        "slo_ms": slo_ms,
        "rate_per_s": rate_per_s,
        "stock_burst": full,
        "goodput": ratio_of(runs, "goodput_per_s"),
        "slo_met": ratio_of(runs, "slo_met"),
        "throughput": ratio_of(runs, "output_tokens_per_s"),
        "runs": runs,
    }


def _requests(
    count: int, load: Load, setup: Setup, rate_per_s: float, seed: int, slo_ms: float | None = None
) -> list[dict[str, Any]]:
    drawn: list[Request] = draw_requests(count, load.scale, rate_per_s, setup.token_ids, seed)
    return [{**one.to_json(), "slo_ms": slo_ms} for one in drawn]


def _works(
    count: int,
    load: Load,
    setup: Setup,
    rate_per_s: float,
    repeats: int,
    slo_ms: float | None = None,
) -> list[list[dict[str, Any]]]:
    """Requests of each repeat: others each time, or EconoServe would know their lengths."""
    return [
        _requests(count, load, setup, rate_per_s, SEED + 1 + repeat, slo_ms)
        for repeat in range(repeats)
    ]


def _warm_up(engines: dict[str, Engine], load: Load, setup: Setup) -> None:
    """Other requests of the same lengths, from which EconoServe learns how long responses are."""
    work = _requests(WARMUP_REQUESTS, load, setup, math.inf, WARMUP_SEED)
    for engine in engines.values():
        engine.ask("burst", requests=work)


def _burst(engine: Engine, work: list[dict[str, Any]]) -> dict[str, Any]:
    result = engine.ask("burst", requests=work)
    answers = result["answers"]
    if wrong := failures(answers):
        raise StageFailed(f"{engine.system}: {'; '.join(wrong[:5])}")
    last_s = max(one["arrival_s"] + one["jct_s"] for one in answers)
    first_s = min(one["arrival_s"] for one in answers)
    met = figures(answers)["slo_met"]
    return {
        **figures(answers),
        "requests_per_s": len(answers) / (last_s - first_s),
        "goodput_per_s": None if met is None else met * len(answers) / (last_s - first_s),
        "counters": result["counters"],
    }


def ratio_of(runs: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """One figure of both systems over the repeats.

    Args:
        runs: have ``system``, ``repeat`` and the figure.
        key: the figure's name.

    Returns:
        Median, lowest and highest of each system, and of the ratio repeat by repeat; the ratio is
        ``None`` where SGLang's is 0.
    """
    values = {
        system: {run["repeat"]: run[key] for run in runs if run["system"] == system}
        for system in SYSTEMS
    }
    ratios = [
        mine / values[STOCK][repeat]
        for repeat, mine in values[ECONOSERVE].items()
        if mine is not None and values[STOCK].get(repeat)
    ]
    rows = {**{system: list(values[system].values()) for system in SYSTEMS}, "ratio": ratios}
    return {name: _spread(row) for name, row in rows.items()}


def _spread(values: list[float | None]) -> list[float] | None:
    spread = Spread.of(values)
    return None if spread is None else [spread.median, spread.lowest, spread.highest]
