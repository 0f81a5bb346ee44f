"""Seam: SGLang's offline throughput benchmark, on another engine and without a download.

Upstream: ``throughput_test`` builds ``Engine`` and samples its warm-up from ShareGPT, which it
downloads. Changed: the engine is the caller's; with ``--dataset-name random-ids``, which SGLang's
serving benchmark has, prompts and warm-up are random tokens. Why no public seam serves: both are
module globals. An ``engine_class`` argument upstream would make this module unnecessary.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from sglang.benchmark import offline_throughput
from sglang.benchmark.datasets.random import sample_random_requests

RANDOM_IDS = "random-ids"

TARGETS: dict[str, dict[str, str]] = {
    "sglang.benchmark.offline_throughput": {
        "throughput_test": "3c1dcc7ae88757ec33364b411b88eb6f81bc1ec7b1a958e8b8d74e7dcd7e4042",
    },
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's flags to a parser.

    Args:
        parser: receives upstream's flags and the dataset ``random-ids``.
    """
    offline_throughput.BenchArgs.add_cli_args(parser)
    for action in parser._actions:
        if action.dest == "dataset_name":
            action.choices = [*(action.choices or ()), RANDOM_IDS]


def run(
    engine: Callable[..., Any], server_args: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run the benchmark and print its result.

    Args:
        engine: takes ``server_args`` and returns a running engine.
        server_args: SGLang's server arguments.
        arguments: the parsed command line.

    Returns:
        Upstream's result.
    """
    offline_throughput.Engine = engine
    if arguments.dataset_name == RANDOM_IDS:
        offline_throughput.sample_random_requests = partial(
            sample_random_requests, random_sample=False
        )
    bench_args = offline_throughput.BenchArgs.from_cli_args(arguments)
    return offline_throughput.throughput_test(server_args, bench_args)
