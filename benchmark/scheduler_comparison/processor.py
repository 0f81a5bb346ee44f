"""The logit processor that SGLang's scheduler process runs; see ``lengths`` for what it does.

A module of its own: requests carry the class by its name, and SGLang imports it from here.
"""

from typing import TYPE_CHECKING, Any

from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from benchmark.scheduler_comparison.lengths import end_on_time

if TYPE_CHECKING:
    import torch


class EndOnTime(CustomLogitProcessor):
    """Ends each response at the length its request carries; stateless, shared by all requests."""

    def __call__(
        self, logits: "torch.Tensor", custom_param_list: list[dict[str, Any]] | None = None
    ) -> "torch.Tensor":
        """See upstream.

        Args:
            logits: one row per request.
            custom_param_list: the requests' ``custom_params``, in the order of the rows.

        Returns:
            ``logits``, changed in place.
        """
        return end_on_time(logits, custom_param_list) if custom_param_list else logits
