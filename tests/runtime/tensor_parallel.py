"""A worker for two ranks or replicas on a CPU: some of the cases with SLOs, then the states.

Run as a program in a process of its own: ``tensor_parallel.py OUTPUT.json KEYWORDS.json``.
"""

import json
import os
import random
import sys
from pathlib import Path

from cases import essence, requests, run_all

from econoserve import Engine, demo_model

EVERY = 4
"""One of so many cases runs."""


def some_with_slos(fixed=None):
    """Every fourth case; half of them with an SLO, which changes the order but no output."""
    rng = random.Random(3)
    some = dict(list(requests().items())[::EVERY])
    for number, keywords in enumerate(some.values()):
        if number % 2:
            slo = fixed or {"e2e_ms": rng.randrange(100, 5000)}
            keywords["sampling_params"]["custom_params"] = {"econoserve": slo}
    return some


def main():
    output, options = sys.argv[1], json.loads(sys.argv[2])
    cases = some_with_slos(options.pop("slo", None))
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"
    engine = Engine(
        model_path=str(demo_model.ensure()),
        device="cpu",
        dtype="float32",
        random_seed=1,
        max_total_tokens=768,
        econoserve_tfs=48,
        econoserve_parked_kvc=0.5,
        econoserve_on_error="crash",
        # On a slow machine most would be late, and then step back instead of parking.
        econoserve_late="serve",
        econoserve_check_books=True,
        econoserve_check_ranks=1,
        **options,
    )
    outputs = engine.loop.run_until_complete(run_all(engine, cases))
    engine.flush_cache()
    states = [state["econoserve"] for state in engine.get_server_info()["internal_states"]]
    result = {"outputs": dict(zip(cases, map(essence, outputs), strict=True)), "states": states}
    Path(output).write_text(json.dumps(result))
    engine.shutdown()


if __name__ == "__main__":
    main()
