"""A worker for ``test_tensor_parallel``: two ranks on a CPU, a burst with SLOs, then the state."""

import asyncio
import json
import os
import random

from econoserve import Engine, demo_model


async def burst(engine):
    rng = random.Random(3)
    calls = []
    for number in range(40):
        params = {"temperature": 0, "max_new_tokens": rng.randrange(2, 60)}
        if number % 2:
            params["custom_params"] = {"econoserve": {"e2e_ms": rng.randrange(100, 5000)}}
        ids = [rng.randrange(5, 4000) for _ in range(rng.randrange(2, 200))]
        calls.append(engine.async_generate(input_ids=ids, sampling_params=params))
    return await asyncio.gather(*calls)


def main():
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"
    engine = Engine(
        model_path=str(demo_model.ensure()),
        device="cpu",
        dtype="float32",
        tp_size=2,
        max_total_tokens=768,
        econoserve_tfs=48,
        econoserve_parked_kvc=0.5,
        econoserve_rl_prior=4,
        econoserve_on_error="crash",
    )
    outputs = engine.loop.run_until_complete(burst(engine))
    state = engine.get_server_info()["internal_states"][0]["econoserve"]
    print("RESULT " + json.dumps({"answers": len(outputs), "state": state}), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
