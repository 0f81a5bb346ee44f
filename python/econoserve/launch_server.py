"""``python -m econoserve.launch_server``: SGLang's server with our scheduler.

Takes SGLang's flags and ``--econoserve-*``. Owns the server's extra route
``/econoserve/requests/{id}``.
"""

import os
import signal
import sys

from econoserve.config import armed
from econoserve.launching import (
    ensure_supported,
    init_tokenizer_manager,
    parse,
    refuse,
    server_parser,
)
from econoserve.runtime.support import Unsupported

PROGRAM = "python -m econoserve.launch_server"


def add_routes() -> None:
    """Add our routes to SGLang's HTTP application."""
    from fastapi import HTTPException
    from sglang.srt.entrypoints import http_server

    @http_server.app.get("/econoserve/requests/{rid}")
    async def request_report(rid: str) -> dict:
        """What the scheduler predicted and did for one finished request."""
        reports = http_server.get_global_state().tokenizer_manager.reports
        if rid not in reports:
            raise HTTPException(
                404, f"id={rid!r}: no finished request of that id among the last {len(reports)}"
            )
        return reports[rid]


def main(argv: list[str] | None = None) -> None:
    """Serve until interrupted.

    Args:
        argv: command line; that of the process by default.

    Raises:
        SystemExit: the command line is refused (status 2), or help was asked for.
    """
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    # Before the launch is armed: this process keeps SGLang's own classes.
    load_plugins()
    parser = server_parser(PROGRAM)
    config, rest = parse(sys.argv[1:] if argv is None else argv, parser)
    server_args = prepare_server_args(rest)
    try:
        ensure_supported(server_args, config)
    except Unsupported as error:
        refuse(PROGRAM, error)
    from sglang.srt.entrypoints.http_server import launch_server

    from econoserve.patches import refused_streams, retry_after

    add_routes()
    refused_streams.install()
    retry_after.install()
    try:
        with armed(config):
            launch_server(server_args, init_tokenizer_manager_func=init_tokenizer_manager)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
