"""The user's EconoServe settings: command-line flags, their checks, their way to the scheduler.

Owns every ``--econoserve-*`` flag. The settings reach SGLang's scheduler processes through one
environment variable, set only while those processes are spawned.
"""

import argparse
import difflib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from enum import Enum

ARM_VARIABLE = "ECONOSERVE"
"""Set to ``1``, it makes SGLang processes use our scheduler."""

CONFIG_VARIABLE = "ECONOSERVE_CONFIG"
"""Holds the settings as JSON."""


class OnError(Enum):
    """What a scheduler does when its policy raises."""

    FALLBACK = "fallback"
    CRASH = "crash"


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """Settings of the scheduler in an SGLang process; see the flags' help for each.

    Raises:
        ValueError: a value is out of range; names the flag, the value and the fix.
    """

    tfs: int | None = None
    rl_quantile: float = 0.5
    rl_prior: int = 256
    kvc_reserve: float = 0.02
    parked_kvc: float = 0.2
    window_ms: float = 1000.0
    best_effort_ms: float = 10_000.0
    starvation_ms: float = 30_000.0
    length_order: str = "shorter"
    on_error: str = "fallback"
    allow_untested: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, float):
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                self._check(field.name, number and math.isfinite(value), "give a finite number")
        for name in ("tfs", "rl_prior"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            self._check(name, whole or (name == "tfs" and value is None), "give a whole number")
        if self.tfs is not None:
            self._check("tfs", self.tfs >= 1, "give 1 token or more")
        self._check("rl_quantile", 0 < self.rl_quantile <= 1, "give a probability in (0, 1]")
        self._check("rl_prior", self.rl_prior >= 1, "give 1 token or more")
        self._check("kvc_reserve", 0 <= self.kvc_reserve < 1, "give a share in [0, 1)")
        self._check("parked_kvc", 0 <= self.parked_kvc <= 1, "give a share in [0, 1]")
        self._check("window_ms", self.window_ms > 0, "give more than 0 milliseconds")
        self._check("best_effort_ms", self.best_effort_ms > 0, "give more than 0 milliseconds")
        self._check("starvation_ms", self.starvation_ms > 0, "give more than 0 milliseconds")
        orders = ("longer", "shorter")
        self._check("length_order", self.length_order in orders, f"give one of {orders}")
        choices = tuple(choice.value for choice in OnError)
        self._check("on_error", self.on_error in choices, f"give one of {choices}")

    def _check(self, name: str, valid: bool, fix: str) -> None:
        if not valid:
            raise ValueError(f"{flag_of(name)}={getattr(self, name)!r}: {fix}")

    @classmethod
    def from_environment(cls) -> "RuntimeConfig":
        """Read the settings that the launching process left in the environment.

        Returns:
            The settings, defaults where nothing was left.

        Raises:
            ValueError: the variable holds something else.
        """
        text = os.environ.get(CONFIG_VARIABLE)
        if not text:
            return cls()
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{CONFIG_VARIABLE}={text!r} is not a JSON object of settings ({error}): unset it "
                "and use --econoserve-* flags"
            ) from error


HELP = {
    "tfs": "Target forward size: decode and prompt tokens in one forward pass. Default: 512 on a "
    "CPU, 2048 elsewhere, and at most --chunked-prefill-size.",
    "rl_quantile": "Quantile of recent response lengths taken for a request's where one figure "
    "is needed: in deadlines and reports.",
    "rl_prior": "Mean response length in tokens assumed until responses have ended.",
    "kvc_reserve": "Share of the KV cache kept for responses that outlive their prediction.",
    "parked_kvc": "Share of the KV cache that prompts may hold while their response does not fit.",
    "window_ms": "Deadlines closer than this count as equally urgent.",
    "best_effort_ms": "Deadline assumed for requests without an SLO, from arrival.",
    "starvation_ms": "A request this long past its latest start lets nobody past it.",
    "length_order": "Which of two equally urgent requests goes first: the longer or the shorter.",
    "on_error": "If planning raises: fall back to SGLang's own decision, or crash (for tests).",
    "allow_untested": "Start although SGLang's patched symbols differ from the tested release.",
}


def flag_of(name: str) -> str:
    """The command-line flag of a setting.

    Args:
        name: field of ``RuntimeConfig``.

    Returns:
        The flag, such as ``--econoserve-tfs``.
    """
    return "--econoserve-" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add every ``--econoserve-*`` flag to a parser.

    Args:
        parser: receives one argument group.
    """
    group = parser.add_argument_group("EconoServe", "How EconoServe's scheduler decides.")
    kinds = {"tfs": int, "rl_prior": int, "length_order": str, "on_error": str}
    choices = {"length_order": ("longer", "shorter"), "on_error": ("fallback", "crash")}
    for field in fields(RuntimeConfig):
        destination = f"econoserve_{field.name}"
        if field.type == "bool" or field.type is bool:
            group.add_argument(
                flag_of(field.name), dest=destination, action="store_true", help=HELP[field.name]
            )
            continue
        default = "" if field.default is None else f" Default: {field.default}."
        group.add_argument(
            flag_of(field.name),
            dest=destination,
            type=kinds.get(field.name, float),
            choices=choices.get(field.name),
            default=field.default,
            help=(HELP[field.name] + default).replace("%", "%%"),
        )


def split_arguments(
    argv: list[str], parser: argparse.ArgumentParser
) -> tuple[RuntimeConfig, list[str]]:
    """Take our flags out of a command line.

    Args:
        argv: the arguments.
        parser: reports errors, in its name.

    Returns:
        The settings, and the arguments that are SGLang's.

    Raises:
        SystemExit: an ``--econoserve-*`` flag or value is wrong; the reason is on standard error.
    """
    ours = argparse.ArgumentParser(
        prog=parser.prog, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False
    )
    add_flags(ours)
    known, rest = ours.parse_known_args(argv)
    for argument in rest:
        if argument.startswith("--econoserve"):
            name = argument.split("=")[0]
            flags = [field.name.replace("_", "-") for field in fields(RuntimeConfig)]
            close = difflib.get_close_matches(name.removeprefix("--econoserve-"), flags, n=1)
            known = ", ".join(f"--econoserve-{flag}" for flag in flags)
            hint = f"did you mean --econoserve-{close[0]}?" if close else f"known are {known}"
            ours.error(f"unknown flag {name}: {hint}")
    try:
        config = RuntimeConfig(
            **{key.removeprefix("econoserve_"): value for key, value in vars(known).items()}
        )
    except ValueError as error:
        ours.error(str(error))
    return config, rest


@contextmanager
def armed(config: RuntimeConfig) -> Iterator[None]:
    """Let processes spawned inside use our scheduler with these settings.

    Args:
        config: the settings.

    Yields:
        Nothing; the environment is as before afterwards.
    """
    wanted = {ARM_VARIABLE: "1", CONFIG_VARIABLE: json.dumps(asdict(config))}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def is_armed() -> bool:
    """Whether this process was asked to use our scheduler.

    Returns:
        ``True`` if ``ECONOSERVE=1`` is set.
    """
    return os.environ.get(ARM_VARIABLE) == "1"
