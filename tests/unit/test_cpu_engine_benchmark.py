"""The CPU engine's benchmark without an engine: order, processes, figures and reports."""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmark.cpu_engine import peer  # noqa: E402
from benchmark.cpu_engine.command import build_parser, sizes_of  # noqa: E402
from benchmark.cpu_engine.figures import BURST, DECODE, OPEN, Sample, headline, tables  # noqa: E402  # noqa: E402
from benchmark.cpu_engine.measure import FULL, QUICK, Session, rotated  # noqa: E402
from benchmark.cpu_engine.models import FIRST_ORDINARY_TOKEN, MEDIUM, TINY  # noqa: E402
from benchmark.cpu_engine.offline import (  # noqa: E402
    KVC_TOKENS,
    PROMPT_TOKENS,
    Span,
    random_prompts,
)
from benchmark.cpu_engine.processes import (  # noqa: E402
    Failed,
    Process,
    Worker,
    session_members,
)
from benchmark.cpu_engine.report import (  # noqa: E402
    as_json,
    as_markdown,
    command,
    summary_text,
)
from benchmark.cpu_engine.serving import GUARD  # noqa: E402
from benchmark.cpu_engine.systems import (  # noqa: E402
    ECONOSERVE,
    SGLANG,
    SYSTEMS,
    TORCH_NATIVE,
    VLLM,
    environment_of,
    offline_job,
    server_command,
)


def load_values(tokens_per_s: float, tpot_ms: float) -> dict[str, float]:
    return {
        "output_tokens_per_s": tokens_per_s,
        "mean_e2e_ms": 1000.0,
        "mean_ttft_ms": 10.0,
        "mean_tpot_ms": tpot_ms,
    }


SAMPLES = [
    Sample(TINY, DECODE, SGLANG, 0, {"1": 2.0}, {"cores": 1.0, "idle_systems_cores": 0.0}),
    Sample(TINY, DECODE, SGLANG, 1, {"1": 4.0}),
    Sample(TINY, DECODE, SGLANG, 2, {"1": 3.0}),
    Sample(TINY, DECODE, SGLANG, 0, {"128": 12.0}),
    Sample(TINY, DECODE, VLLM, 0, {"1": 1.0}),
    Sample(TINY, DECODE, VLLM, 1, {"1": 4.0}),
    Sample(TINY, BURST, SGLANG, 0, load_values(3000.0, 7.0)),
    Sample(TINY, BURST, VLLM, 0, load_values(2000.0, 6.0)),
    Sample(TINY, OPEN, SGLANG, 0, load_values(500.0, 1.5)),
    Sample(MEDIUM, DECODE, SGLANG, 0, {"1": 20.0}),
]
FACTS = {SGLANG: {"idle_cores": 0.01, "omp_num_threads": None}, VLLM: {"vllm": "1.2.3"}}
SIZES = {TINY: FULL[TINY], MEDIUM: FULL[MEDIUM]}


# What is measured


def test_steps_are_timed_around_a_context_of_200_tokens() -> None:
    for size in FULL.values():
        assert size.span.mean_context_tokens == 200
        assert size.span.steps == 64


def test_everything_fits_the_cache() -> None:
    for size in (*FULL.values(), *QUICK.values()):
        # vLLM takes whole blocks.
        blocks = -(-(PROMPT_TOKENS + size.span.last) // 128)
        assert max(size.batches) * blocks <= KVC_TOKENS // 128


def test_prompts_are_repeatable_and_differ_within_the_first_block() -> None:
    prompts = random_prompts(50, 4096, 1)
    assert prompts == random_prompts(50, 4096, 1) != random_prompts(50, 4096, 2)
    assert {len(prompt) for prompt in prompts} == {PROMPT_TOKENS}
    assert all(FIRST_ORDINARY_TOKEN <= token < 4096 for prompt in prompts for token in prompt)
    assert all(one[:8] != other[:8] for one, other in pairwise(sorted(prompts)))


def test_every_system_goes_first_once() -> None:
    systems = ["a", "b", "c"]
    assert [rotated(systems, repeat)[0] for repeat in range(4)] == ["a", "b", "c", "a"]
    assert all(sorted(rotated(systems, repeat)) == systems for repeat in range(4))
    assert rotated([], 3) == []


# Systems


def test_environments_differ_only_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECONOSERVE", "1")
    monkeypatch.setenv("SGLANG_PLUGINS", "something")
    monkeypatch.setenv("ECONOSERVE_CPU_OPS", "0")
    environments = {name: environment_of(system) for name, system in SYSTEMS.items()}
    assert all("ECONOSERVE" not in found for found in environments.values())
    assert environments[TORCH_NATIVE]["ECONOSERVE_CPU_OPS"] == "0"
    assert environments[TORCH_NATIVE]["SGLANG_PLUGINS"] == "econoserve_cpu"
    assert environments[SGLANG]["SGLANG_PLUGINS"] == "econoserve_cpu"
    assert "ECONOSERVE_CPU_OPS" not in environments[SGLANG]
    assert "SGLANG_PLUGINS" not in environments[ECONOSERVE]
    assert "SGLANG_PLUGINS" not in environment_of(None)


def test_only_torch_native_names_its_attention_backend() -> None:
    for name, system in SYSTEMS.items():
        line = server_command(system, Path("model"), 8192, 1234)
        assert ("--attention-backend" in line) == (name == TORCH_NATIVE)
        assert line[-2:] == ["--port", "1234"] or "1234" in line
        json.dumps(offline_job(system, Path("model"), 48_000))


def test_all_caches_have_one_size() -> None:
    for system in SYSTEMS.values():
        engine = offline_job(system, Path("model"), 48_000)["engine"]
        if system.name == VLLM:
            blocks = engine["num_gpu_blocks_override"] - 1  # vLLM keeps its first block empty
            assert blocks * engine["block_size"] == 48_000
        else:
            assert engine["max_total_tokens"] == 48_000


# Processes


def test_a_worker_answers_whatever_its_engine_prints(tmp_path: Path) -> None:
    script = tmp_path / "echo.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmark.cpu_engine.worker import serve\n"
        "def start(job):\n"
        "    print('noise from the engine')\n"
        "    return (lambda request: {'twice': request['number'] * job['factor']}), {'up': True}\n"
        "serve(start)\n"
    )
    log = tmp_path / "log"
    with Worker("echo", [sys.executable, str(script)], os.environ, log) as worker:
        worker.send({"factor": 2})
        assert worker.receive(30.0) == {"up": True}
        for number in range(3):
            worker.send({"number": number})
            assert worker.receive(30.0) == {"twice": 2 * number}
        worker.ask_to_stop()
        assert worker.wait(30.0) == 0
    assert "noise" in log.read_text()


def test_a_failure_tells_the_end_of_the_log(tmp_path: Path) -> None:
    code = "import sys; print('the reason', file=sys.stderr); sys.exit(3)"
    with (
        Worker("broken", [sys.executable, "-c", code], os.environ, tmp_path / "log") as worker,
        pytest.raises(Failed, match=r"broken: ended early; its log ends with\nthe reason"),
    ):
        worker.receive(30.0)


def test_a_late_answer_is_a_failure(tmp_path: Path) -> None:
    code = "import sys; sys.stdin.read()"
    with (
        Worker("slow", [sys.executable, "-c", code], os.environ, tmp_path / "log") as worker,
        pytest.raises(Failed, match=r"slow: no answer after 0\.1 s"),
    ):
        worker.receive(0.1)


def wait_until(condition: object) -> None:
    deadline_s = time.monotonic() + 20.0
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert condition()


def test_nothing_of_a_session_is_left_over(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "subprocess.Popen(child, process_group=0)\n"
        "sys.stdin.read()\n"
    )
    log = tmp_path / "log"
    with Process("parent", [sys.executable, "-c", code], os.environ, log) as parent:
        wait_until(lambda: len(session_members(parent.pid)) == 2)
        assert parent.cpu_s() >= 0.0
    assert session_members(parent.pid) == []


def test_the_guard_stops_its_server_when_the_benchmark_is_gone(tmp_path: Path) -> None:
    server = [sys.executable, "-c", "import time; time.sleep(600)"]
    command_line = [sys.executable, "-P", str(GUARD), *server]
    with Process("server", command_line, os.environ, tmp_path / "log") as guarded:
        wait_until(lambda: len(session_members(guarded.pid)) == 2)
        guarded.ask_to_stop()  # as the kernel does when the benchmark dies
        guarded.wait(20.0)
        wait_until(lambda: session_members(guarded.pid) == [])


class FakeEngine:
    """Stands in for an offline engine; the process is real and does nothing."""

    def __init__(self, name: str, folder: Path, *, breaks: bool) -> None:
        code = "import sys; sys.stdin.read()"
        self.process = Process(name, [sys.executable, "-c", code], os.environ, folder / name)
        self._breaks = breaks

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()

    def wait_until_ready(self) -> dict[str, float]:
        return {"start_s": 0.0}

    def run(self, batch: int, output_tokens: int, timeout_s: float) -> None:
        if self._breaks:
            raise self.process.failure("does not decode")

    def step_ms(self, batch: int, span: Span, timeout_s: float) -> tuple[float, dict[str, float]]:
        return float(batch), {"short_s": 1.0, "long_s": 2.0}


def test_a_system_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "benchmark.cpu_engine.measure.OfflineEngine",
        lambda system, *_: FakeEngine(system.name, tmp_path, breaks=system.name == VLLM),
    )
    monkeypatch.setattr("benchmark.cpu_engine.measure.IDLE_LOOK_S", 0.01)
    monkeypatch.setattr("benchmark.cpu_engine.measure.SETTLE_LOOK_S", 0.01)
    monkeypatch.setattr("benchmark.cpu_engine.measure.DECODE_BUDGET_S", 0.0)
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    said: list[str] = []
    session = Session([SYSTEMS[SGLANG], SYSTEMS[VLLM]], tmp_path, 10.0, said.append)
    session.decode(TINY, tmp_path, QUICK[TINY])
    assert [sample.system for sample in session.samples] == [SGLANG] * 8
    assert headline(session.samples, TINY)["decode_ms"][SGLANG]["128"] == 128.0
    assert len(session.failures) == 1
    assert "does not decode" in session.failures[0]


# Figures


def test_figures_are_medians_with_ranges() -> None:
    decode = tables(SAMPLES)[0]
    spread = decode.spreads[SGLANG]["1"]
    assert (spread.median, spread.lowest, spread.highest) == (3.0, 2.0, 4.0)
    assert [column.key for column in decode.columns] == ["1", "128"]


def test_ratios_are_taken_repeat_by_repeat() -> None:
    decode, burst = tables(SAMPLES)[:2]
    ratio = decode.ratios[SGLANG, VLLM]["1"]
    assert (ratio.lowest, ratio.highest) == (1.0, 2.0)
    assert "128" not in decode.ratios[SGLANG, VLLM]
    assert burst.ratios[SGLANG, VLLM]["output_tokens_per_s"].median == 1.5
    assert (ECONOSERVE, VLLM) not in decode.ratios


def test_headline_has_the_keys_that_targets_are_stated_in() -> None:
    assert headline(SAMPLES, TINY) == {
        "decode_ms": {SGLANG: {"1": 3.0, "128": 12.0}, VLLM: {"1": 2.5}},
        "burst_tokens_per_s": {SGLANG: 3000.0, VLLM: 2000.0},
        "tpot_ms": {SGLANG: 1.5},
    }
    assert headline([], TINY) == {"decode_ms": {}, "burst_tokens_per_s": {}, "tpot_ms": {}}


# Reports


def test_json_is_one_line_with_everything() -> None:
    failures = ["vllm: exit status 1; see /some/where/server.log"]
    arguments = ["--quick", "--json"]
    text = json.dumps(as_json(SAMPLES, SIZES, FACTS, failures, arguments, "2026-01-02"))
    assert "\n" not in text
    found = json.loads(text)
    assert found["decode_ms"][SGLANG]["128"] == 12.0
    assert found["models"][MEDIUM]["decode_ms"] == {SGLANG: {"1": 20.0}}
    assert len(found["samples"]) == len(SAMPLES)
    assert found["failures"] == ["vllm: exit status 1; see server.log"]
    assert found["command"] == "python -m benchmark.cpu_engine.run --quick"
    assert found["environment"]["systems"][VLLM] == {"vllm": "1.2.3"}


def test_summary_shows_every_figure_and_says_who_knows_the_lengths() -> None:
    text = as_markdown(
        summary_text(SAMPLES, SIZES, FACTS, "2026-01-02", "## "), ["--markdown", "page.md"]
    )
    assert text.startswith("# ")
    assert "python -m benchmark.cpu_engine.run\n" in text
    assert "3.00 [2.00, 4.00]" in text
    assert "burst of 200 requests" in text
    assert "context 200 tokens" in text
    assert "vLLM does not use it" in text
    assert str(ROOT) not in text


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ([], ""),
        (["--json", "--quick"], " --quick"),
        (["--quick", "--json"], " --quick"),
        (["--json", "out.json", "--repeats", "2"], " --repeats 2"),
        (["--json=out.json", "--markdown", "page.md", "--skip-vllm"], " --skip-vllm"),
    ],
)
def test_the_command_that_repeats_a_run_writes_no_files(arguments: list[str], kept: str) -> None:
    assert command(arguments) == "python -m benchmark.cpu_engine.run" + kept


# Command line


def parse(*arguments: str) -> tuple[object, dict]:
    parser = build_parser()
    options = parser.parse_args(arguments)
    return options, sizes_of(parser, options)


def test_defaults() -> None:
    options, sizes = parse()
    assert options.systems == list(SYSTEMS)
    assert sizes == FULL
    assert all(size.repeats >= 5 and size.open_repeats >= 5 for size in sizes.values())


def test_quick_measures_the_tiny_model() -> None:
    options, sizes = parse("--quick", "--json")
    assert options.json == "-"
    assert sizes == {TINY: QUICK[TINY]}


def test_choices() -> None:
    options, sizes = parse(
        "--model", "medium", "--skip-vllm", "--repeats", "7", "--batches", "32", "8"
    )
    assert VLLM not in options.systems
    assert list(sizes) == [MEDIUM]
    assert (sizes[MEDIUM].repeats, sizes[MEDIUM].open_repeats) == (7, 7)
    assert sizes[MEDIUM].batches == (8, 32)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--repeats", "0"],
        ["--batches", "0"],
        ["--batches", "500"],
        ["--timeout-s", "0"],
        ["--skip", "decode", "burst", "open"],
        ["--systems", "vllm", "--skip-vllm"],
        ["--systems", "unknown"],
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(*arguments)
    assert refused.value.code == 2


def test_it_starts_as_a_script_and_as_a_module(tmp_path: Path) -> None:
    script = ROOT / "benchmark" / "cpu_engine" / "run.py"
    for command_line, folder in (
        ([sys.executable, str(script), "--help"], tmp_path),
        ([sys.executable, "-m", "benchmark.cpu_engine.run", "--help"], ROOT),
    ):
        shown = subprocess.run(command_line, cwd=folder, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        assert "--skip-vllm" in shown.stdout


def test_a_peer_that_cannot_be_set_up_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "VLLM_PYTHON", tmp_path / "venv" / "bin" / "python")
    (tmp_path / "venv").write_text("a file where the folder should be")
    with pytest.raises(Failed, match="--skip-vllm"):
        peer.ensure(tmp_path, lambda _: None)
