"""A long mixed load on a real server, after which nothing may be left, lost or broken.

Owns the command line and the verdict. ``python -m benchmark.soak.run`` from the root of the
repository; flags it does not know go to the server. Exit status 1 if anything was wrong; the last
line of standard output is a JSON object.
"""

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from benchmark.soak.client import Client
from benchmark.soak.requests import Mix
from benchmark.soak.server import QUEUES, Server, ServerEnded

DRAIN_S = 30.0
LOOK_S = 0.5
SHOWN_PROBLEMS = 20
NEVER = ("allocation_failures", "planning_errors", "rank_divergences")
"""Totals that must be 0 in the end."""


def build_parser() -> argparse.ArgumentParser:
    """The command line.

    Returns:
        A parser.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmark.soak.run", description=__doc__)
    add = parser.add_argument
    add("--requests", type=int, default=3000, help="requests in all; default: 3000")
    add("--policy", default="plus", help="--econoserve-policy; default: plus")
    add("--seed", type=int, default=1, help="of all random numbers; default: 1")
    add("--concurrency", type=int, default=48, help="requests at a time; default: 48")
    add("--kvc", type=int, default=2048, help="size of the KVC in tokens; default: 2048")
    return parser


async def _send_all(
    options: argparse.Namespace, server: Server, bar: tqdm
) -> tuple[Client, dict[str, int]]:
    """Send everything; returns the client and the most that was seen in each queue."""
    mix = Mix(options.seed, options.kvc)
    numbers = iter(range(options.requests))
    most = dict.fromkeys(QUEUES, 0)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as http:
        client = Client(http)

        async def work() -> None:
            for number in numbers:
                await client.send(mix.draw(number))
                bar.update()

        async def look() -> None:
            while True:
                state = await asyncio.to_thread(server.state)
                most.update({name: max(most[name], state[name]) for name in QUEUES})
                bar.set_postfix({name: state[name] for name in ("running", "parked", "waiting")})
                await asyncio.sleep(LOOK_S)

        looking = asyncio.create_task(look())
        working = asyncio.gather(*(work() for _ in range(options.concurrency)))
        try:
            # A server that dies ends the look at it, and with it the run.
            await asyncio.wait((looking, working), return_when=asyncio.FIRST_COMPLETED)
            if looking.done():
                looking.result()
            await working
        finally:
            working.cancel()
            looking.cancel()
            await asyncio.gather(working, looking, return_exceptions=True)
    return client, most


def soak(options: argparse.Namespace, flags: list[str], log: Path) -> dict[str, Any]:
    """Run the load and look at what is left.

    Args:
        options: the command line.
        flags: further flags for the server.
        log: file for the server's log.

    Returns:
        The summary; ``problems`` is empty if all is well.

    Raises:
        ServerEnded: the server died.
    """
    tfs = ["--econoserve-tfs", str(options.kvc // 16)]
    with (
        Server(log, options.kvc, [*tfs, "--econoserve-policy", options.policy, *flags]) as server,
        tqdm(total=options.requests, unit="req", file=sys.stderr) as bar,
    ):
        started_s = time.monotonic()
        client, most = asyncio.run(_send_all(options, server, bar))
        elapsed_s = time.monotonic() - started_s
        problems = list(client.problems)
        if left := server.left_over(DRAIN_S):
            problems.append(f"still held {DRAIN_S:g} s after the last answer: {left}")
        if used := server.used_after_flush():
            problems.append(f"/flush_cache left {used} tokens in use (-1: it was refused)")
        state = server.state()
        totals = {name: value for name, value in state.items() if name.startswith("total_")}
        for name in NEVER:
            if count := totals[f"total_{name}"]:
                problems.append(f"total_{name} is {count}")
        if status := server.stop():
            problems.append(f"SIGTERM: exit status {status}")
    if "Traceback" in log.read_text(errors="replace"):
        problems.append("a traceback in the server's log")
    return {
        "policy": options.policy,
        "requests": options.requests,
        "seed": options.seed,
        "kvc_tokens": options.kvc,
        "concurrency": options.concurrency,
        "elapsed_s": round(elapsed_s, 1),
        "output_tokens": client.tokens,
        "outcomes": dict(sorted(client.outcomes.items())),
        "most": most,
        **totals,
        "problems": problems,
    }


def main() -> int:
    """Run the command line.

    Returns:
        The exit status: 0 if all is well, else 1.
    """
    parser = build_parser()
    options, flags = parser.parse_known_args()
    for name in ("requests", "concurrency"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give 1 or more")
    if options.kvc < 1024:
        parser.error(f"--kvc {options.kvc}: give 1024 or more")
    folder = Path(tempfile.mkdtemp(prefix="econoserve-soak-"))
    log = folder / "server.log"
    try:
        summary = soak(options, flags, log)
    except ServerEnded as error:
        summary = {"policy": options.policy, "problems": [str(error)]}
    for problem in summary["problems"][:SHOWN_PROBLEMS]:
        print(problem)
    if summary["problems"]:
        print(f"the server's log: {log}")
    else:
        shutil.rmtree(folder)
    print(json.dumps(summary))
    return 1 if summary["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
