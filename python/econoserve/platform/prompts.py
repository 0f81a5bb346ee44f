"""Passes with prompts, alone or beside decodes, recorded once per number of tokens.

Recorded is all that comes before the logits: how many requests share the tokens, and which tokens
have logits, is then the business of SGLang's logits processor, and one recording serves any mixture
of prompts, chunks and decodes with as many tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import forward_context, get_forward_context

from econoserve.platform.kernels.batch import Batch
from econoserve.platform.operators import round_up
from econoserve.platform.recorded import NOWHERE, RecordedPasses, fill
from econoserve.platform.recording import NotRecordable

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from econoserve.platform.attention import CpuAttentionBackend

MOST_TOKENS = 512
"""Tokens up to which passes are recorded; beyond, arithmetic outweighs Python."""

_FILLERS = {"input_ids": 0, "positions": 0, "out_cache_loc": NOWHERE}


class PromptRecordings(RecordedPasses):
    """SGLang's prefill graph runner on our platform.

    Args:
        model_runner: SGLang's model runner.
        backend: its attention backend.
    """

    KIND = "prompts"

    def __init__(self, model_runner: "ModelRunner", backend: "CpuAttentionBackend") -> None:
        super().__init__(model_runner, backend)
        processors = [m for m in model_runner.model.modules() if isinstance(m, LogitsProcessor)]
        self._enabled = self._enabled and model_runner.is_generation and len(processors) == 1
        self._processor = processors[0] if processors else None
        self._lm_head: torch.nn.Module | None = None

    def can_run_graph(self, forward_batch: "ForwardBatch") -> bool:
        """Whether this pass is or may become a recorded one.

        Args:
            forward_batch: a batch with prompts.

        Returns:
            False for batches with anything beyond tokens in and logits out.
        """
        return (
            self._is_plain(forward_batch)
            and forward_batch.forward_mode in (ForwardMode.EXTEND, ForwardMode.MIXED)
            and len(forward_batch.input_ids) <= MOST_TOKENS
            and self._has_room(round_up(len(forward_batch.input_ids)))
            and forward_batch.replace_embeds is None
            and forward_batch.multi_item_delimiter_indices is None
            and not forward_batch.contains_mm_inputs()
        )

    def execute(self, forward_batch: "ForwardBatch", **keywords: object) -> LogitsProcessorOutput:
        """Compute a batch with prompts; the first of its number of tokens is recorded.

        Args:
            forward_batch: a batch for which ``can_run_graph`` holds.
            **keywords: ``pp_proxy_tensors``, always None.

        Returns:
            The logits of each request's last token, as SGLang's logits processor makes them.
        """
        forward_batch.forward_mode = ForwardMode.EXTEND  # as upstream's eager runner
        count = len(forward_batch.input_ids)
        size = round_up(count)
        batch = Batch.of(
            *(
                getattr(forward_batch, name).numpy().astype("int64")
                for name in ("req_pool_indices", "seq_lens", "extend_seq_lens")
            )
        )
        recorded = self._recorded.get(size)
        if recorded is not None:
            fill(recorded.inputs, forward_batch, _FILLERS)
            recorded.batch.take(batch)
            recorded.recording.replay()
        else:
            inputs = {name: torch.empty(size, dtype=torch.int64) for name in _FILLERS}
            fill(inputs, forward_batch, _FILLERS)
            room = Batch.with_room(size)
            room.take(batch)
            self._backend.use(room)
            recorded = self._record(
                size, inputs, room, lambda: self._hidden_states(forward_batch, inputs), count
            )
            if recorded is None:
                return self._model_runner.eager_runner.execute(forward_batch)
        with forward_context(get_forward_context(), forward_batch=forward_batch):
            return self._processor(
                forward_batch.input_ids, recorded.result[:count], self._lm_head, forward_batch
            )

    def _hidden_states(
        self, forward_batch: "ForwardBatch", inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """What the model gives its logits processor."""
        with _intercepted(self._processor) as calls:
            output = self._forward(forward_batch, inputs)
        if len(calls) != 1 or output is not calls[0].output or _has_fields(output):
            raise NotRecordable("the logits processor is not the model's last step")
        call = calls[0]
        if not isinstance(call.hidden_states, torch.Tensor) or call.takes_more:
            raise NotRecordable("the logits processor takes more than hidden states")
        self._lm_head = call.lm_head
        return call.hidden_states


def _has_fields(output: LogitsProcessorOutput) -> bool:
    return any(value is not None for value in vars(output).values())


class _Call(NamedTuple):
    """Of a logits processor: what it was given, and what it returned."""

    hidden_states: object
    lm_head: torch.nn.Module
    takes_more: bool
    output: LogitsProcessorOutput


@contextmanager
def _intercepted(processor: LogitsProcessor) -> Iterator[list[_Call]]:
    """Let a logits processor do nothing but note its arguments."""
    calls: list[_Call] = []

    def note(
        input_ids: torch.Tensor,
        hidden_states: object,
        lm_head: torch.nn.Module,
        logits_metadata: object,
        aux_hidden_states: object = None,
        hidden_states_before_norm: object = None,
    ) -> LogitsProcessorOutput:
        takes_more = aux_hidden_states is not None or hidden_states_before_norm is not None
        output = LogitsProcessorOutput(next_token_logits=None)
        calls.append(_Call(hidden_states, lm_head, takes_more, output))
        return output

    processor.forward = note
    try:
        yield calls
    finally:
        del processor.forward
