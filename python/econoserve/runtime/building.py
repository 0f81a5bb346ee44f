"""Which policy an engine runs, with constants that follow from the settings and the machine."""

from dataclasses import dataclass

from econoserve.config import RuntimeConfig
from econoserve.core.cost import TfsConfig
from econoserve.core.holding import HoldingConfig
from econoserve.core.kvc import KvcConfig
from econoserve.core.late import Late
from econoserve.core.nested import Nesting
from econoserve.core.order import LengthOrder, OrderConfig
from econoserve.core.pausing import PausingConfig
from econoserve.core.policy import BookedPolicy
from econoserve.core.shedding import SheddingConfig
from econoserve.core.types import Preemption
from econoserve.core.victims import VictimConfig
from econoserve.policies import make_policy
from econoserve.policies.econoserve import VARIANTS


@dataclass(frozen=True, slots=True)
class Machine:
    """What the engine has.

    Attributes:
        capacity_tokens: size of the KVC.
        chunk_tokens: most prompt tokens in one pass (``--chunked-prefill-size``).
        budget_tokens: tokens of a pass for rules that have a fixed budget, unless it is set.
        context_tokens: longest prompt and response together.
        max_running: most requests in one batch.
        bytes_per_token: size of one token's KVC, on one rank.
        tensor: GPUs that share each layer (``--tp-size``).
    """

    capacity_tokens: int
    chunk_tokens: int
    budget_tokens: int
    context_tokens: int
    max_running: int
    bytes_per_token: float
    tensor: int = 1


def host_tokens(config: RuntimeConfig, machine: Machine) -> int:
    """KVC that host memory may hold.

    Args:
        config: the settings.
        machine: the engine.

    Returns:
        Tokens.
    """
    return int(config.host_kvc_gib * 2**30 / machine.bytes_per_token)


def build_policy(config: RuntimeConfig, machine: Machine) -> BookedPolicy:
    """A new policy.

    Args:
        config: the settings.
        machine: the engine.

    Returns:
        The policy, without tasks.
    """
    build = _econoserve if config.policy in VARIANTS else _baseline
    return make_policy(config.policy, machine.capacity_tokens, **build(config, machine))


def _econoserve(config: RuntimeConfig, machine: Machine) -> dict[str, object]:
    chunk = machine.chunk_tokens
    if config.tfs is None:
        limits = (min(config.tfs_least, chunk), chunk)
        tfs = TfsConfig(
            limits_tokens=limits, saturation=config.tfs_saturation, tpot_burst=config.tfs_burst
        )
    else:
        tfs = TfsConfig(pinned_tokens=min(config.tfs, chunk))
    moving_s = None
    if host_tokens(config, machine):
        moving_s = machine.bytes_per_token / (config.host_gb_per_s * 1e9)
    return {
        "kvc": KvcConfig(
            reserve_fraction=config.kvc_reserve,
            lead_tokens=config.kvc_lead,
            buffer_tokens=config.kvc_buffer,
            nesting=Nesting(config.nesting),
            risk=config.kvc_risk,
            points=config.kvc_points,
        ),
        "order": OrderConfig(
            length_order=LengthOrder(config.length_order),
            window_s=config.window_ms / 1e3,
            group_ratio=config.group_ratio,
            best_effort_s=config.best_effort_ms / 1e3,
            demoted_s=config.demoted_ms / 1e3,
        ),
        "victims": VictimConfig(moving_s, config.patience_ms / 1e3, config.lost_damage),
        "tfs": tfs,
        "parked_fraction": config.parked_kvc,
        "late": Late(config.late),
        "starvation_s": config.starvation_ms / 1e3,
        "holding": HoldingConfig(config.hold_steps, config.hold_pace),
        "pausing": PausingConfig(config.pause_kvc),
        "shedding": SheddingConfig(
            config.deferred_margin, config.deferred_step, config.deferred_most
        ),
    }


def _baseline(config: RuntimeConfig, machine: Machine) -> dict[str, object]:
    """Their own constants, but for what is the engine's or was set."""
    budget = min(config.tfs or machine.budget_tokens, machine.chunk_tokens)
    # Rules without chunks need room for the longest prompt.
    whole = max(2048, machine.context_tokens)
    on_host = host_tokens(config, machine)
    seqs = machine.max_running
    constants: dict[str, dict[str, object]] = {
        "orca": {"max_seqs": seqs},
        "vllm": {"max_batch_tokens": whole, "max_seqs": seqs},
        "vllm_v1": {"max_batch_tokens": budget, "max_seqs": seqs},
        "sarathi": {"chunk_tokens": budget, "max_seqs": seqs},
        "fastserve": {"max_batch_tokens": whole, "host_tokens": on_host},
        "past_future": {
            "chunked_prefill_tokens": min(4096, machine.chunk_tokens),
            "initial_response_tokens": config.rl_prior,
        },
        "srtf": {
            "max_batch_tokens": budget,
            "preemption": Preemption.OFFLOAD if on_host else Preemption.RECOMPUTE,
        },
        "sglang": {"chunked_prefill_tokens": machine.chunk_tokens},
    }
    return constants[config.policy]
