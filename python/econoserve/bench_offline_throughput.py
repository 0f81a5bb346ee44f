"""``python -m econoserve.bench_offline_throughput``: SGLang's offline benchmark on our engine.

Takes the flags of ``python -m sglang.benchmark.offline_throughput`` (the successor of
``sglang.bench_offline_throughput``) and ``--econoserve-*``; ``--dataset-name random-ids`` needs
no download.
"""

import logging
import sys
from functools import partial

from econoserve.launching import ensure_supported, parse, refuse, server_parser
from econoserve.runtime.support import Unsupported

PROGRAM = "python -m econoserve.bench_offline_throughput"


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and print its result.

    Args:
        argv: command line; that of the process by default.

    Raises:
        SystemExit: the command line is refused (status 2), or help was asked for.
    """
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    from econoserve.engine import Engine
    from econoserve.patches import offline_benchmark

    load_plugins()
    parser = server_parser(PROGRAM)
    offline_benchmark.add_flags(parser)
    config, rest = parse(sys.argv[1:] if argv is None else argv, parser)
    arguments = parser.parse_args(rest)
    if arguments.backend != "engine":
        parser.error(f"--backend={arguments.backend}: EconoServe's benchmark runs on 'engine'")
    server_args = ServerArgs.from_cli_args(arguments)
    try:
        ensure_supported(server_args, config)
    except Unsupported as error:
        refuse(PROGRAM, error)
    logging.basicConfig(level=getattr(logging, server_args.log_level.upper()), format="%(message)s")
    offline_benchmark.run(partial(Engine.with_config, config), server_args, arguments)


if __name__ == "__main__":
    main()
