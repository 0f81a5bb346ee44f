"""``econoserve profile``: makes a profile for the simulator from a server's iteration log.

Owns the command, and the log's way into a profile. ``--econoserve-iteration-log`` writes the log.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from econoserve.sim.fitted import FittedTime
from econoserve.sim.fitting import Fit, Timed, fit_time
from econoserve.sim.profile import ProfileError, profile_of
from econoserve.sim.timing import Pass

POINTS = (1, 8, 32, 128, 512, 2048, 8192)
"""Of the line for the tokens of a pass, as far as the log goes."""

HEADER = ("kvc_tokens", "bytes_per_token", "context_tokens", "tensor", "pipeline")
"""What the first line of a log has; the bytes are those of all GPUs together."""

OUTLIER = 10.0
"""An iteration that took so many times what the others suggest was disturbed: a first use of a
kernel, or another program."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments.

    Args:
        parser: of the subcommand.
    """
    add = parser.add_argument
    add("log", type=Path, metavar="LOG", help="what --econoserve-iteration-log wrote")
    add("--out", type=Path, required=True, metavar="FILE.json", help="for the profile")


def main(options: argparse.Namespace) -> int:
    """Run the command.

    Args:
        options: as ``add_arguments`` describes them.

    Returns:
        The exit status: 0, or 2 after an error, which is printed.
    """
    try:
        fields, fit = profile_from(options.log)
        if options.out.suffix != ".json":
            raise ProfileError(f"--out {options.out}: give a name that ends in .json")
        options.out.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    except (ProfileError, OSError) as error:
        print(f"econoserve profile: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.out}: {fit.passes} iterations, mean error {fit.mean_error:.1%}, nine of ten "
        f"below {fit.p90_error:.1%}, error of their sum {fit.total_error:+.2%}"
    )
    return 0


def profile_from(log: Path) -> tuple[dict[str, Any], Fit]:
    """A profile from a log.

    Args:
        log: its path.

    Returns:
        The profile's fields, and how well they fit.

    Raises:
        ProfileError: the log cannot be used.
        OSError: it cannot be read.
    """
    header, timed = read_log(log)
    fit = _fit(timed)
    expected = FittedTime.of(fit.fields)
    kept = [one for one in timed if one.elapsed_s <= OUTLIER * expected.seconds(one.work)]
    fit = _fit(kept)
    # Keys and values take the same.
    size = max(header["bytes_per_token"] // 2, 1) * 2
    gpus = header["tensor"] * header["pipeline"]
    fields = {
        "source": f"time: fitted to {len(kept)} of {len(timed)} iterations of an engine, with a "
        f"mean error of {fit.mean_error:.1%}; the others took {OUTLIER:g} times as long as "
        "expected or longer. Memory: the engine's KVC; its size of a token stands as one head. "
        "host_bytes_per_s: 25 GB/s for each GPU, an assumption.",
        "memory": {
            "gpu_bytes": -(-header["kvc_tokens"] * size // gpus),
            "gpus": gpus,
            "usable_fraction": 1.0,
            "weights_bytes": 0,
            "activation_bytes": 0,
            "layers": 1,
            "kv_heads": 1,
            "head_dim": size // 2,
            "bytes_per_value": 1,
        },
        "context_tokens": header["context_tokens"],
        "host_bytes_per_s": 25e9 * gpus,
        "time": fit.fields,
    }
    profile_of(log.stem, fields)
    return fields, fit


def _fit(timed: Sequence[Timed]) -> Fit:
    longest = max(one.work.prompt_tokens + one.work.decoding for one in timed)
    points = [point for point in POINTS if point < longest]
    return fit_time(timed, [*points, max(longest, 2)])


def read_log(log: Path) -> tuple[dict[str, int], list[Timed]]:
    """Read a log of iterations.

    Args:
        log: its path.

    Returns:
        Its header, and what was timed, at least one iteration.

    Raises:
        ProfileError: the log cannot be used.
        OSError: it cannot be read.
    """
    lines = log.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise ProfileError(
            f"{log.name}: the file is empty; give one that --econoserve-iteration-log wrote, after "
            "the server has served some requests"
        )
    timed: list[Timed] = []
    number = 0
    try:
        header = json.loads(lines[0])
        header = {key: int(header[key]) for key in HEADER}
        if min(header.values()) < 1:
            raise ValueError(f"{header}: all are 1 or more")
        for line in lines[1:]:
            number += 1
            fields = json.loads(line)
            seconds = float(fields.pop("seconds"))
            if seconds > 0:
                timed.append(Timed(Pass(**fields), seconds))
    except (KeyError, TypeError, ValueError) as error:
        # A server that was killed leaves a line half written.
        if number < len(lines) - 1 or not timed:
            raise ProfileError(
                f"{log.name}, line {number + 1}: {error!r}; give a file that "
                "--econoserve-iteration-log wrote"
            ) from None
    if not timed:
        raise ProfileError(f"{log.name}: no iterations; let the server serve some requests")
    return header, timed
