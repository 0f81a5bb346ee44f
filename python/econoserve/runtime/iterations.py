"""A log of what iterations computed and how long each took, to make a profile for the simulator.

Owns the file. It holds counts and times, and nothing of any request.
"""

import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from econoserve.config import RuntimeConfig
from econoserve.core.policy import BookedPolicy
from econoserve.core.types import Launch
from econoserve.runtime.building import Machine
from econoserve.runtime.learning import Place

logger = logging.getLogger(__name__)


def log_path(config: RuntimeConfig, replica: int | None) -> Path | None:
    """The file of a replica's log.

    Args:
        config: the settings.
        replica: its number; ``None`` where there is one replica.

    Returns:
        The path, with the replica's number at its end; ``None`` if no log is wanted.
    """
    if config.iteration_log is None:
        return None
    return Path(config.iteration_log + ("" if replica is None else f".{replica}"))


def check_log(config: RuntimeConfig, replicas: int) -> None:
    """Refuse a log that cannot be written, before anything is started.

    Args:
        config: the settings.
        replicas: of the server.

    Raises:
        ValueError: there is no folder for it, or the file cannot be written.
    """
    for replica in range(replicas):
        path = log_path(config, replica if replicas > 1 else None)
        if path is None:
            return
        flag = f"--econoserve-iteration-log={config.iteration_log!r}"
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(
                f"{flag}: {str(path.parent)!r} is no folder that can be written: make it, or name "
                "another file"
            )
        if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
            raise ValueError(f"{flag}: {str(path)!r} cannot be written: name another file")


def iteration_log(config: RuntimeConfig, machine: Machine, place: Place) -> "IterationLog | None":
    """The log of this process.

    Args:
        config: the settings.
        machine: the engine.
        place: of this process.

    Returns:
        The log; ``None`` if none is wanted, or another rank writes it.
    """
    path = log_path(config, place.replica)
    if path is None or not place.writes:
        return None
    header = {
        "kvc_tokens": machine.capacity_tokens,
        # Of all ranks together. Pipeline parallelism is not supported.
        "bytes_per_token": machine.bytes_per_token * machine.tensor,
        "context_tokens": machine.context_tokens,
        "tensor": machine.tensor,
        "pipeline": 1,
    }
    return IterationLog(path, header)


class IterationLog:
    """Writes a line for each iteration that another one followed at once.

    The time of an iteration is from its launch to the next one's: the engine's own work is in it.
    Where the file cannot be written, such as on a full disk, it says so once and writes no more.

    Args:
        path: of the file; what was there is lost.
        header: its first line.
    """

    def __init__(self, path: Path, header: dict[str, float]) -> None:
        self._path = path
        self._file: IO[str] | None = None
        try:
            self._file = path.open("w", encoding="utf-8")
            self._write(header)
        except OSError as error:
            self._give_up(error)
        self._under_way: tuple[dict[str, int], float] | None = None

    def launched(self, launch: Launch, policy: BookedPolicy) -> None:
        """An iteration was launched, or there was nothing to launch.

        Args:
            launch: the iteration.
            policy: knows the tasks in it; told of the launch already.
        """
        if self._file is None:
            return
        try:
            self._count(launch, policy)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Write no more; the server goes on."""
        logger.error("The iteration log %s ends here: %s", self._path, error)
        file, self._file = self._file, None
        if file is not None:
            # What it still holds cannot be written either.
            with suppress(OSError):
                file.close()

    def _count(self, launch: Launch, policy: BookedPolicy) -> None:
        now_s = time.perf_counter()
        if self._under_way is not None:
            work, began_s = self._under_way
            self._write({**work, "seconds": round(now_s - began_s, 7)})
        if not launch.prefilled and not launch.decoded:
            if self._under_way is not None:
                self._file.flush()
            self._under_way = None
            return
        squares = 0
        for part in launch.prefilled:
            known = part.rid in policy.books
            after = policy.books[part.rid].prefilled_tokens if known else 0
            after = max(after, part.cached_tokens + part.tokens)
            squares += after**2 - (after - part.tokens) ** 2
        work = {
            "prompts": len(launch.prefilled),
            "prompt_tokens": sum(part.tokens for part in launch.prefilled),
            "prompt_squares": squares,
            "decoding": len(launch.decoded),
            "context_tokens": policy.ledger.decoding_tokens if launch.decoded else 0,
        }
        self._under_way = work, now_s

    def _write(self, fields: dict[str, int | float]) -> None:
        self._file.write(json.dumps(fields, separators=(",", ":")) + "\n")
