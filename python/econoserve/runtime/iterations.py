"""A log of what iterations computed and how long each took, to make a profile for the simulator.

Owns the file. It holds counts and times, and nothing of any request.
"""

import json
import time
from pathlib import Path
from typing import IO

from econoserve.config import RuntimeConfig
from econoserve.core.policy import BookedPolicy
from econoserve.core.types import Launch
from econoserve.runtime.building import Machine
from econoserve.runtime.learning import Place


def iteration_log(config: RuntimeConfig, machine: Machine, place: Place) -> "IterationLog | None":
    """The log of this process.

    Args:
        config: the settings.
        machine: the engine.
        place: of this process.

    Returns:
        The log; ``None`` if none is wanted, or another rank writes it.
    """
    if config.iteration_log is None or not place.writes:
        return None
    suffix = "" if place.replica is None else f".{place.replica}"
    header = {
        "kvc_tokens": machine.capacity_tokens,
        "bytes_per_token": machine.bytes_per_token,
        "context_tokens": machine.context_tokens,
    }
    return IterationLog(Path(config.iteration_log + suffix), header)


class IterationLog:
    """Writes a line for each iteration that another one followed at once.

    The time of an iteration is from its launch to the next one's: the engine's own work is in it.

    Args:
        path: of the file; what was there is lost.
        header: its first line.
    """

    def __init__(self, path: Path, header: dict[str, int]) -> None:
        self._file: IO[str] = path.open("w", encoding="utf-8")
        self._write(header)
        self._under_way: tuple[dict[str, int], float] | None = None

    def launched(self, launch: Launch, policy: BookedPolicy) -> None:
        """An iteration was launched, or there was nothing to launch.

        Args:
            launch: the iteration.
            policy: knows the tasks in it; told of the launch already.
        """
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
            "context_tokens": policy.ledger.decoding_tokens,
        }
        self._under_way = work, now_s

    def _write(self, fields: dict[str, int | float]) -> None:
        self._file.write(json.dumps(fields, separators=(",", ":")) + "\n")
