"""Servers under load: all up at once, one measured at a time by ``sglang.bench_serving``.

Owns the servers and the load generator. The same generator, in a process of its own, measures all
systems.
"""

import json
import math
import random
import socket
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmark.cpu_engine.processes import Failed, Process, Worker
from benchmark.cpu_engine.systems import ROOT, System, environment_of, server_command

GUARD = Path(__file__).with_name("guard.py")
START_TIMEOUT_S = 300.0
POLL_S = 0.3
KVC_TOKENS = 8_192
LONGEST_TOKENS = 256
RANGE_RATIO = 0.1
"""Lengths of prompts and responses are uniform from this share of the longest to the longest."""

METRICS = {
    "output_tokens_per_s": "output_throughput",
    "mean_e2e_ms": "mean_e2e_latency_ms",
    "mean_ttft_ms": "mean_ttft_ms",
    "mean_tpot_ms": "mean_tpot_ms",
}
"""Our names of the figures we keep, and ``bench_serving``'s."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent to a server.

    Attributes:
        requests: how many.
        rate_per_s: arrivals per second; infinite for a burst.
    """

    requests: int
    rate_per_s: float = math.inf


class Client:
    """The load generator in a process of its own, the same for all systems.

    Args:
        logs: folder for what it prints.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._result = logs / "result.jsonl"
        self._process: Worker | None = None
        self._is_ready = False

    def __enter__(self) -> Self:
        """Start the client; leaving the block ends it."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.stop()

    def stop(self) -> None:
        """End it; the next ``send`` starts another one."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def start(self) -> Worker:
        """Start it unless it is up; do not wait for it.

        Returns:
            Its process.
        """
        if self._process is None:
            self._process = Worker(
                "bench_serving",
                [sys.executable, "-m", "benchmark.cpu_engine.client"],
                environment_of(None),
                self._logs / "client.log",
                ROOT,
            )
            self._process.send({})
            self._is_ready = False
        return self._process

    def send(
        self, system: System, port: int, model: Path, load: Load, seed: int, timeout_s: float
    ) -> dict[str, Any]:
        """Empty a server's prefix cache, send it requests, and time the answers.

        Args:
            system: whose server.
            port: its port on 127.0.0.1.
            model: the model's folder.
            load: what is sent.
            seed: of lengths, prompts and arrivals.
            timeout_s: limit.

        Returns:
            What ``bench_serving`` writes to its output file.

        Raises:
            Failed: it failed, or not every request was answered.
        """
        self._result.unlink(missing_ok=True)
        options = {
            "backend": system.client,
            "host": "127.0.0.1",
            "port": port,
            "model": model,
            "dataset-name": "random-ids",
            "random-input-len": LONGEST_TOKENS,
            "random-output-len": LONGEST_TOKENS,
            "random-range-ratio": RANGE_RATIO,
            "num-prompts": load.requests,
            "request-rate": load.rate_per_s,
            "seed": seed,
            "output-file": self._result,
        }
        arguments = ["--flush-cache", "--disable-tqdm"]
        for name, value in options.items():
            arguments += [f"--{name}", str(value)]
        process = self.start()
        try:
            if not self._is_ready:
                process.receive(START_TIMEOUT_S)
                self._is_ready = True
            process.send({"arguments": arguments})
            status = process.receive(timeout_s)["status"]
        except Failed:
            self.stop()  # so that a late answer is not taken for the next one
            raise
        where = f"against {system.name}"
        if status != 0 or not self._result.exists():
            raise process.failure(f"exit status {status} {where}")
        found = json.loads(self._result.read_text())
        if found["completed"] != load.requests:
            raise process.failure(
                f"{found['completed']} of {load.requests} requests were answered {where}"
            )
        return found


class Server:
    """A system's server in a process of its own.

    Args:
        system: the system.
        model: the model's folder.
        logs: folder for what it prints.
        kvc_tokens: size of its KV cache.
    """

    def __init__(
        self, system: System, model: Path, logs: Path, kvc_tokens: int = KVC_TOKENS
    ) -> None:
        self._system, self._model = system, model
        self._port = _free_port()
        self._began_s = time.monotonic()
        command = server_command(system, model, kvc_tokens, self._port)
        self.process = Process(
            f"{system.name}, server",
            [sys.executable, "-P", str(GUARD), *command],
            environment_of(system),
            logs / f"{system.name}-server.log",
        )

    def __enter__(self) -> Self:
        """Return the server; leaving the block ends it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the server and all its processes."""
        self.process.stop()

    def wait_until_ready(self) -> dict[str, Any]:
        """Wait until it answers.

        Returns:
            ``start_s``.

        Raises:
            Failed: it did not start, or runs another attention backend than it should.
        """
        while self.get("/health") is None:
            if self.process.status is not None:
                raise self.process.failure(f"exit status {self.process.status}")
            if time.monotonic() - self._began_s > START_TIMEOUT_S:
                raise self.process.failure(f"not ready after {START_TIMEOUT_S:g} s")
            time.sleep(POLL_S)
        if self._system.attention_backend is not None:
            found = json.loads(self.get("/server_info") or b"{}").get("attention_backend")
            if found != self._system.attention_backend:
                raise self.process.failure(
                    f"attention_backend={found}: this system is measured with "
                    f"{self._system.attention_backend}"
                )
        return {"start_s": time.monotonic() - self._began_s}

    def send(
        self, client: Client, load: Load, seed: int, timeout_s: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Empty the prefix cache, send requests, and time the answers.

        Args:
            client: the load generator.
            load: what is sent.
            seed: of lengths, prompts and arrivals.
            timeout_s: limit.

        Returns:
            A figure for each of ``METRICS``; and the duration and token counts.

        Raises:
            Failed: see ``Client.send``.
        """
        found = client.send(self._system, self._port, self._model, load, seed, timeout_s)
        return {ours: found[theirs] for ours, theirs in METRICS.items()}, {
            "duration_s": found["duration"],
            "input_tokens": found["total_input_tokens"],
            "output_tokens": found["total_output_tokens"],
        }

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._port}"

    def get(self, path: str) -> bytes | None:
        """Ask it.

        Args:
            path: of the address, with its slash.

        Returns:
            The body of the answer, or ``None`` unless its status is 200.
        """
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as got:
                return got.read()
        except (urllib.error.URLError, OSError):
            return None


def _free_port() -> int:
    """A port below those that systems give out by themselves: a server takes some of them."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise Failed("no free port between 20,000 and 32,000")
