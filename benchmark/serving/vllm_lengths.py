"""The logits processor that ends vLLM's responses at the length of their trace.

Owns the same rule as ``benchmark.scheduler_comparison.lengths`` has for SGLang: EOS is forbidden
before a response has its length, and forced then. Loaded by vLLM's engine process in vLLM's own
environment: it imports nothing but vLLM and torch. The length travels in the request's
``vllm_xargs``, which vLLM's scheduler does not read.
"""

from collections.abc import Sequence

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor

LENGTH_FIELD = "benchmark_length"
EOS_FIELD = "benchmark_eos"


class EndOnTime(LogitsProcessor):
    """Ends each response at the length that its request carries.

    Args:
        vllm_config: unused.
        device: unused.
        is_pin_memory: unused.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[int, int, Sequence[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """It changes what greedy sampling takes."""
        return False

    @staticmethod
    def _state(
        params: SamplingParams, _prompt_ids: list[int] | None, output_ids: list[int]
    ) -> tuple[int, int, Sequence[int]] | None:
        extra = params.extra_args or {}
        if LENGTH_FIELD not in extra:
            return None
        return extra[LENGTH_FIELD], extra[EOS_FIELD], output_ids

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch.

        Args:
            batch_update: what changed in it.
        """
        process_dict_updates(self._rows, batch_update, self._state)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Forbid or force EOS.

        Args:
            logits: one row per request, changed in place.

        Returns:
            ``logits``.
        """
        if not self._rows:
            return logits
        # Under asynchronous scheduling a placeholder stands for a token in flight, so that the
        # count is right.
        ending = [
            (row, eos) for row, (tokens, eos, ids) in self._rows.items() if len(ids) + 1 >= tokens
        ]
        for eos in {eos for _, eos, _ in self._rows.values()}:
            rows = [row for row, (_, own, _) in self._rows.items() if own == eos]
            logits[rows, eos] = -float("inf")
        for row, eos in ending:
            logits[row] = -float("inf")
            logits[row, eos] = 0.0
        return logits
