"""Starts the systems under test, one at a time, and brings their measurements home.

Owns the processes it starts: each ends, with all its children, before the next one starts, also
after a timeout or an interrupt.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.scheduler_comparison.worker import ECONOSERVE, STOCK
from benchmark.scheduler_comparison.workload import Request

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = (STOCK, ECONOSERVE)

ENVIRONMENTS = {STOCK: {"SGLANG_PLUGINS": "econoserve_cpu"}, ECONOSERVE: {"SGLANG_PLUGINS": ""}}
"""Stock SGLang loads the CPU platform and no scheduler of ours."""

START_ALLOWANCE_S = 240.0
"""Time for an engine to start and stop."""

LOG_TAIL_LINES = 30


class RunFailed(Exception):
    """A system did not finish its run; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs one system at a time on the same requests.

    Attributes:
        model: folder of the model.
        requests: what is measured.
        warmup: what is sent before, unmeasured.
        eos_ids: the model's EOS tokens.
        max_new_tokens: the limit that every request states; at least the longest response.
        attention_backend: SGLang's attention backend for both.
        timeout_s: limit for the warm-up and for the measured requests, each.
        settings: EconoServe's settings by name, without their prefix.
    """

    model: Path
    requests: Sequence[Request]
    warmup: Sequence[Request]
    eos_ids: Sequence[int]
    max_new_tokens: int
    attention_backend: str = "econoserve_cpu"
    timeout_s: float = 600.0
    settings: dict[str, Any] = field(default_factory=dict)

    def engine_arguments(self, kvc_tokens: int) -> dict[str, Any]:
        """SGLang's arguments for both systems.

        Args:
            kvc_tokens: size of the KV cache in tokens.

        Returns:
            Keyword arguments of the engine.
        """
        return {
            "model_path": str(self.model),
            "device": "cpu",
            "dtype": "float32",
            "max_total_tokens": kvc_tokens,
            "page_size": 1,
            "attention_backend": self.attention_backend,
            "enable_custom_logit_processor": True,
            "random_seed": 1,
            "log_level": "error",
        }

    def run(self, system: str, kvc_tokens: int) -> dict[str, Any]:
        """Start a system, measure it and stop it.

        Args:
            system: ``stock`` or ``econoserve``.
            kvc_tokens: size of the KV cache in tokens.

        Returns:
            What ``worker.measure`` returns.

        Raises:
            RunFailed: it did not start, answer or stop in time, or it crashed.
        """
        with tempfile.TemporaryDirectory(prefix="scheduler-comparison-") as folder:
            result, log_path = Path(folder) / "result.json", Path(folder) / "log"
            job = {
                "system": system,
                "engine": self.engine_arguments(kvc_tokens),
                "environment": ENVIRONMENTS[system],
                "settings": self.settings,
                "requests": [request.to_json() for request in self.requests],
                "warmup": [request.to_json() for request in self.warmup],
                "eos_ids": list(self.eos_ids),
                "max_new_tokens": self.max_new_tokens,
                "run_timeout_s": self.timeout_s,
                "result": str(result),
            }
            try:
                status = self._run_process(json.dumps(job).encode(), log_path)
            except subprocess.TimeoutExpired as error:
                reason = f"no result after {error.timeout:.0f} s"
                raise RunFailed(_failure(system, kvc_tokens, reason, log_path)) from None
            if status != 0 or not result.exists():
                reason = f"exit status {status}"
                raise RunFailed(_failure(system, kvc_tokens, reason, log_path))
            return json.loads(result.read_text())

    def _run_process(self, job: bytes, log_path: Path) -> int:
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmark.scheduler_comparison.worker"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                process.communicate(job, timeout=START_ALLOWANCE_S + 2 * self.timeout_s)
            finally:
                # The engine's own processes are in the worker's session, so nothing is left over.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return process.returncode


def cpu_busy_share(seconds: float = 1.0) -> float | None:
    """How busy the machine is with other things, while nothing of ours runs.

    Args:
        seconds: how long to look.

    Returns:
        Share of the time of all CPUs, in [0, 1]; ``None`` where the system does not tell.
    """
    before = _cpu_ticks()
    time.sleep(seconds)
    after = _cpu_ticks()
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def _cpu_ticks() -> tuple[int, int] | None:
    """Busy and total clock ticks of all CPUs since the machine started."""
    try:
        ticks = [
            int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        ]
    except (OSError, ValueError):
        return None
    idle = sum(ticks[3:5])
    return sum(ticks[:8]) - idle, sum(ticks[:8])


def _failure(system: str, kvc_tokens: int, reason: str, log_path: Path) -> str:
    tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
    return f"{system} with {kvc_tokens} tokens of KVC: {reason}; its log ends with\n{tail}"
