"""Scheduling policies, one file each, by name.

A new policy needs its file and a line in ``POLICIES``.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from econoserve.core.checks import check_capacity
from econoserve.core.policy import Policy
from econoserve.policies.econoserve import VARIANTS, EconoServe, EconoServeConfig, variant
from econoserve.policies.fastserve import FastServe, FastServeConfig
from econoserve.policies.orca import Orca, OrcaConfig
from econoserve.policies.past_future import PastFuture, PastFutureConfig
from econoserve.policies.sarathi import Sarathi, SarathiConfig
from econoserve.policies.sglang import SGLang, SGLangConfig
from econoserve.policies.srtf import Srtf, SrtfConfig
from econoserve.policies.vllm import Vllm, VllmConfig
from econoserve.policies.vllm_v1 import VllmV1, VllmV1Config


def _econoserve(name: str, **constants: Any) -> Policy:
    return EconoServe(variant(name, _filled(EconoServeConfig, constants)))


def _baseline(policy: type, config: type, **constants: Any) -> Policy:
    return policy(_filled(config, constants))


def _filled(config: type, constants: dict[str, Any]) -> Any:
    """A policy's configuration; refuses constants that it does not have."""
    known = [field.name for field in fields(config)]
    for name, value in constants.items():
        if name not in known:
            choices = ", ".join(field for field in known if field != "capacity_tokens")
            policy = config.__name__.removesuffix("Config")
            hint = _hint(config, name)
            raise TypeError(f"{name}={value!r}: {hint}; the constants of {policy} are {choices}")
    check_capacity(constants["capacity_tokens"])
    return config(**constants)


def _hint(config: type, name: str) -> str:
    """Where a constant belongs that is no field of the configuration itself."""
    for part in fields(config):
        kind = part.default_factory
        if is_dataclass(kind) and name in {field.name for field in fields(kind)}:
            inner = f"{part.name}={kind.__name__}({name}=...)"
            if name == "mode":
                return (
                    "the variant sets it, so make the policy without a name, "
                    f"EconoServe(EconoServeConfig(capacity_tokens, {inner}))"
                )
            return f"pass {inner}"
    return "the policy has no such constant"


POLICIES: dict[str, Callable[..., Policy]] = {
    **{name: partial(_econoserve, name) for name in VARIANTS},
    "fastserve": partial(_baseline, FastServe, FastServeConfig),
    "orca": partial(_baseline, Orca, OrcaConfig),
    "past_future": partial(_baseline, PastFuture, PastFutureConfig),
    "sarathi": partial(_baseline, Sarathi, SarathiConfig),
    "sglang": partial(_baseline, SGLang, SGLangConfig),
    "srtf": partial(_baseline, Srtf, SrtfConfig),
    "vllm": partial(_baseline, Vllm, VllmConfig),
    "vllm_v1": partial(_baseline, VllmV1, VllmV1Config),
}
"""What makes a policy, by its name; each takes ``capacity_tokens`` and its config's constants."""


def make_policy(name: str, capacity_tokens: int, **constants: Any) -> Policy:
    """A new policy.

    A variant's name sets ``kvc.mode`` and ``order.order``, also where they were given. For
    another pair, say mode ``skyline``, make the policy without a name:
    ``EconoServe(EconoServeConfig(capacity_tokens, kvc=KvcConfig(mode=KvcMode.SKYLINE)))``.

    Args:
        name: key of ``POLICIES``: a policy's file, or one of EconoServe's variants (``d``, ``sd``,
            ``sdo``, ``full``, ``plus``).
        capacity_tokens: size of the KVC, at least 1.
        constants: fields of the policy's config; EconoServe's come in four parts:
            ``make_policy("plus", 8000, kvc=KvcConfig(risk=0.05))``.

    Returns:
        The policy, without tasks.

    Raises:
        ValueError: there is no such policy, or a constant's value cannot be used.
        TypeError: the policy has no such constant.
    """
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is not known: choose one of {', '.join(POLICIES)}")
    return POLICIES[name](capacity_tokens=capacity_tokens, **constants)
