"""The processes of a measurement: started in a session each, watched, and ended with all they made.

Owns start, end and CPU time of processes. It must never signal a process that it did not start.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

LOG_TAIL_LINES = 30
GRACE_S = 20.0
KILL_POLL_S = 0.02
CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A system or the load generator failed; the message holds the end of its log."""


class Process:
    """A program that leads a session of its own, with a pipe to its standard input.

    Args:
        name: for messages.
        command: program and arguments.
        environment: its environment.
        log: file that takes what it prints.
        folder: its working folder; by default ours.
    """

    _standard_output: int | None = None  # the log

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        folder: Path | None = None,
    ) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as sink:
            self._popen = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=sink if self._standard_output is None else self._standard_output,
                stderr=sink,
                start_new_session=True,
            )
        self.pid = self._popen.pid

    def __enter__(self) -> Self:
        """Return the process; leaving the block ends it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it and everything in its session."""
        self.stop()

    @property
    def status(self) -> int | None:
        """The exit status, or ``None`` while it runs."""
        return self._popen.poll()

    def wait(self, timeout_s: float) -> int:
        """Wait for its end.

        Args:
            timeout_s: limit.

        Returns:
            The exit status.

        Raises:
            Failed: it did not end in time.
        """
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self.failure(f"did not end within {timeout_s:g} s") from None

    def failure(self, reason: str) -> Failed:
        """Describe what went wrong.

        Args:
            reason: in words.

        Returns:
            An exception to raise.
        """
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        tail = "\n".join(("its log ends with", *lines)) if lines else "its log is empty"
        return Failed(f"{self.name}: {reason}; {tail}")

    def ask_to_stop(self) -> None:
        """Close its input: our workers and guards then end by themselves."""
        with contextlib.suppress(OSError):
            self._popen.stdin.close()

    def stop(self) -> None:
        """Ask it to stop, wait a while, then kill what is left of its session."""
        self.ask_to_stop()
        try:
            self._popen.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            while members := session_members(self.pid):
                for pid in members:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(KILL_POLL_S)
            self._popen.wait()

    def cpu_s(self) -> float:
        """CPU time of all processes that live in its session.

        Returns:
            Seconds since they started.
        """
        return sum(_stat(pid)[1] for pid in session_members(self.pid))

    def busiest_environment(self) -> dict[str, str]:
        """The environment of the process of its session that used the most CPU time.

        Returns:
            Names and values as they were when it started.
        """
        members = session_members(self.pid)
        busiest = max(members, key=lambda pid: _stat(pid)[1], default=self.pid)
        try:
            text = Path(f"/proc/{busiest}/environ").read_bytes().decode(errors="replace")
        except OSError:
            return {}
        return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


class Worker(Process):
    """A process that answers in JSON lines; see ``worker`` for the other end."""

    _standard_output = subprocess.PIPE
    _unread = b""

    def send(self, fields: dict[str, Any]) -> None:
        """Send a request.

        Args:
            fields: plain values.

        Raises:
            Failed: the process has ended.
        """
        try:
            self._popen.stdin.write(json.dumps(fields).encode() + b"\n")
            self._popen.stdin.flush()
        except OSError:
            raise self.failure("ended early") from None

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the answer to a request.

        Args:
            timeout_s: limit.

        Returns:
            The answer.

        Raises:
            Failed: the process has ended, or did not answer in time.
        """
        deadline_s = time.monotonic() + timeout_s
        pipe = self._popen.stdout
        while b"\n" not in self._unread:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
                raise self.failure(f"no answer after {timeout_s:g} s")
            chunk = pipe.read1()
            if not chunk:
                raise self.failure("ended early")
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def stop(self) -> None:
        """Ask it to stop, wait a while, then kill what is left of its session."""
        super().stop()
        self._popen.stdout.close()


def session_members(leader: int) -> list[int]:
    """The processes of a session.

    Args:
        leader: the session's id, which is the process id of its first process.

    Returns:
        Process ids of those that are alive.
    """
    numbers = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    return [pid for pid in numbers if _stat(pid)[0] == leader]


def _stat(pid: int) -> tuple[int, float]:
    """Session and CPU seconds of a process; -1 and 0 if it has ended."""
    try:
        # The name, in parentheses, may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1, 0.0
    if fields[0] in "ZX":  # nobody has waited for it yet
        return -1, 0.0
    return int(fields[3]), (int(fields[11]) + int(fields[12])) / CLOCK_TICKS_PER_S
