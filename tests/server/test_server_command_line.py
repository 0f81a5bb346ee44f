"""The launcher's command line: help, and refusals before anything is started."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from econoserve import demo_model
from econoserve.config import RuntimeConfig, flag_of

RUNNER = Path(__file__).with_name("command_lines.py")
TIMEOUT_S = 120

WRONG_FLAGS = {
    "--econoserve-tfz 64": "did you mean --econoserve-tfs?",
    "--econoserve-kvc-reserv=0.1": "did you mean --econoserve-kvc-reserve?",
    "--econoserve-foo": "unknown flag --econoserve-foo",
    "--econoserve-tfs 0": "--econoserve-tfs=0: give more than 0 tokens",
    "--econoserve-tfs many": "argument --econoserve-tfs",
    "--econoserve-tfs": "argument --econoserve-tfs",
    "--econoserve-kvc-reserve 1.5": "--econoserve-kvc-reserve=1.5: give a share in [0, 1)",
    "--econoserve-rl-quantile 0": "--econoserve-rl-quantile=0.0: give a probability in (0, 1]",
    "--econoserve-window-ms nan": "--econoserve-window-ms=nan",
    "--econoserve-on-error ignore": "argument --econoserve-on-error",
}
UNSUPPORTED = {
    "--speculative-algorithm NGRAM": "drop --speculative-algorithm",
    "--pp-size 2": "drop --pp-size",
    "--enable-priority-scheduling": "drop --enable-priority-scheduling",
    "--schedule-policy lpm": "drop --schedule-policy",
    "--page-size 16": "set --page-size 1",
    "--chunked-prefill-size -1": "give --chunked-prefill-size a positive number",
}
SUPPORTED = (
    "--econoserve-tfs 32 --econoserve-length-order longer",
    "--chunked-prefill-size 256",
    "--attention-backend torch_native",
    "--attention-backend econoserve_cpu",
)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict]:
    """How the launcher ends for each command line of this module."""
    # Without the model, so that a wrong flag is seen before anything is read.
    lines = {line: line.split() for line in (*WRONG_FLAGS, "--help")}
    base = ["--model-path", str(demo_model.ensure()), "--device", "cpu"]
    base += ["--dtype", "float32"]
    lines |= {line: [*base, *line.split()] for line in (*SUPPORTED, *UNSUPPORTED)}
    done = subprocess.run(
        [sys.executable, str(RUNNER)],
        input=json.dumps(list(lines.values())),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(lines, json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_help_shows_our_flags_and_sglangs(outcomes):
    help_ = outcomes["--help"]
    assert help_["status"] == 0
    for name in (field.name for field in fields(RuntimeConfig)):
        assert f"{flag_of(name)}" in help_["stdout"]
    for flag in ("--model-path", "--tp-size", "--max-total-tokens", "--attention-backend"):
        assert f"{flag} " in help_["stdout"]
    assert help_["stdout"].startswith("usage: python -m econoserve.launch_server ")


def assert_refused(outcome: dict, sentence: str) -> None:
    """Status 2, one line on standard error that holds the sentence, and nothing started."""
    assert outcome["status"] == 2, outcome
    last = outcome["stderr"].strip().splitlines()[-1]
    assert last.startswith("python -m econoserve.launch_server: error: "), outcome["stderr"]
    assert sentence in last
    assert "Traceback" not in outcome["stderr"]
    assert not outcome["launched"]
    assert outcome["children"] == 0


@pytest.mark.parametrize("line", WRONG_FLAGS)
def test_wrong_flag_is_refused(outcomes, line):
    assert_refused(outcomes[line], WRONG_FLAGS[line])


@pytest.mark.parametrize("line", UNSUPPORTED)
def test_unsupported_combination_is_refused(outcomes, line):
    assert_refused(outcomes[line], UNSUPPORTED[line])


@pytest.mark.parametrize("line", SUPPORTED)
def test_supported_command_line_reaches_the_server(outcomes, line):
    assert outcomes[line]["launched"], outcomes[line]["stderr"]
    assert outcomes[line]["status"] is None


STOCK = """
import os
from sglang.srt.managers import scheduler, tokenizer_manager
from sglang.srt.plugins import load_plugins

for setting in (None, "0", "1"):
    # A process for each setting; what takes long, loading SGLang, is done once.
    if os.fork() == 0:
        if setting is not None:
            os.environ["ECONOSERVE"] = setting
        load_plugins()
        owners = scheduler.Scheduler.__module__, tokenizer_manager.TokenizerManager.__module__
        print("ECONOSERVE", setting, *owners, flush=True)
        os._exit(0)
    os.wait()
"""


def test_stock_sglang_keeps_its_classes_unless_armed():
    environment = {name: value for name, value in os.environ.items() if "ECONOSERVE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", STOCK],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment,
    )
    printed = [line for line in done.stdout.splitlines() if line.startswith("ECONOSERVE ")]
    upstream = "sglang.srt.managers.scheduler sglang.srt.managers.tokenizer_manager"
    ours = "econoserve.runtime.scheduler econoserve.patches.request_intake"
    assert printed == [
        f"ECONOSERVE None {upstream}",
        f"ECONOSERVE 0 {upstream}",
        f"ECONOSERVE 1 {ours}",
    ], done.stderr[-2000:]
