"""The check's engines: what they are told, how long they are waited for, when they end."""

import asyncio
import os
import sys
import time
from types import SimpleNamespace

import pytest

from benchmark.gpu import worker
from benchmark.gpu.context import Check
from benchmark.gpu.pair import SYSTEMS, Engine, EngineFailed, Engines, Setup
from benchmark.gpu.results import Results
from benchmark.gpu.sizes import CPU_QUICK, CUDA_FULL, Device
from benchmark.gpu.stages import correctness_setup

# Answers with its process id after so many seconds.
WORKER = """
import os, sys, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
pipe.recv()
pipe.send({"start_s": 0.5})
while (message := pipe.recv()) is not None:
    time.sleep(message[1]["seconds"])
    pipe.send({"result": {"pid": os.getpid()}})
"""


def _setup(limit_s=60.0, **more):
    return Setup({}, (1, 2), (3,), 8, limit_s, **more)


@pytest.fixture
def fake_worker(tmp_path, monkeypatch):
    """Workers that start at once; Python is called as ``python -m MODULE FILE_DESCRIPTOR``."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$3"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return tmp_path


@pytest.mark.parametrize(
    ("limit_s", "left_s", "reason"),
    [(0.3, 60.0, "no answer in 0 s"), (60.0, 1.5, "the check's time is over: raise --limit-s")],
)
def test_an_answer_is_waited_for_until_its_limit_or_the_checks(
    fake_worker, limit_s, left_s, reason
):
    began_s = time.monotonic()
    engine = Engine("stock", _setup(limit_s), fake_worker / "log", began_s + left_s)
    try:
        assert engine.wait() == engine.start_s == 0.5
        with pytest.raises(EngineFailed, match=reason):
            engine.ask("anything", seconds=30)
    finally:
        engine.kill()
    assert time.monotonic() - began_s < 10


def test_engines_go_on_while_the_setup_is_the_same(fake_worker):
    engines = Engines()

    def pids(systems, setup):
        with engines.use(systems, setup, fake_worker) as running:
            assert list(running) == list(systems)
            return [one.ask("anything", seconds=0)["pid"] for one in running.values()]

    (first,) = pids(["econoserve"], _setup())
    both = pids(SYSTEMS, _setup())
    assert both[SYSTEMS.index("econoserve")] == first
    assert pids(SYSTEMS, _setup()) == both
    others = pids(SYSTEMS, _setup(environment={"A": "1"}))
    assert not set(others) & set(both)
    for pid in both:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(ZeroDivisionError), engines.use(SYSTEMS, _setup(), fake_worker):
        raise ZeroDivisionError
    with pytest.raises(ProcessLookupError):
        os.kill(others[0], 0)
    assert set(pids(SYSTEMS, _setup())).isdisjoint(others)
    engines.close()


def test_float32_runs_without_kernels_that_lack_it(tmp_path):
    check = Check(Device.CUDA, CUDA_FULL, tmp_path, Results(tmp_path))
    for dtype, backend in (("float32", "torch"), ("bfloat16", None)):
        setup = correctness_setup(check, dtype)
        for system in SYSTEMS:
            environment = setup.job(system)["environment"]
            assert environment.get("SGLANG_FORCE_FUSED_OP_BACKEND") == backend
        assert (setup.engine["attention_backend"] == "torch_native") == (backend == "torch")


def test_the_environment_is_there_before_the_engine(monkeypatch):
    monkeypatch.setenv("ECONOSERVE", "1")
    monkeypatch.setenv("A_SWITCH", "off")
    seen, sent = {}, []

    class FakeBench:
        def __init__(self, job):
            seen.update(os.environ)
            self.engine = SimpleNamespace(shutdown=lambda: None)

        def state(self):
            return {}

    jobs = iter([_setup(environment={"A_SWITCH": "on"}).job("econoserve"), None])
    monkeypatch.setattr(worker, "Bench", FakeBench)
    worker.serve(SimpleNamespace(recv=lambda: next(jobs), send=sent.append))
    assert seen["A_SWITCH"] == "on"
    assert "ECONOSERVE" not in seen
    assert list(sent[0]) == ["start_s"]


class ScriptedBench(worker.Bench):
    """One whose requests take 10 ms an iteration, and 30 ms with a prompt; two for each."""

    def __init__(self, least_tokens):
        self.engine = SimpleNamespace(loop=asyncio.new_event_loop())
        self.least_tokens = least_tokens
        self.asked = []

    async def _together(self, running, context_tokens, tokens, prompts):
        self.asked.append((tokens, len(prompts)))
        started = 3
        seconds = (tokens - 1) * 0.010 + 2 * len(prompts) * 0.020
        return worker.Together(seconds, started + 2 * len(prompts), tokens >= self.least_tokens)


@pytest.mark.parametrize("least_tokens", [0, 300])
def test_what_a_prompt_adds_is_told_by_the_run_without(monkeypatch, least_tokens):
    monkeypatch.setattr(worker, "flush", lambda engine: None)
    bench = ScriptedBench(least_tokens)
    found = bench.mixed(running=4, context_tokens=16, prompt_tokens=512, prompts=6)
    # Iterations with prompts of those that begin to decode are in both runs.
    assert found["iterations"] == 12
    assert found["tokens"] == 256
    assert found["added_ms"] == pytest.approx(20.0)
    assert found["alone_ms"] == pytest.approx(10.0)
    assert found["decoded"] >= least_tokens
    assert bench.asked[-1] == (found["decoded"], 0)


def test_prompts_that_outlast_all_decoding_are_an_error(monkeypatch):
    monkeypatch.setattr(worker, "flush", lambda engine: None)
    with pytest.raises(RuntimeError, match="give fewer or shorter"):
        ScriptedBench(10**6).mixed(running=1, context_tokens=16, prompt_tokens=8, prompts=2)


def test_the_deadline_is_the_checks(tmp_path):
    sizes = CPU_QUICK
    check = Check(Device.CPU, sizes, tmp_path, Results(tmp_path), deadline_s=time.monotonic() - 1)
    setup = _setup()
    with pytest.raises(EngineFailed, match="time is over"), check.use(setup, "kernels"):
        pass
