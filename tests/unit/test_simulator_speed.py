"""The simulator's speed: the benchmark says what it measured, and nothing takes minutes."""

import json

from benchmark.simulator.speed import main


def test_the_benchmark_states_its_times(capsys):
    main(["--requests", "1000", "--policy", "plus", "vllm_v1", "--json"])
    first, second, rows = capsys.readouterr().out.splitlines()
    assert first.startswith("plus: ") and second.startswith("vllm_v1: ")
    for row in json.loads(rows):
        assert row["served"] == 1000 and row["iterations"] > 1000
        # A tenth of what is to take less than 10 s, with room for a busy machine.
        assert 0 < row["wall_s"] < 10
