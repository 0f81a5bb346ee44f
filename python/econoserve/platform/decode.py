"""Decode iterations of small batches, recorded once per batch size and then repeated.

On a small model most of a decode iteration is Python: modules, contexts, argument checks. SGLang
has decode graphs for that; on a CPU it makes them with ``torch.compile``, which needs a compiler
and minutes. This is a graph runner that records instead (see ``recording``). What it has not
recorded, or must not, runs as before.
"""

import logging
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.model_executor.forward_context import forward_context, get_forward_context
from sglang.srt.runtime_context import get_parallel

from econoserve.platform.kernels.batch import Batch
from econoserve.platform.operators import round_up
from econoserve.platform.recording import NotRecordable, Recording

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from econoserve.platform.attention import CpuAttentionBackend

logger = logging.getLogger(__name__)

MOST_REQUESTS = 256
"""Batch size up to which iterations are recorded; beyond, arithmetic outweighs Python."""
MEMORY_BYTES = 256 << 20
"""Memory for all recordings together; what does not fit runs as before."""

# Where the requests that fill a batch up to a recorded size read and write: SGLang keeps slot 0 of
# the KV cache and row 0 of the table for this.
_NOWHERE = 0


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What changes from one iteration to the next; [requests] each."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    out_cache_loc: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor

    @classmethod
    def of_size(cls, requests: int) -> "_Inputs":
        return cls(*(torch.empty(requests, dtype=torch.int64) for _ in range(5)))

    def by_name(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def fill(self, forward_batch: "ForwardBatch") -> None:
        count = forward_batch.batch_size
        for name, filler in (
            ("input_ids", 0),
            ("positions", 0),
            ("out_cache_loc", _NOWHERE),
            ("req_pool_indices", _NOWHERE),
            ("seq_lens", 1),
        ):
            target = getattr(self, name)
            target[:count] = getattr(forward_batch, name)
            if count < len(target):
                target[count:] = filler


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A recorded iteration, and what its kernels know by address only."""

    inputs: _Inputs
    batch: Batch
    weights: tuple[torch.Tensor, ...]
    recording: Recording
    logits: torch.Tensor


class DecodeRecordings:
    """SGLang's decode graph runner on our platform.

    Args:
        model_runner: SGLang's model runner.
        backend: its attention backend.

    Attributes:
        capture_bs: batch sizes recorded at start; none, since they are recorded when they occur.
    """

    def __init__(self, model_runner: "ModelRunner", backend: "CpuAttentionBackend") -> None:
        self.capture_bs: list[int] = []
        self._model_runner = model_runner
        self._backend = backend
        self._recorded: dict[int, _Recorded] = {}
        self._too_large: set[int] = set()
        self._memory_bytes = 0
        parallel = get_parallel()
        self._enabled = (
            parallel.tp_size == parallel.pp_size == parallel.num_dp_ranks == 1
            and model_runner.spec_algorithm.is_none()
            and not model_runner.is_draft_worker
            and not model_runner.model_config.is_encoder_decoder
            and not hasattr(model_runner.model, "prepare_forward_batch")
        )

    def can_run_graph(self, forward_batch: "ForwardBatch") -> bool:
        """Whether this iteration is or may become a recorded one.

        Args:
            forward_batch: a decode batch.

        Returns:
            False for batches with anything beyond tokens in and logits out.
        """
        return (
            self._enabled
            and forward_batch.batch_size <= MOST_REQUESTS
            and not forward_batch.return_logprob
            and forward_batch.capture_hidden_mode == CaptureHiddenMode.NULL
            and forward_batch.mrope_positions is None
            and forward_batch.input_embeds is None
            and forward_batch.spec_info is None
            and not any(forward_batch.lora_ids or ())
            and round_up(forward_batch.batch_size) not in self._too_large
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
        if recorded is None:
            recorded = self._record(size, forward_batch)
            if recorded is None:
                return self._model_runner.eager_runner.execute(forward_batch)
        else:
            recorded.inputs.fill(forward_batch)
            recorded.recording.replay()
        return LogitsProcessorOutput(next_token_logits=recorded.logits[:count])

    def _record(self, size: int, forward_batch: "ForwardBatch") -> _Recorded | None:
        inputs = _Inputs.of_size(size)
        inputs.fill(forward_batch)
        batch = Batch.of(inputs.req_pool_indices.numpy(), inputs.seq_lens.numpy(), None)
        self._backend.use(batch)
        recording = Recording()
        try:
            with recording.record():
                output = self._run(inputs, size, forward_batch)
            logits = _only_logits(output)
        except Exception as problem:
            # The model wants more than tokens, or does not do the same each time. The eager runner
            # computes this iteration again.
            logger.warning("decode iterations are not recorded: %r", problem)
            self._enabled = False
            return None
        first = logits.clone()
        recording.spoil()
        recording.replay()
        if not torch.equal(first, logits):
            logger.warning("decode iterations are not recorded: a repetition differed")
            self._enabled = False
            return None
        model = self._model_runner.model
        weights = (*(p.data for p in model.parameters()), *model.buffers())
        recorded = _Recorded(inputs, batch, weights, recording, logits)
        if self._memory_bytes + recording.memory_bytes <= MEMORY_BYTES:
            self._memory_bytes += recording.memory_bytes
            self._recorded[size] = recorded
        else:
            self._too_large.add(size)
        return recorded

    def _run(self, inputs: _Inputs, size: int, forward_batch: "ForwardBatch") -> object:
        # What else describes this batch would be out of date at the next: a model that reads it
        # must fail now.
        per_batch = {
            field.name: None
            for field in fields(forward_batch)
            if isinstance(getattr(forward_batch, field.name), torch.Tensor | list)
        }
        batch = replace(
            forward_batch, **(per_batch | inputs.by_name()), batch_size=size, seq_lens_sum=None
        )
        with torch.no_grad(), forward_context(get_forward_context(), forward_batch=batch):
            return self._model_runner.model.forward(batch.input_ids, batch.positions, batch)


def _only_logits(output: object) -> torch.Tensor:
    if not isinstance(output, LogitsProcessorOutput):
        raise NotRecordable(f"the model returns {type(output).__name__}")
    logits = output.next_token_logits
    others = [
        name
        for name, value in vars(output).items()
        if isinstance(value, torch.Tensor) and value is not logits
    ]
    if others:
        raise NotRecordable(f"the model returns {', '.join(others)}")
    return logits
