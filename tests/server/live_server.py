"""A real server for the tests: start it, ask what it holds, stop it and see that nothing is left.

Owns the server's processes. They live in a session of their own, so that every one of them is
found, whoever its parent is now.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from econoserve import demo_model

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 40.0
DRAIN_TIMEOUT_S = 30.0
STATE_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 60.0
POLL_S = 0.05
LOG_TAIL_LINES = 100

KVC_TOKENS = 1024
FLAGS = (
    *("--device", "cpu", "--dtype", "float32"),
    *("--max-total-tokens", str(KVC_TOKENS), "--econoserve-tfs", "64"),
    *("--log-level-http", "warning", "--sleep-on-idle"),
    *("--econoserve-on-error", "crash", "--constrained-json-disable-any-whitespace"),
)
SHORT_SIGHTED = (
    *("--econoserve-check-books", "--econoserve-kvc-reserve", "0"),
    *("--econoserve-rl-prior", "2", "--econoserve-rl-quantile", "0.02"),
    *("--econoserve-predictor", "quantile", "--econoserve-kvc-risk", "0.95"),
)
"""Flags of a server without a reserve that takes every answer for far too short at first."""
METRICS = ("--enable-metrics",)
"""Flags of a server with Prometheus metrics."""
HELD = ("claims", "held_tokens", "promised_tokens", "waiting", "prefilling", "ready", "running")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Poll until ``condition()`` is true and return its value; ``TimeoutError`` if it is not."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(POLL_S)
    return value


class LiveServer:
    """One ``econoserve.launch_server`` on the CPU, with a KV cache of ``KVC_TOKENS``."""

    def __init__(self, log: Path, more_flags: tuple[str, ...] = ()) -> None:
        self.log = log
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "econoserve.launch_server", "--port", str(port)]
        command += ["--model-path", str(demo_model.ensure()), *FLAGS, *more_flags]
        environment = {
            **os.environ,
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
            # One thread: several that wait for each other crawl on a machine that is busy.
            "OMP_NUM_THREADS": "1",
        }
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                # Tests that run in the background of a shell ignore it, and so would the server.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.http = httpx.Client(base_url=self.url, timeout=REQUEST_TIMEOUT_S)
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", timeout=REQUEST_TIMEOUT_S, max_retries=0
        )
        self.model = "default"

    def wait_until_up(self) -> None:
        """Wait for ``/health``; a server that dies on the way fails the test with its log."""
        try:
            wait_until(self._is_up, START_TIMEOUT_S, "the server is up")
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log_tail()}") from None

    def _is_up(self) -> bool:
        self.assert_alive()
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def assert_alive(self) -> None:
        """Fail with the end of the log if the server has died."""
        status = self.process.poll()
        assert status is None, f"the server ended with status {status}\n{self.log_tail()}"

    def log_tail(self) -> str:
        """The last lines the server wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def state(self) -> dict[str, Any]:
        """The scheduler's books and counters; fails with the end of the log if it has died."""
        self.assert_alive()
        try:
            reply = self.http.get("/server_info", timeout=STATE_TIMEOUT_S)
        except httpx.TransportError as error:
            raise AssertionError(f"no scheduler answers: {error!r}\n{self.log_tail()}") from None
        return reply.json()["internal_states"][0]["econoserve"]

    def wait_for_every_stage(self) -> None:
        """Wait until some request runs, one is parked and one is queued, all at the same time."""

        def is_mixed() -> bool:
            state = self.state()
            return all(state[stage] for stage in ("running", "parked", "waiting"))

        wait_until(is_mixed, STATE_TIMEOUT_S, "requests in every stage")

    def assert_drained(self) -> None:
        """Wait until the scheduler holds nothing for anybody any more."""
        held: dict[str, int] = {}

        def is_empty() -> bool:
            state = self.state()
            held.clear()
            held.update({name: state[name] for name in (*HELD, "parked") if state[name]})
            return not held

        try:
            wait_until(is_empty, DRAIN_TIMEOUT_S, "drained")
        except TimeoutError:
            raise AssertionError(f"still held after {DRAIN_TIMEOUT_S:.0f} s: {held}") from None
        # SGLang looks for leaks when it becomes idle, after that answer; a leak ends it.
        self.state()

    def tree(self) -> list[psutil.Process]:
        """Every process of the server that is alive."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = os.getsid(process.pid) == self.process.pid
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and fail if any process survives.

        Returns:
            The exit status of the main process.
        """
        try:
            self.process.send_signal(how)
            status = self.process.wait(STOP_TIMEOUT_S)
            wait_until(lambda: not self.tree(), 5.0, "no process of the server is left")
            return status
        finally:
            self.kill()

    def kill(self) -> None:
        """End what is left of the server, one process at a time."""
        for process in self.tree():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        self.http.close()
        self.openai.close()
