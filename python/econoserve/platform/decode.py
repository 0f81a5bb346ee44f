"""Decode iterations of small batches, recorded once per batch size and then repeated."""

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput

from econoserve.platform.kernels.batch import Batch
from econoserve.platform.operators import round_up
from econoserve.platform.recorded import NOWHERE, RecordedPasses, fill
from econoserve.platform.recording import NotRecordable

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from econoserve.platform.attention import CpuAttentionBackend

MOST_REQUESTS = 256
"""Batch size up to which iterations are recorded; beyond, arithmetic outweighs Python."""

_FILLERS = {
    "input_ids": 0,
    "positions": 0,
    "out_cache_loc": NOWHERE,
    "req_pool_indices": NOWHERE,
    "seq_lens": 1,
}


class DecodeRecordings(RecordedPasses):
    """SGLang's decode graph runner on our platform.

    Args:
        model_runner: SGLang's model runner.
        backend: its attention backend.

    Attributes:
        capture_bs: batch sizes recorded at start; none, since they are recorded when they occur.
    """

    KIND = "decode iterations"

    def __init__(self, model_runner: "ModelRunner", backend: "CpuAttentionBackend") -> None:
        super().__init__(model_runner, backend)
        self.capture_bs: list[int] = []

    def can_run_graph(self, forward_batch: "ForwardBatch") -> bool:
        """Whether this iteration is or may become a recorded one.

        Args:
            forward_batch: a decode batch.

        Returns:
            False for batches with anything beyond tokens in and logits out.
        """
        return (
            self._is_plain(forward_batch)
            and forward_batch.batch_size <= MOST_REQUESTS
            and self._has_room(round_up(forward_batch.batch_size))
        )

    def execute(
        self, forward_batch: "ForwardBatch", pp_proxy_tensors: object | None = None
    ) -> LogitsProcessorOutput:
        """Compute a decode batch; the first of its size is recorded.

        Args:
            forward_batch: a batch for which ``can_run_graph`` holds.
            pp_proxy_tensors: always None.

        Returns:
            The logits, float32 [requests, vocabulary]; valid until the next iteration.
        """
        count = forward_batch.batch_size
        size = round_up(count)
        recorded = self._recorded.get(size)
        if recorded is not None:
            fill(recorded.inputs, forward_batch, _FILLERS)
            recorded.recording.replay()
        else:
            inputs = {name: torch.empty(size, dtype=torch.int64) for name in _FILLERS}
            fill(inputs, forward_batch, _FILLERS)
            rows, lengths = inputs["req_pool_indices"].numpy(), inputs["seq_lens"].numpy()
            batch = Batch.of(rows, lengths, None)
            self._backend.use(batch)
            recorded = self._record(
                size,
                inputs,
                batch,
                lambda: _only_logits(self._forward(forward_batch, inputs, batch_size=size)),
                size,
            )
            if recorded is None:
                return self._model_runner.eager_runner.execute(forward_batch)
        return LogitsProcessorOutput(next_token_logits=recorded.result[:count])


def _only_logits(output: object) -> torch.Tensor:
    if not isinstance(output, LogitsProcessorOutput):
        raise NotRecordable(f"the model returns {type(output).__name__}")
    logits = output.next_token_logits
    if not isinstance(logits, torch.Tensor):
        raise NotRecordable(f"the model's logits are {type(logits).__name__}")
    others = [
        name
        for name, value in vars(output).items()
        if isinstance(value, torch.Tensor) and value is not logits
    ]
    if others:
        raise NotRecordable(f"the model returns {', '.join(others)}")
    return logits
