"""One offline engine in a process of its own, timed on demand.

Owns an engine and the clock around it. Run as a script by the interpreter of the system under test,
which need not have this package: standard library only, and the engine's own. Requests come as
JSON lines on standard input, the first one being the job; answers leave as JSON lines on standard
output. It ends when its input does.
"""

import atexit
import json
import os
import time
from collections.abc import Callable
from typing import Any

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def start_sglang(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Start SGLang's engine, with or without our scheduler.

    Args:
        job: ``system`` and ``engine``, SGLang's arguments.

    Returns:
        The engine, and facts about it.
    """
    if job["system"] == "econoserve":
        from econoserve import Engine
    else:
        from sglang import Engine
    engine = Engine(**job["engine"])
    info = engine.get_server_info()
    ours = "econoserve" in info["internal_states"][0]
    if ours != (job["system"] == "econoserve"):
        raise RuntimeError(f"system={job['system']}: the other scheduler is running")
    return engine, {"attention_backend": info.get("attention_backend")}


def run_sglang(engine: Any, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
    """Generate and time it.

    Args:
        engine: SGLang's.
        prompts: token ids.
        output_tokens: exact length of every response.

    Returns:
        Seconds, tokens that came back, and prompt tokens found in the prefix cache.
    """
    began_s = time.perf_counter()
    answers = engine.generate(
        input_ids=prompts,
        sampling_params={"temperature": 0.0, "ignore_eos": True, "max_new_tokens": output_tokens},
    )
    seconds = time.perf_counter() - began_s
    return {
        "seconds": seconds,
        "output_tokens": sum(answer["meta_info"]["completion_tokens"] for answer in answers),
        "cached_tokens": sum(answer["meta_info"].get("cached_tokens", 0) for answer in answers),
    }


def start_vllm(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Start vLLM's engine.

    Args:
        job: ``engine``, vLLM's arguments.

    Returns:
        The engine, and facts about it.
    """
    import torch
    import vllm

    return vllm.LLM(**job["engine"]), {"vllm": vllm.__version__, "torch": torch.__version__}


def run_vllm(engine: Any, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
    """Generate and time it.

    Args:
        engine: vLLM's.
        prompts: token ids.
        output_tokens: exact length of every response.

    Returns:
        Seconds, tokens that came back, and prompt tokens found in the prefix cache.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=output_tokens)
    began_s = time.perf_counter()
    answers = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False
    )
    seconds = time.perf_counter() - began_s
    return {
        "seconds": seconds,
        "output_tokens": sum(len(answer.outputs[0].token_ids) for answer in answers),
        "cached_tokens": sum(answer.num_cached_tokens or 0 for answer in answers),
    }


def start_engine(job: dict[str, Any]) -> tuple[Handler, dict[str, Any]]:
    """Start the engine that a job asks for.

    Args:
        job: ``system``, ``engine`` (its arguments) and ``prompts``.

    Returns:
        What answers ``{"batch": ..., "output_tokens": ...}``, and facts about the engine.
    """
    start, run = (start_vllm, run_vllm) if job["system"] == "vllm" else (start_sglang, run_sglang)
    began_s = time.perf_counter()
    engine, facts = start(job)
    if hasattr(engine, "shutdown"):
        atexit.register(engine.shutdown)

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        return run(engine, job["prompts"][: request["batch"]], request["output_tokens"])

    return handle, {"start_s": time.perf_counter() - began_s, **facts}


def serve(start: Callable[[dict[str, Any]], tuple[Handler, dict[str, Any]]]) -> None:
    """Answer requests until standard input ends.

    Args:
        start: gets the job; returns what answers requests, and the first answer.
    """
    # Engines print, and their processes inherit what we have: keep the protocol's pipes apart.
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    handle, answer = start(json.loads(requests.readline()))
    print(json.dumps(answer), file=replies, flush=True)
    for line in requests:
        print(json.dumps(handle(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    serve(start_engine)
