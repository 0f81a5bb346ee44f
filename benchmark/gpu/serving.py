"""Stages that time both systems: iterations, throughput with room for all, goodput with little.

Owns what is called throughput, goodput and overhead here.
"""

import math
from itertools import product
from typing import Any

from benchmark.gpu import pressure
from benchmark.gpu.context import SEED, Check, StageFailed, failures
from benchmark.gpu.lengths import draw_requests
from benchmark.gpu.pair import SYSTEMS, Engine, Setup, turns
from benchmark.gpu.sizes import Load, Sizes
from benchmark.scheduler_comparison.figures import Spread, figures
from benchmark.scheduler_comparison.worker import ECONOSERVE, STOCK
from benchmark.scheduler_comparison.workload import Request

WARMUP_SEED = 1001
WARMUP_REQUESTS = 32
FEW_REQUESTS = 4
FULL_SHARE = 0.8
"""Share of the KVC that timed iterations may take."""


def iterations(check: Check, load: Load) -> dict[str, Any]:
    """Iteration times of both systems, and what EconoServe adds to a decode iteration."""
    sizes = check.sizes
    with check.use(free_setup(check, load), f"iterations-{load.model}") as engines:
        decode = _decode_times(engines, load, sizes)
        mixed = _mixed_times(engines[ECONOSERVE], load, sizes)
    return {
        "decode": decode,
        "mixed": mixed,
        "overhead": overhead(decode, sizes.overhead_batch),
    }


def throughput(check: Check, load: Load) -> dict[str, Any]:
    """Throughput of both systems when all requests have room."""
    setup = free_setup(check, load)
    works = _works(load.free_requests, load, setup, math.inf, check.sizes.run_repeats)
    with check.use(setup, f"throughput-{load.model}") as engines:
        _warm_up(engines, load, setup)
        runs = [
            {"system": system, "repeat": repeat, **_burst(engines[system], works[repeat])}
            for repeat, system in turns(check.sizes.run_repeats)
        ]
    return {"throughput": ratio_of(runs, "output_tokens_per_s"), "runs": runs}


def free_setup(check: Check, load: Load) -> Setup:
    """Settings of a load with room for all of its requests.

    Args:
        check: what all stages know.
        load: the load.

    Returns:
        The settings.
    """
    return check.setup(load.model, load.dtype, load.free_kvc_tokens, load.scale)


def _decode_times(
    engines: dict[str, Engine], load: Load, sizes: Sizes
) -> dict[str, list[dict[str, Any]]]:
    """Decode iterations of each batch and context that fit the KVC, in turns."""
    points: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    for context_tokens in sizes.contexts:
        for running in load.batches:
            if not _fits(running, context_tokens + sizes.decode_tokens + 8, load):
                continue
            timed: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
            for _, system in turns(sizes.repeats):
                answer = engines[system].ask(
                    "decode",
                    running=running,
                    context_tokens=context_tokens,
                    new_tokens=sizes.decode_tokens,
                )
                timed[system].append(answer)
            for system in SYSTEMS:
                times = [one["iteration_ms"] for one in timed[system]]
                own = Spread.of([one["scheduling_ms"] for one in timed[system]])
                points[system].append(
                    {
                        "running": running,
                        "context_tokens": context_tokens,
                        "iteration_ms": Spread.of(times).median,
                        "repeats_ms": times,
                        "scheduling_ms": None if own is None else own.median,
                    }
                )
    return points


def _fits(running: int, longest_tokens: int, load: Load) -> bool:
    return running * longest_tokens <= FULL_SHARE * load.free_kvc_tokens


def _mixed_times(engine: Engine, load: Load, sizes: Sizes) -> list[dict[str, Any]]:
    """Mixed iterations of EconoServe."""
    points = product(sizes.mixed_contexts, sizes.mixed_batches, sizes.mixed_prompts)
    found = []
    for context_tokens, running, prompt_tokens in points:
        if not _fits(running, context_tokens, load):
            continue
        timed = engine.ask(
            "mixed",
            running=running,
            context_tokens=context_tokens,
            prompt_tokens=prompt_tokens,
            prompts=sizes.mixed_count,
        )
        added_ms = timed["added_ms"]
        found.append(
            {
                **timed,
                "running": running,
                "prompt_tokens": prompt_tokens,
                "context_tokens": running * (context_tokens + timed["decoded"] / 2),
                "iteration_ms": None if added_ms is None else timed["alone_ms"] + added_ms,
            }
        )
    return found


def overhead(decode: dict[str, list[dict[str, Any]]], running: int) -> dict[str, Any]:
    """What EconoServe adds to a decode iteration, at the shortest context.

    Args:
        decode: iteration times by system.
        running: the batch to tell it at, or the largest one below.

    Returns:
        The batch (``running``); the share that EconoServe's iterations are longer by (``added``:
        median, lowest and highest over the repeats, each with its neighbour); its own planning and
        bookkeeping per iteration (``scheduling_ms``), and as a share of stock SGLang's iteration
        (``scheduling``).
    """
    pairs = [
        (mine, theirs)
        for mine, theirs in zip(decode[ECONOSERVE], decode[STOCK], strict=True)
        if mine["running"] <= running
    ]
    largest = max(mine["running"] for mine, _ in pairs)
    mine, theirs = next(pair for pair in pairs if pair[0]["running"] == largest)
    repeats = zip(mine["repeats_ms"], theirs["repeats_ms"], strict=True)
    return {
        "running": largest,
        "added": _spread([ours / stock - 1 if stock > 0 else None for ours, stock in repeats]),
        "scheduling_ms": mine["scheduling_ms"],
        "scheduling": mine["scheduling_ms"] / theirs["iteration_ms"],
    }


def goodput(check: Check, load: Load) -> dict[str, Any]:
    """Requests per second that keep their SLO when the KVC is short and arrivals are many."""
    repeats = check.sizes.run_repeats
    setup = check.setup(load.model, load.dtype, load.bound_kvc_tokens, load.scale)
    with check.use(setup, f"goodput-{load.model}") as engines:
        _warm_up(engines, load, setup)
        few = _burst(
            engines[STOCK], _requests(FEW_REQUESTS, load, setup, math.inf, WARMUP_SEED + 1)
        )
        burst = _requests(load.bound_requests, load, setup, math.inf, SEED)
        full = _answers(engines[STOCK], burst)["answers"]
        sustained_per_s = pressure.sustained_requests_per_s(full)
        slo_ms = pressure.slo_ms(few["mean_tpot_ms"], load.scale)
        rate_per_s = pressure.LOAD_FACTOR * sustained_per_s
        works = _works(load.bound_requests, load, setup, rate_per_s, repeats, slo_ms)
        runs = [
            {"system": system, "repeat": repeat, **_burst(engines[system], works[repeat])}
            for repeat, system in turns(repeats)
        ]
    for run in runs:
        # The same arrivals for both, whenever their last responses end.
        run["goodput_per_s"] = run["slo_met"] * rate_per_s
    return {
        "slo_ms": slo_ms,
        "rate_per_s": rate_per_s,
        "few_tpot_ms": few["mean_tpot_ms"],
        "sustained_per_s": sustained_per_s,
        "stock_burst": figures(full),
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


def _answers(engine: Engine, work: list[dict[str, Any]]) -> dict[str, Any]:
    result = engine.ask("burst", requests=work)
    if wrong := failures(result["answers"]):
        raise StageFailed(f"{engine.system}: {'; '.join(wrong[:5])}")
    return result


def _burst(engine: Engine, work: list[dict[str, Any]]) -> dict[str, Any]:
    result = _answers(engine, work)
    return {**figures(result["answers"]), "counters": result["counters"]}


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
