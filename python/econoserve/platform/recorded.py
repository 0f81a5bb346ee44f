"""Forward passes that are recorded once per size and then repeated: what all kinds of them share.

On a small model most of a forward pass is Python: modules, contexts, argument checks. SGLang has
graph runners for that; on a CPU it makes graphs with ``torch.compile``, which needs a compiler and
minutes. Ours record instead (see ``recording``). What they have not recorded, or must not, runs as
before.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.model_executor.forward_context import forward_context, get_forward_context
from sglang.srt.runtime_context import get_observability, get_parallel

from econoserve.platform.kernels.batch import Batch
from econoserve.platform.recording import Recording, TooLarge

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from econoserve.platform.attention import CpuAttentionBackend

logger = logging.getLogger(__name__)

MEMORY_BYTES = 256 << 20
"""Memory for all recordings of one kind together; what does not fit runs as before."""
LARGEST_SHARE = 1 / 8
"""Of this, the most for one recording: small sizes, which gain most, must find room."""

NOWHERE = 0
"""Where what fills a pass up to a recorded size reads and writes: SGLang keeps slot 0 of the KV
cache and row 0 of the table for this."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded pass, and what its kernels know by address only.

    Attributes:
        inputs: what changes from one pass to the next, by the names of ``ForwardBatch``.
        batch: what it attends to.
        weights: the model's.
        recording: the pass.
        result: what it computes.
    """

    inputs: dict[str, torch.Tensor]
    batch: Batch
    weights: tuple[torch.Tensor, ...]
    recording: Recording
    result: torch.Tensor


class RecordedPasses:
    """Recordings of one kind of pass, by size.

    Args:
        model_runner: SGLang's model runner.
        backend: its attention backend.
    """

    KIND: ClassVar[str]

    def __init__(self, model_runner: "ModelRunner", backend: "CpuAttentionBackend") -> None:
        self._model_runner = model_runner
        self._backend = backend
        self._recorded: dict[int, Recorded] = {}
        self._least_refused = math.inf
        self._memory_bytes = 0
        self._checked: set[int] = set()
        parallel, observability = get_parallel(), get_observability()
        self._enabled = (
            parallel.tp_size == parallel.pp_size == parallel.num_dp_ranks == 1
            and model_runner.spec_algorithm.is_none()
            and not model_runner.is_draft_worker
            and not model_runner.model_config.is_encoder_decoder
            and not hasattr(model_runner.model, "prepare_forward_batch")
            # These look into the modules of a pass, which a repetition does not run.
            and not observability.debug_tensor_dump_output_folder
            and not observability.forward_hooks
        )

    def _is_plain(self, forward_batch: "ForwardBatch") -> bool:
        """Whether a pass has nothing beyond tokens in and logits out."""
        return (
            self._enabled
            and not forward_batch.return_logprob
            and forward_batch.capture_hidden_mode == CaptureHiddenMode.NULL
            and forward_batch.mrope_positions is None
            and forward_batch.input_embeds is None
            and forward_batch.spec_info is None
            and not any(forward_batch.lora_ids or ())
        )

    def _has_room(self, size: int) -> bool:
        """Whether no recording as small has been too large yet."""
        return size < self._least_refused

    def _record(
        self,
        size: int,
        inputs: dict[str, torch.Tensor],
        batch: Batch,
        compute: Callable[[], torch.Tensor],
        used: int,
    ) -> Recorded | None:
        """Record a pass while it is computed; repeat it at once if none of about its size was.

        Args:
            size: of the pass.
            inputs: its inputs.
            batch: what it attends to.
            compute: computes it.
            used: rows of the result that are not padding.

        Returns:
            The recorded pass, or None if the eager runner has to compute this one again.
        """
        room = min(MEMORY_BYTES - self._memory_bytes, int(MEMORY_BYTES * LARGEST_SHARE))
        recording = Recording(room)
        try:
            with recording.record():
                result = compute()
        except TooLarge:
            self._least_refused = min(size, self._least_refused)
            return None
        except Exception as problem:
            # The model wants more than tokens, or does not do the same each time.
            self._give_up(repr(problem))
            return None
        if size.bit_length() not in self._checked and not _repeats(recording, result[:used]):
            self._give_up("a repetition differed")
            return None
        self._checked.add(size.bit_length())
        model = self._model_runner.model
        weights = (*(p.data for p in model.parameters()), *model.buffers())
        recorded = Recorded(inputs, batch, weights, recording, result)
        self._memory_bytes += recording.memory_bytes
        self._recorded[size] = recorded
        return recorded

    def _give_up(self, reason: str) -> None:
        logger.warning("%s are not recorded: %s", self.KIND, reason)
        self._enabled = False
        self._recorded.clear()

    def _forward(
        self,
        forward_batch: "ForwardBatch",
        inputs: dict[str, torch.Tensor],
        **changes: Any,
    ) -> object:
        """The model's forward pass on recorded inputs, and on nothing else of this batch.

        What else describes the batch would be out of date at the next: a model that reads it must
        fail now.
        """
        per_batch = {
            field.name: None
            for field in fields(forward_batch)
            if not isinstance(getattr(forward_batch, field.name), bool | Enum)
        }
        batch = replace(forward_batch, **(per_batch | inputs | changes))
        with torch.no_grad(), forward_context(get_forward_context(), forward_batch=batch):
            return self._model_runner.model.forward(batch.input_ids, batch.positions, batch)


def _repeats(recording: Recording, result: torch.Tensor) -> bool:
    """Whether a recording makes its result again from memory that is spoilt."""
    first = result.clone()
    recording.spoil()
    recording.replay()
    return torch.equal(first, result)


def fill(
    inputs: dict[str, torch.Tensor], forward_batch: "ForwardBatch", fillers: dict[str, int]
) -> None:
    """Put what a pass computes into the inputs of a recorded one.

    Args:
        inputs: the recorded one's.
        forward_batch: the pass; at most as large.
        fillers: for each input what it holds beyond the pass.
    """
    for name, target in inputs.items():
        source = getattr(forward_batch, name)
        count = len(source)
        target[:count] = source
        if count < len(target):
            target[count:] = fillers[name]
