"""Runs command lines of the launcher in one process and prints what became of each, as JSON.

Loading SGLang takes far longer than refusing a command line. Input: a JSON list of argument lists
on standard input. A server is never started: reaching that point is an outcome of its own.
"""

import contextlib
import io
import json
import sys

import psutil

from econoserve import launch_server


def outcome(argv: list[str]) -> dict:
    """How the launcher ends for one command line."""
    from sglang.srt.entrypoints import http_server

    reached = []
    http_server.launch_server = lambda *args, **kwargs: reached.append(True)
    out, err = io.StringIO(), io.StringIO()
    status = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            launch_server.main(argv)
        except SystemExit as end:
            status = end.code
    return {
        "status": status,
        "stdout": out.getvalue(),
        "stderr": err.getvalue(),
        "launched": bool(reached),
        "children": len(psutil.Process().children(recursive=True)),
    }


if __name__ == "__main__":
    outcomes = [outcome(argv) for argv in json.load(sys.stdin)]
    print("\n" + json.dumps(outcomes))
