"""Greedy outputs of stock SGLang on the CPU platform, for ``test_engine``.

Run as a program in a process of its own: ``engine_worker.py OUTPUT.json SYSTEMS.json``. A system
has a name, a value of ``ECONOSERVE_CPU_OPS``, and keyword arguments of ``Engine``.
"""

import asyncio
import json
import os
import random
import sys
from pathlib import Path

from sglang import Engine

from econoserve import demo_model

MOST_RUNNING = 40
NEW_TOKENS = 50


def requests():
    """A crowd whose batch shrinks from all to one, then a few requests for log-probabilities.

    Returns:
        Two lists of keyword arguments of ``Engine.async_generate``.
    """
    rng = random.Random(11)

    def ids(count):
        return [rng.randrange(5, 4000) for _ in range(count)]

    prefixes = [ids(70), ids(33), ids(130)]
    crowd = []
    for number in range(MOST_RUNNING):
        prefix = prefixes[number % 3] if number % 2 else []
        prompt = prefix + ids(rng.choice((1, 2, 20, 31, 63, 64, 65)))
        params = {"temperature": 0, "max_new_tokens": NEW_TOKENS + number, "ignore_eos": True}
        crowd.append({"input_ids": prompt, "sampling_params": params})
    scored = [
        {
            "input_ids": prefixes[number % 3] + ids(10 + 15 * number),
            "sampling_params": {"temperature": 0, "max_new_tokens": 5 + 3 * number},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        for number in range(6)
    ]
    return crowd, scored


async def run_all(engine, calls):
    return await asyncio.gather(*(engine.async_generate(**call) for call in calls))


def log_probabilities(results, which):
    # The first token of a prompt has none.
    tokens = [token for one in results for token in one["meta_info"][f"{which}_token_logprobs"]]
    return [value for value, *_ in tokens if value is not None]


def serve(operators, **keywords):
    os.environ["ECONOSERVE_CPU_OPS"] = operators
    engine = Engine(
        model_path=str(demo_model.ensure()),
        device="cpu",
        random_seed=1,
        max_total_tokens=12_288,
        chunked_prefill_size=64,
        enable_mixed_chunk=True,
        decode_log_interval=1,
        log_level="info",
        **keywords,
    )
    crowd, scored = requests()
    outputs = engine.loop.run_until_complete(run_all(engine, crowd))
    # Again, one at a time as well as together with what is cached now.
    outputs += engine.loop.run_until_complete(run_all(engine, crowd[:7]))
    outputs.append(engine.loop.run_until_complete(engine.async_generate(**crowd[3])))
    with_scores = engine.loop.run_until_complete(run_all(engine, scored))
    result = {
        "ids": [list(one["output_ids"]) for one in outputs + with_scores],
        "cached": [one["meta_info"]["cached_tokens"] for one in outputs],
        "input": log_probabilities(with_scores, "input"),
        "output": log_probabilities(with_scores, "output"),
        "attention_backend": engine.get_server_info()["attention_backend"],
    }
    engine.shutdown()
    return result


def main():
    results = {}
    for name, (operators, keywords) in json.loads(sys.argv[2]).items():
        print(f"ENGINE {name}", flush=True)
        results[name] = serve(operators, **keywords)
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
