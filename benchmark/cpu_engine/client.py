"""``sglang.bench_serving`` in a process that stays up, so that it is imported once.

Owns nothing: each request holds a command line for it. Run by ``serving``.
"""

import sys
import traceback
from typing import Any

from benchmark.cpu_engine.worker import Handler, serve


def start(_job: dict[str, Any]) -> tuple[Handler, dict[str, Any]]:
    """Import the load generator.

    Returns:
        What answers ``{"arguments": [...]}`` with the exit ``status`` of its command line.
    """
    from sglang.benchmark.serving import cli_main

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        sys.argv = ["bench_serving", *request["arguments"]]
        try:
            cli_main()
        except SystemExit as end:
            return {"status": 0 if end.code is None else end.code}
        except Exception:
            traceback.print_exc()
            return {"status": 1}
        return {"status": 0}

    return handle, {}


if __name__ == "__main__":
    serve(start)
