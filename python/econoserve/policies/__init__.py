"""Scheduling policies, one file each, by name.

A new policy needs its file and a line in ``POLICIES``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

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
    return EconoServe(variant(name, EconoServeConfig(**constants)))


def _baseline(policy: type, config: type, **constants: Any) -> Policy:
    return policy(config(**constants))


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

    Args:
        name: key of ``POLICIES``: a policy's file, or one of EconoServe's variants (``d``, ``sd``,
            ``sdo``, ``full``, ``plus``).
        capacity_tokens: size of the KVC.
        constants: fields of the policy's config.

    Returns:
        The policy, without tasks.

    Raises:
        ValueError: there is no such policy, or a constant is out of range.
        TypeError: the policy has no such constant.
    """
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is not known: choose one of {', '.join(POLICIES)}")
    return POLICIES[name](capacity_tokens=capacity_tokens, **constants)
