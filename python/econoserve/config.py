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

from econoserve.core.late import Late
from econoserve.core.nested import Nesting
from econoserve.policies import POLICIES
from econoserve.prediction.registry import DEFAULT, PREDICTORS
from econoserve.slo import read_classes

ARM_VARIABLE = "ECONOSERVE"
"""Set to ``1``, it makes SGLang processes use our scheduler."""

CONFIG_VARIABLE = "ECONOSERVE_CONFIG"
"""Holds the settings as JSON."""


class OnError(Enum):
    """What a scheduler does when its policy raises."""

    FALLBACK = "fallback"
    CRASH = "crash"


CHOICES = {
    "policy": tuple(POLICIES),
    "predictor": tuple(PREDICTORS),
    "length_order": ("longer", "shorter"),
    "late": tuple(choice.value for choice in Late),
    "nesting": tuple(choice.value for choice in Nesting),
    "on_error": tuple(choice.value for choice in OnError),
}
"""What settings that are words may be."""

TEXTS = ("predictor_state", "iteration_log")
"""Settings that are any words."""

SHARES = {
    **dict.fromkeys(("parked_kvc", "pause_kvc", "lost_damage"), True),
    **dict.fromkeys(("kvc_reserve", "deferred_margin", "deferred_step", "deferred_most"), False),
}
"""Settings that are shares, and whether the whole is one."""

PROBABILITIES = ("kvc_risk", "tfs_saturation")
"""Settings between 0 and 1, without either."""

POSITIVE = {
    "tfs": "tokens",
    "rl_prior": "tokens",
    "window_ms": "milliseconds",
    "best_effort_ms": "milliseconds",
    "starvation_ms": "milliseconds",
    "demoted_ms": "milliseconds",
    "patience_ms": "milliseconds",
    "max_queue": "requests",
    "host_gb_per_s": "GB/s",
    "drain_s": "seconds",
    "hold_pace": "of the TPOT objective",
}
"""Settings above 0, and their units."""

NOT_NEGATIVE = {
    "kvc_lead": "tokens",
    "kvc_buffer": "tokens",
    "host_kvc_gib": "GiB",
    "check_ranks": "iterations",
    "hold_steps": "steps",
}
"""Settings from 0 on, and their units."""


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """Settings of the scheduler in an SGLang process; see the flags' help for each.

    Raises:
        ValueError: a value is out of range; names the flag, the value and the fix.
    """

    policy: str = "plus"
    tfs: int | None = None
    tfs_least: int = 128
    tfs_saturation: float = 0.95
    tfs_burst: float = 8.0
    hold_steps: int = 8
    hold_pace: float = 0.97
    pause_kvc: float = 0.6
    predictor: str = DEFAULT
    predictor_state: str | None = None
    rl_quantile: float = 0.5
    rl_prior: int = 256
    kvc_reserve: float = 0.02
    kvc_risk: float = 0.1
    kvc_points: int = 8
    kvc_lead: int = 8
    kvc_buffer: int = 2
    nesting: str = "tree"
    parked_kvc: float = 0.2
    host_kvc_gib: float = 0.0
    host_gb_per_s: float = 20.0
    window_ms: float = 1000.0
    best_effort_ms: float = 10_000.0
    demoted_ms: float = 600_000.0
    deferred_margin: float = 0.1
    deferred_step: float = 0.03
    deferred_most: float = 0.1
    starvation_ms: float = 30_000.0
    patience_ms: float = 5000.0
    lost_damage: float = 0.2
    group_ratio: float = 1.15
    length_order: str = "shorter"
    late: str = "demote"
    slo_class: tuple[str, ...] = ()
    max_queue: int | None = None
    drain_s: float = 5.0
    iteration_log: str | None = None
    check_ranks: int = 64
    check_books: bool = False
    on_error: str = "fallback"
    allow_untested: bool = False

    def __post_init__(self) -> None:
        # From JSON it comes as a list.
        object.__setattr__(self, "slo_class", tuple(self.slo_class))
        for field in fields(self):
            value = getattr(self, field.name)
            plain = isinstance(value, (int, float)) and not isinstance(value, bool)
            if isinstance(field.default, float):
                self._check(field.name, plain and math.isfinite(value), "give a finite number")
            elif field.name in WHOLE:
                valid = isinstance(value, int) and plain
                valid = valid or (value is None and field.default is None)
                self._check(field.name, valid, "give a whole number")
        for name, unit in POSITIVE.items():
            value = getattr(self, name)
            self._check(name, value is None or value > 0, f"give more than 0 {unit}")
        for name, unit in NOT_NEGATIVE.items():
            self._check(name, getattr(self, name) >= 0, f"give 0 {unit} or more")
        for name, closed in SHARES.items():
            value = getattr(self, name)
            valid = 0 <= value < 1 or (closed and value == 1)
            self._check(name, valid, f"give a share in [0, 1{']' if closed else ')'}")
        self._check("rl_quantile", 0 < self.rl_quantile <= 1, "give a probability in (0, 1]")
        for name in PROBABILITIES:
            self._check(name, 0 < getattr(self, name) < 1, "give a share between 0 and 1")
        self._check("tfs_burst", self.tfs_burst >= 1, "give 1 or more")
        self._check("tfs_least", self.tfs_least >= 1, "give 1 token or more")
        self._check("kvc_points", self.kvc_points >= 2, "give 2 lengths or more")
        self._check("group_ratio", self.group_ratio > 1, "give a ratio above 1")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            self._check(name, value in choices, f"give one of {', '.join(choices)}")
        try:
            read_classes(self.slo_class)
        except ValueError as error:
            raise ValueError(f"{flag_of('slo_class')}={error}") from error

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


WHOLE = (
    "tfs",
    "tfs_least",
    "rl_prior",
    "kvc_points",
    "kvc_lead",
    "kvc_buffer",
    "hold_steps",
    "max_queue",
    "check_ranks",
)
"""Settings that are whole numbers."""

HELP = {
    "policy": "Which requests run: EconoServe's own (plus; full, sdo, sd and d leave parts of it "
    "out, see docs/scheduling.md) or another system's rules, to compare them.",
    "tfs": "Target forward size: decode and prompt tokens in one forward pass. Default: learned "
    "from the iteration times, at most --chunked-prefill-size. Other systems' rules take it as "
    "their budget; their default is 512 on a CPU, 2048 elsewhere.",
    "tfs_least": "Least TFS that is learned, where a chunk is not smaller.",
    "tfs_saturation": "A learned TFS reaches this share of the tokens per second of ever larger "
    "passes.",
    "tfs_burst": "No iteration takes longer than so many times the tightest TPOT objective.",
    "hold_steps": "Policy plus: steps for which prompts may wait to start together; 0: never.",
    "hold_pace": "Policy plus: prompts wait longer, up to 64 steps, while decoding is slower than "
    "this share of the tightest TPOT objective.",
    "pause_kvc": "Policy plus: prompts may be computed alone, for their TTFT, where less than this "
    "share of the KV cache is used and decoding has time; 0: never.",
    "predictor": "What predicts response lengths.",
    "predictor_state": "File that keeps what the predictor has learned, over restarts; each of "
    "several replicas adds its number.",
    "rl_quantile": "Quantile of a request's predicted response length taken where one figure is "
    "needed: in deadlines and reports.",
    "rl_prior": "Mean response length in tokens assumed until responses have ended.",
    "kvc_reserve": "Share of the KV cache kept for responses that outlive their prediction.",
    "kvc_risk": "Policy plus: probability of finding the KV cache full that an admission may "
    "cause.",
    "kvc_points": "Policy plus: equally likely lengths that stand for a predicted distribution.",
    "kvc_lead": "Policies d to full: a response is predicted anew so many tokens before its "
    "promise ends.",
    "kvc_buffer": "Policy full: a guest must be gone so many tokens before its host needs the "
    "slots.",
    "nesting": "Policy full: how far promises are shared.",
    "parked_kvc": "Share of the KV cache that prompts may hold while their response does not fit.",
    "host_kvc_gib": "Host memory for the KV cache of preempted requests, in GiB for each rank of "
    "each replica; 0: they are always computed again.",
    "host_gb_per_s": "Speed at which KV cache moves to host memory and back, in GB/s.",
    "window_ms": "Deadlines closer than this count as equally urgent.",
    "best_effort_ms": "Deadline assumed for requests without an SLO, from arrival.",
    "demoted_ms": "Deadline assumed for requests that lost their SLO, from arrival.",
    "deferred_margin": "Policy plus: share of the KV cache left free by requests that lost their "
    "SLO or step back.",
    "deferred_step": "Policy plus: each SLO lost raises the share of requests that step back, the "
    "largest ones, by this; not with --econoserve-late serve, which finds nobody late.",
    "deferred_most": "Policy plus: the largest share of requests that step back.",
    "starvation_ms": "A request this long past its latest start lets nobody past it.",
    "patience_ms": "Slack at which preempting a request counts half as bad as without slack.",
    "lost_damage": "How bad it counts to preempt a request that has lost its SLO, as a share.",
    "group_ratio": "Predicted lengths within this ratio are equal: they run as a group.",
    "length_order": "Which of two equally urgent requests goes first: the longer or the shorter.",
    "late": "A waiting request that cannot keep its SLO any more: serve it in its place, demote it "
    "behind those that can, or reject it (HTTP 503).",
    "slo_class": "NAME=ttft:MS,tpot:MS,e2e:MS: an SLO for requests of that service_tier or "
    "slo_class; NAME default is for those without either. May be given several times.",
    "max_queue": "Requests that may wait; further ones get HTTP 429 with Retry-After. Default: no "
    "limit.",
    "drain_s": "After SIGTERM, requests may end for so many seconds; then they are aborted and the "
    "server ends.",
    "iteration_log": "File for what iterations compute and how long they take, from which "
    "`econoserve profile` makes a profile for the simulator; each of several replicas adds its "
    "number.",
    "check_ranks": "Compare the plans of all tensor-parallel ranks every so many iterations; 0: "
    "never.",
    "check_books": "Compare the ledger with SGLang's KV pool in every iteration (for tests).",
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


def _type_of(name: str) -> type:
    if name in WHOLE:
        return int
    return str if name in CHOICES or name in TEXTS else float


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add every ``--econoserve-*`` flag to a parser.

    Args:
        parser: receives one argument group.
    """
    group = parser.add_argument_group("EconoServe", "How EconoServe's scheduler decides.")
    for field in fields(RuntimeConfig):
        destination = f"econoserve_{field.name}"
        if field.type == "bool" or field.type is bool:
            group.add_argument(
                flag_of(field.name), dest=destination, action="store_true", help=HELP[field.name]
            )
            continue
        if field.name == "slo_class":
            group.add_argument(
                flag_of(field.name),
                dest=destination,
                action="append",
                default=[],
                metavar="NAME=SLO",
                help=HELP[field.name],
            )
            continue
        default = "" if field.default is None else f" Default: {field.default}."
        group.add_argument(
            flag_of(field.name),
            dest=destination,
            type=_type_of(field.name),
            choices=CHOICES.get(field.name),
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
