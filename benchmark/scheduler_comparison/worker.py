"""One measured run in a process of its own: start an engine, warm it up, send, time, stop.

Owns the engine and the client's clock. It must not know what the other system did. Run by
``systems``: the job comes as JSON on standard input, the result goes to the file it names.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmark.scheduler_comparison.lengths import custom_params
from benchmark.scheduler_comparison.workload import Request

STOCK = "stock"
ECONOSERVE = "econoserve"
FLUSH_ATTEMPTS = 50


def engine_for(job: dict[str, Any]) -> Any:
    """Start the system under test.

    Args:
        job: has ``system``, ``engine`` (SGLang's arguments) and ``settings`` (EconoServe's).

    Returns:
        A running engine.
    """
    if job["system"] == STOCK:
        import sglang

        return sglang.Engine(**job["engine"])
    from econoserve.engine import Engine

    settings = {f"econoserve_{name}": value for name, value in job["settings"].items()}
    return Engine(**job["engine"], **settings)


async def _send(
    engine: Any, request: Request, job: dict[str, Any], processor: str, start_s: float
) -> dict[str, Any]:
    """Send one request when it is due and time its answer from then on."""
    fields = custom_params(request.output_tokens, job["eos_ids"])
    if request.slo_ms is not None:
        fields["econoserve"] = {"e2e_ms": request.slo_ms}
    due_s = start_s + request.arrival_s
    await asyncio.sleep(max(due_s - time.perf_counter(), 0.0))
    first_s = last_s = None
    output: dict[str, Any] = {"output_ids": [], "meta_info": {}}
    error = None
    try:
        stream = await engine.async_generate(
            input_ids=list(request.prompt_ids),
            sampling_params={
                "temperature": 0.0,
                "max_new_tokens": job["max_new_tokens"],
                "custom_params": fields,
            },
            custom_logit_processor=processor,
            stream=True,
        )
        async for output in stream:
            last_s = time.perf_counter()
            if first_s is None and output["meta_info"]["completion_tokens"] > 0:
                first_s = last_s
        reason = output["meta_info"].get("finish_reason") or {}
        if reason.get("type") not in ("stop", "length") or first_s is None:
            error = f"finish reason {reason}, no usable answer"
    except ValueError as refused:
        error = str(refused)
    meta = output["meta_info"]
    return {
        "ttft_s": None if first_s is None else first_s - due_s,
        "jct_s": None if last_s is None else last_s - due_s,
        "arrival_s": request.arrival_s,
        "prompt_tokens": len(request.prompt_ids),
        "wanted_tokens": request.output_tokens,
        "output_tokens": meta.get("completion_tokens", 0),
        "retractions": meta.get("num_retractions", 0),
        "slo_ms": request.slo_ms,
        "report": meta.get("econoserve"),
        "output_ids": list(output["output_ids"]),
        "error": error,
    }


async def send_all(
    engine: Any, requests: list[Request], job: dict[str, Any], processor: str
) -> list[dict[str, Any]]:
    """Send every request at its time and wait for all answers.

    Args:
        engine: what answers.
        requests: what is sent.
        job: has ``eos_ids``, ``max_new_tokens`` and ``run_timeout_s``.
        processor: the logit processor that ends responses, as SGLang takes it.

    Returns:
        One dict per request.

    Raises:
        TimeoutError: they were not answered in time.
    """
    start_s = time.perf_counter()
    sent = (_send(engine, request, job, processor, start_s) for request in requests)
    return await asyncio.wait_for(asyncio.gather(*sent), job["run_timeout_s"])


def scheduler_state(engine: Any, system: str) -> dict[str, Any]:
    """EconoServe's figures from the scheduler process; also proves which scheduler runs there.

    Args:
        engine: a running engine.
        system: ``stock`` or ``econoserve``.

    Returns:
        The figures; none of stock SGLang.

    Raises:
        RuntimeError: the other scheduler runs.
    """
    state = engine.get_server_info()["internal_states"][0].get("econoserve")
    if (state is not None) != (system == ECONOSERVE):
        raise RuntimeError(
            f"system={system}: the other scheduler is running; is the package installed, and is "
            "ECONOSERVE unset?"
        )
    return state or {}


def flush(engine: Any) -> None:
    """Empty the prefix cache.

    Args:
        engine: a running engine.

    Raises:
        RuntimeError: requests are still running.
    """
    for _ in range(FLUSH_ATTEMPTS):
        if engine.flush_cache().success:
            return
        time.sleep(0.1)
    raise RuntimeError("the cache cannot be flushed: requests are still running after the warm-up")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Do one run.

    Args:
        job: what to run; written by ``systems.Runner``.

    Returns:
        The time to start (seconds), one dict per request, and by how much EconoServe's counters
        rose.

    Raises:
        TimeoutError: the requests were not answered in time.
        RuntimeError: the wrong scheduler runs, or requests are stuck.
    """
    began_s = time.perf_counter()
    engine = engine_for(job)
    started_s = time.perf_counter() - began_s
    try:
        from benchmark.scheduler_comparison.processor import EndOnTime

        processor = EndOnTime.to_str()
        warmup = [Request.from_json(fields) for fields in job["warmup"]]
        requests = [Request.from_json(fields) for fields in job["requests"]]
        run = engine.loop.run_until_complete
        run(send_all(engine, warmup, job, processor))
        flush(engine)
        before = scheduler_state(engine, job["system"])
        answers = run(send_all(engine, requests, job, processor))
        after = scheduler_state(engine, job["system"])
    finally:
        engine.shutdown()
    counters = {
        name.removeprefix("total_"): value - before[name]
        for name, value in after.items()
        if name.startswith("total_")
    }
    return {"start_s": started_s, "answers": answers, "counters": counters}


def main() -> int:
    """Read a job, do it, and write its result.

    Returns:
        The exit status.
    """
    job = json.load(sys.stdin)
    os.environ.update(job["environment"])
    for name in ("ECONOSERVE", "ECONOSERVE_CONFIG"):
        os.environ.pop(name, None)
    try:
        result = measure(job)
    except TimeoutError:
        limit_s = job["run_timeout_s"]
        print(f"requests were not answered in {limit_s:g} s: raise --timeout-s", file=sys.stderr)
        return 1
    Path(job["result"]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
