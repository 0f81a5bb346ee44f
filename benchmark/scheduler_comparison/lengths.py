"""How a response gets the length of its trace without any scheduler knowing it.

Owns the fields that carry a length to the logit processor, and the rule that ends a response. It
must not keep state: the count of a request's tokens is read from the request at every step, so
preempted and recomputed requests end at the same token as undisturbed ones.
"""

from collections.abc import Sequence
from typing import Any

LENGTH_FIELD = "benchmark_length"
"""Key in ``custom_params``: output tokens of the response, EOS included. No scheduler reads it."""

EOS_FIELD = "benchmark_eos_ids"
"""Key in ``custom_params``: ids of the tokens that end a response; the first is the one forced."""

_NEVER = -float("inf")


def custom_params(output_tokens: int, eos_ids: Sequence[int]) -> dict[str, Any]:
    """The fields a request carries for the processor.

    Args:
        output_tokens: wanted length in tokens, EOS included, at least 1.
        eos_ids: the model's end-of-sequence tokens, at least one.

    Returns:
        A dict for ``sampling_params["custom_params"]``.
    """
    return {LENGTH_FIELD: output_tokens, EOS_FIELD: list(eos_ids)}


def token_number(req: Any) -> int:
    """Which output token of a request the running forward pass computes.

    ``output_ids`` lags behind by a token or two under overlap scheduling. The length of the KV
    that is committed does not: it is set when a batch is prepared, in the same turn of the
    scheduler's loop that runs the batch.

    Args:
        req: SGLang's request, in the batch that is being sampled.

    Returns:
        1 for the first output token; 0 or less inside a prompt that is prefilled in pieces, where
        the sampled token is dropped.
    """
    return req.kv.kv_committed_len - len(req.origin_input_ids) + 1


def end_on_time(logits: Any, params: Sequence[dict[str, Any]]) -> Any:
    """Forbid EOS before a response has its length, and force it then.

    Args:
        logits: one row per request, a torch tensor or numpy array, changed in place.
        params: ``custom_params`` of each row's request, with ``__req__`` added by SGLang.

    Returns:
        ``logits``.
    """
    eos_ids = params[0][EOS_FIELD]
    for eos_id in eos_ids:
        logits[:, eos_id] = _NEVER
    ending = [
        row
        for row, fields in enumerate(params)
        if token_number(fields["__req__"]) >= fields[LENGTH_FIELD]
    ]
    if ending:
        logits[ending] = _NEVER
        logits[ending, eos_ids[0]] = 0.0
    return logits
