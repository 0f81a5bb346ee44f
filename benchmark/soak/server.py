"""The server under soak: start it, ask what it holds, end it.

Owns its processes, which live in a session of their own. It must never signal another.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx

from benchmark.cpu_engine.processes import session_members
from econoserve import demo_model

START_S, STOP_S, POLL_S = 240.0, 20.0, 0.1
LOG_TAIL_LINES = 60
IN_USE = ("claims", "held_tokens", "promised_tokens", "hosted_tokens", "offloaded_tokens")
QUEUES = ("waiting", "prefilling", "ready", "running", "parked")


class ServerEnded(RuntimeError):
    """The server died; the message holds the end of its log."""


class Server:
    """One EconoServe on the demo model in float32, which stops at the first error of its own.

    Args:
        log: file that takes what it prints.
        kvc_tokens: size of the KVC.
        flags: further flags.
    """

    def __init__(self, log: Path, kvc_tokens: int, flags: Sequence[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = log
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "econoserve.launch_server", "--port", str(port)]
        command += ["--model-path", str(demo_model.ensure()), "--device", "cpu"]
        command += ["--dtype", "float32", "--max-total-tokens", str(kvc_tokens)]
        command += ["--log-level-http", "warning", "--econoserve-on-error", "crash"]
        command += ["--econoserve-check-books", *flags]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
        }
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._http = httpx.Client(base_url=self.url, timeout=60.0)

    def __enter__(self) -> Self:
        """Wait until it serves."""
        deadline_s = time.monotonic() + START_S
        while not self._is_up():
            if time.monotonic() > deadline_s:
                raise self._ended(f"not up within {START_S:g} s")
            time.sleep(POLL_S)
        return self

    def __exit__(self, *_: object) -> None:
        """End what is left of it."""
        while members := session_members(self._process.pid):
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)
        self._process.wait()
        self._http.close()

    def _ended(self, reason: str) -> ServerEnded:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return ServerEnded("\n".join((f"the server: {reason}; its log ends with", *lines)))

    def _is_up(self) -> bool:
        self.assert_alive()
        try:
            return self._http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def assert_alive(self) -> None:
        """Raise ``ServerEnded`` if it has died."""
        if self._process.poll() is not None:
            raise self._ended(f"ended with status {self._process.returncode}")

    def state(self) -> dict[str, Any]:
        """The scheduler's books and counters."""
        self.assert_alive()
        try:
            reply = self._http.get("/server_info")
        except httpx.TransportError as error:
            raise self._ended(f"no scheduler answers ({error!r})") from None
        return reply.json()["internal_states"][0]["econoserve"]

    def left_over(self, timeout_s: float) -> dict[str, int]:
        """Wait until it holds nothing.

        Args:
            timeout_s: limit.

        Returns:
            What is still queued or claimed then, by name; empty as it should be.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            state = self.state()
            left = {name: state[name] for name in (*IN_USE, *QUEUES) if state[name]}
            if not left or time.monotonic() > deadline_s:
                return left
            time.sleep(POLL_S)

    def used_after_flush(self) -> int:
        """Empty the prefix cache.

        Returns:
            Tokens of KVC in use after that; -1 if the server refused.
        """
        if self._http.post("/flush_cache").status_code != 200:
            return -1
        return self._http.get("/v1/loads").json()["loads"][0]["num_used_tokens"]

    def stop(self) -> int:
        """Ask it to stop.

        Returns:
            Its exit status; -9 if it did not stop in time.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
