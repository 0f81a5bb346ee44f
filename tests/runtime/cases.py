"""Requests whose greedy outputs must not depend on the scheduler, and a worker that runs them.

Run as a program in a process of its own: ``cases.py SYSTEM OUTPUT.json KEYWORDS.json``.
"""

import asyncio
import json
import random
import sys
from pathlib import Path

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }
)


def random_ids(rng, count):
    return [rng.randrange(5, 4000) for _ in range(count)]


def requests(seed=7):
    """Build the requests.

    Returns:
        A dict from name to keyword arguments of ``Engine.async_generate``.
    """
    rng = random.Random(seed)
    cases = {}

    def add(name, params=None, **keywords):
        cases[name] = {"sampling_params": {"temperature": 0, **(params or {})}, **keywords}

    for number in range(130):
        prompt = random_ids(rng, rng.choice((1, 2, rng.randrange(3, 60), rng.randrange(60, 420))))
        add(
            f"plain-{number}",
            {"max_new_tokens": rng.choice((1, 2, rng.randrange(3, 40), rng.randrange(40, 130)))},
            input_ids=prompt,
            stream=number % 3 == 0,
        )
    prefixes = [random_ids(rng, 160) for _ in range(3)]
    for number in range(36):
        prompt = prefixes[number % 3] + random_ids(rng, rng.randrange(1, 50))
        add(f"prefix-{number}", {"max_new_tokens": rng.randrange(2, 60)}, input_ids=prompt)
    words = "the quick brown fox jumps over a lazy dog and then sleeps all day long".split()
    for number in range(12):
        text = " ".join(rng.choice(words) for _ in range(rng.randrange(4, 60)))
        stop = rng.sample(["e", "a", "th", " s", "o"], 2)
        add(
            f"stop-{number}",
            {"max_new_tokens": 60, "stop": stop},
            prompt=text,
            stream=number % 2 == 1,
        )
    for number in range(8):
        add(
            f"several-{number}",
            {"max_new_tokens": rng.randrange(5, 40), "n": 3},
            input_ids=random_ids(rng, rng.randrange(5, 80)),
        )
    for number in range(8):
        add(
            f"regex-{number}",
            {"max_new_tokens": 40, "regex": r"[a-f]{3,20}-[0-9]{2,4}"},
            input_ids=random_ids(rng, rng.randrange(5, 90)),
        )
    for number in range(8):
        add(
            f"schema-{number}",
            {"max_new_tokens": 60, "json_schema": SCHEMA},
            input_ids=random_ids(rng, rng.randrange(5, 90)),
        )
    for number in range(8):
        add(
            f"logprob-{number}",
            {"max_new_tokens": rng.randrange(3, 30)},
            input_ids=random_ids(rng, rng.randrange(5, 90)),
            return_logprob=True,
            top_logprobs_num=2,
        )
    for number in range(6):
        add(
            f"penalty-{number}",
            {"max_new_tokens": 25, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
            input_ids=random_ids(rng, rng.randrange(5, 90)),
        )
    return cases


def essence(output):
    """What must be equal: tokens, text, why it ended, and log-probabilities to float32 noise."""
    if isinstance(output, list):
        return [essence(one) for one in output]
    meta = output["meta_info"]
    result = {
        "ids": list(output["output_ids"]),
        "text": output["text"],
        "finish": meta["finish_reason"],
    }
    if "output_token_logprobs" in meta:
        result["logprobs"] = [round(one[0], 6) for one in meta["output_token_logprobs"]]
        result["top"] = [[pair[1] for pair in one] for one in meta["output_top_logprobs"]]
    return result


async def run_all(engine, cases):
    async def run(keywords):
        result = await engine.async_generate(**keywords)
        if keywords.get("stream"):
            final = None
            async for chunk in result:
                final = chunk
            return final
        return result

    return await asyncio.gather(*(run(keywords) for keywords in cases.values()))


def main():
    system, output, options = sys.argv[1:4]
    if system == "stock":
        from sglang import Engine
    else:
        from econoserve import Engine
    from econoserve import demo_model

    settings = json.loads(options)
    every, slo = settings.pop("every", 1), settings.pop("slo", None)
    engine = Engine(
        model_path=str(demo_model.ensure()),
        device="cpu",
        dtype="float32",
        random_seed=1,
        **settings,
    )
    cases = dict(list(requests().items())[::every])
    for keywords in cases.values() if slo else ():
        keywords["sampling_params"]["custom_params"] = {"econoserve": slo}
    outputs = engine.loop.run_until_complete(run_all(engine, cases))
    engine.flush_cache()
    state = engine.get_server_info()["internal_states"][0]
    result = {
        "outputs": dict(zip(cases, map(essence, outputs), strict=True)),
        "reports": [
            one["meta_info"].get("econoserve")
            for output in outputs
            for one in (output if isinstance(output, list) else [output])
        ],
        "state": state.get("econoserve"),
    }
    Path(output).write_text(json.dumps(result))
    engine.shutdown()


if __name__ == "__main__":
    main()
