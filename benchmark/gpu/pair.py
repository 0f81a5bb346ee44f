"""Stock SGLang and EconoServe side by side, each in a process of its own, asked in turns.

Owns the processes it starts; all end, with their children, when the pair is closed.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmark.scheduler_comparison.systems import ENVIRONMENTS
from benchmark.scheduler_comparison.worker import ECONOSERVE, STOCK

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = (STOCK, ECONOSERVE)
LOG_TAIL_LINES = 25
STOP_LIMIT_S = 20.0
START_LIMIT_S = 560.0
"""Kernels are compiled while the first engines start."""


class EngineFailed(Exception):
    """An engine did not start, crashed or did not answer; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What both systems are started with.

    Attributes:
        engine: SGLang's arguments.
        token_ids: tokens that prompts are made of.
        eos_ids: tokens that end a response.
        max_new_tokens: the limit that requests of a burst state.
        limit_s: time for one answer of an engine.
        settings: EconoServe's settings by name, without their prefix.
        environment: environment variables of both systems' processes.
    """

    engine: dict[str, Any]
    token_ids: Sequence[int]
    eos_ids: Sequence[int]
    max_new_tokens: int
    limit_s: float
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def job(self, system: str) -> dict[str, Any]:
        """What a worker is told.

        Args:
            system: ``stock`` or ``econoserve``.

        Returns:
            Plain values.
        """
        return {
            "system": system,
            "engine": self.engine,
            "environment": {**ENVIRONMENTS[system], **self.environment},
            "settings": self.settings,
            "token_ids": list(self.token_ids),
            "eos_ids": list(self.eos_ids),
            "max_new_tokens": self.max_new_tokens,
            "run_timeout_s": self.limit_s,
        }


def search_path() -> str:
    """Where engines look for compilers: also beside Python, and where CUDA usually is.

    Returns:
        A value of ``PATH``.
    """
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = (str(Path(sys.executable).parent), os.environ.get("PATH", ""), f"{cuda}/bin")
    return os.pathsep.join(folders)


class Engine:
    """One system in a process of its own.

    Args:
        system: ``stock`` or ``econoserve``.
        setup: what it is started with.
        log: file for what it prints.
        deadline_s: no answer is waited for beyond it, by ``time.monotonic``.

    Attributes:
        system: as given.
        start_s: how long it took to start, once it has been waited for.
    """

    def __init__(self, system: str, setup: Setup, log: Path, deadline_s: float = math.inf) -> None:
        self.system, self._setup, self._log = system, setup, log
        self._deadline_s = deadline_s
        self.start_s: float | None = None
        self._pipe, theirs = Pipe()
        with log.open("wb") as output, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmark.gpu.worker", str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, "PATH": search_path()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._pipe.send(setup.job(system))

    def wait(self) -> float:
        """Wait until it has started; to be called once, before anything is asked.

        Returns:
            Seconds that it took to start.

        Raises:
            EngineFailed: it does not start.
        """
        self.start_s = self._answer(START_LIMIT_S)["start_s"]
        return self.start_s

    def ask(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Have something measured.

        Args:
            name: a method of ``worker.Bench``.
            arguments: its arguments.

        Returns:
            Its result.

        Raises:
            EngineFailed: it raised, crashed or took too long.
        """
        try:
            self._pipe.send((name, arguments))
        except OSError:
            raise self._failed("it has ended") from None
        return self._answer(self._setup.limit_s)["result"]

    def dismiss(self) -> None:
        """Tell it to end, without waiting for it."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)

    def close(self) -> None:
        """End the process and its children; one that was dismissed has a head start."""
        self.dismiss()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_LIMIT_S)
        self.kill()

    def _answer(self, limit_s: float) -> dict[str, Any]:
        pipe: Connection = self._pipe
        left_s = max(self._deadline_s - time.monotonic(), 0.0)
        if not pipe.poll(min(limit_s, left_s)):
            if left_s < limit_s:
                raise self._failed("the check's time is over: raise --limit-s, or go on later")
            raise self._failed(f"no answer in {limit_s:.0f} s")
        try:
            answer = pipe.recv()
        except EOFError:
            raise self._failed("it has ended") from None
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer

    def _failed(self, reason: str) -> EngineFailed:
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        return EngineFailed(f"{self.system}: its log ends with\n{tail}\n{self.system}: {reason}")

    def kill(self) -> None:
        """End the process and its children at once."""
        # SGLang's processes are in the worker's session, so nothing is left over.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._pipe.close()


class Engines:
    """Engines that go on running from stage to stage while their setup stays the same.

    Starting them takes longer than most of what is measured. Stages must leave them idle.
    """

    def __init__(self) -> None:
        self._running: dict[str, Engine] = {}
        self._setup: Setup | None = None

    @contextlib.contextmanager
    def use(
        self, systems: Sequence[str], setup: Setup, logs: Path, deadline_s: float = math.inf
    ) -> Iterator[dict[str, Engine]]:
        """Have systems run with a setup; the KVC of all must fit the memory.

        Those that run with another one end first; those that are missing start at once. If what
        uses them raises, all end.

        Args:
            systems: which.
            setup: what they are started with.
            logs: folder for what they print.
            deadline_s: no answer is waited for beyond it, by ``time.monotonic``.

        Yields:
            The engines by system.

        Raises:
            EngineFailed: one does not start.
        """
        if setup != self._setup:
            self.close()
            self._setup = setup
        try:
            missing = [system for system in systems if system not in self._running]
            for system in missing:
                log = logs / f"{system}.log"
                self._running[system] = Engine(system, setup, log, deadline_s)
            for system in missing:
                self._running[system].wait()
            yield {system: self._running[system] for system in systems}
        except BaseException:
            for engine in self._running.values():
                engine.kill()
            self._running.clear()
            raise

    def close(self) -> None:
        """End all of them."""
        for engine in self._running.values():
            engine.dismiss()
        for engine in self._running.values():
            engine.close()
        self._running.clear()


def turns(repeats: int) -> list[tuple[int, str]]:
    """The order of measurements.

    Args:
        repeats: of each system.

    Returns:
        Number of the repeat and system: the one that goes first changes with every repeat.
    """
    return [
        (repeat, system)
        for repeat in range(repeats)
        for system in (SYSTEMS if repeat % 2 == 0 else SYSTEMS[::-1])
    ]
