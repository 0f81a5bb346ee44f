"""What our entry points share: arguments for SGLang, and its processes with our scheduler.

Owns the defaults that we add to SGLang's command line and how a launch is armed.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from econoserve.config import RuntimeConfig, add_flags, split_arguments
from econoserve.runtime.support import Unsupported, check_arguments, check_policy, check_release

logger = logging.getLogger(__name__)

DEMO_MODEL = "demo"
"""``--model-path`` of the built-in demo model."""


def model_path(name: str) -> str:
    """Resolve a model's name, building the demo model if it is asked for.

    Args:
        name: what the user gave; ``demo`` is the built-in model unless such a path exists.

    Returns:
        A path or a hub name for SGLang.
    """
    if name != DEMO_MODEL or Path(name).exists():
        return name
    from econoserve import demo_model

    return str(demo_model.ensure())


def _value_index(argv: list[str], flags: tuple[str, ...]) -> tuple[int, str] | None:
    for index, argument in enumerate(argv):
        for flag in flags:
            if argument == flag and index + 1 < len(argv):
                return index + 1, argv[index + 1]
            if argument.startswith(f"{flag}="):
                return index, argument.removeprefix(f"{flag}=")
    return None


def _given(argv: list[str], flag: str) -> bool:
    return any(arg == flag or arg.startswith(f"{flag}=") for arg in argv)


def default_arguments(device: str | None) -> dict[str, Any]:
    """Our defaults for SGLang's arguments, where the user is silent.

    Args:
        device: the device that the user asked for, if any.

    Returns:
        Values by the argument's name: a token-level KV pool everywhere, FlashInfer's kernels on
        CUDA.
    """
    import torch

    defaults: dict[str, Any] = {"page_size": 1}
    # ROCm answers to the name of CUDA, and has no FlashInfer.
    if device in (None, "cuda") and torch.cuda.is_available() and torch.version.hip is None:
        defaults["attention_backend"] = "flashinfer"
    return defaults


def sglang_arguments(argv: list[str]) -> list[str]:
    """Complete the part of a command line that goes to SGLang.

    Args:
        argv: the user's arguments without ours.

    Returns:
        The arguments with the demo model resolved and our defaults where the user is silent.
    """
    argv = list(argv)
    found = _value_index(argv, ("--model-path", "--model"))
    if found is not None and found[1] == DEMO_MODEL:
        index, _ = found
        prefix = argv[index].split("=")[0] + "=" if argv[index].startswith("--") else ""
        argv[index] = prefix + model_path(DEMO_MODEL)
        if not _given(argv, "--served-model-name"):
            argv += ["--served-model-name", DEMO_MODEL]
    device = _value_index(argv, ("--device",))
    for name, value in default_arguments(None if device is None else device[1]).items():
        flag = f"--{name.replace('_', '-')}"
        if not _given(argv, flag):
            argv += [flag, str(value)]
    return argv


def server_parser(program: str) -> argparse.ArgumentParser:
    """SGLang's command line, with our attention backend among its choices on our CPU platform.

    Args:
        program: name for messages.

    Returns:
        A parser without our own flags.
    """
    from sglang.srt.platforms import current_platform
    from sglang.srt.server_args import ServerArgs, add_attention_backend_choices

    from econoserve.platform.cpu import ATTENTION_BACKEND, EconoCpuPlatform

    if isinstance(current_platform, EconoCpuPlatform):
        add_attention_backend_choices([ATTENTION_BACKEND])
    parser = argparse.ArgumentParser(prog=program)
    ServerArgs.add_cli_args(parser)
    return parser


def parse(argv: list[str], parser: argparse.ArgumentParser) -> tuple[RuntimeConfig, list[str]]:
    """Read a command line that mixes our flags with SGLang's.

    Args:
        argv: the arguments.
        parser: knows all flags; prints the help.

    Returns:
        Our settings, and the arguments for SGLang.

    Raises:
        SystemExit: help was asked for, or a flag of ours is wrong.
    """
    add_flags(parser)
    if any(argument in ("-h", "--help") for argument in argv):
        parser.print_help()
        sys.exit(0)
    if _given(argv, "--config"):
        from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

        argv = ConfigArgumentMerger(parser).merge_config_with_args(argv)
    config, rest = split_arguments(argv, parser)
    return config, sglang_arguments(rest)


def ensure_supported(server_args: Any, config: RuntimeConfig) -> None:
    """Refuse what we cannot serve, before any process is spawned; else log what it runs on.

    Args:
        server_args: SGLang's server arguments.
        config: our settings.

    Raises:
        Unsupported: in one sentence that says what to drop.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.utils import configure_logger

    from econoserve.runtime.iterations import check_log
    from econoserve.runtime.learning import check_state

    check_release(config.allow_untested)
    server_args.resolve_once()
    arguments = resolving_view(server_args)
    check_arguments(arguments)
    check_policy(arguments, config.policy)
    try:
        check_state(config, server_args.dp_size)
        check_log(config, server_args.dp_size)
    except ValueError as error:
        raise Unsupported(str(error)) from error
    configure_logger(server_args)
    logger.info(chosen(arguments))


def chosen(resolved: Any) -> str:
    """What an engine runs on, our defaults among it.

    Args:
        resolved: SGLang's server arguments, resolved.

    Returns:
        One line.
    """
    defaults = default_arguments(resolved.device)
    flags = [
        f"--{name.replace('_', '-')} {getattr(resolved, name)}"
        + (" (our default)" if str(getattr(resolved, name)) == str(value) else "")
        for name, value in {"attention_backend": None, **defaults}.items()
    ]
    graphs = resolved.cuda_graph_config
    overlap = "off" if resolved.disable_overlap_schedule else "on"
    return (
        f"EconoServe on {resolved.device}: {', '.join(flags)}; graphs: decode "
        f"{graphs.decode.backend}, prefill {graphs.prefill.backend}; overlap {overlap}. "
        "SGLang's flags change each of them."
    )


def refuse(program: str, error: Unsupported) -> None:
    """End the program with the reason of a refusal.

    Args:
        program: its name.
        error: the reason.

    Raises:
        SystemExit: always, with status 2.
    """
    print(f"{program}: error: {error}", file=sys.stderr)
    sys.exit(2)


def init_tokenizer_manager(server_args: Any, port_args: Any) -> Any:
    """SGLang's ``init_tokenizer_manager`` with our tokenizer manager.

    Args:
        server_args: as upstream.
        port_args: as upstream.

    Returns:
        As upstream: the tokenizer manager and the template manager.
    """
    from sglang.srt.entrypoints import engine

    from econoserve.patches.request_intake import EconoTokenizerManager

    manager, templates = engine.init_tokenizer_manager(
        server_args, port_args, EconoTokenizerManager
    )
    manager.drain_s = RuntimeConfig.from_environment().drain_s
    return manager, templates
