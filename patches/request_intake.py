"""Seam: a request on its way from HTTP or the engine's caller to the scheduler, and its answer.

Upstream: ``TokenizerManager.generate_request`` sees the request body and the HTTP request;
``update_request_meta_info`` fills the answer's ``meta_info``; ``_handle_abort_finish_reason``
turns a refusal into an exception, unless the request is streamed. Changed: SLO headers and
``service_tier`` are read, checked and put into ``custom_params``; the scheduler's report is
completed with the times the caller saw; a refusal before any output is an exception for streams,
too. Why no public seam serves: headers and ``service_tier`` are dropped before the scheduler. An
upstream request field for SLOs would make this module unnecessary.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException, Request
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager

from econoserve.patches.output_report import REPORT_KEY
from econoserve.patches.retry_after import answer_with, can_answer, refusal_of
from econoserve.slo import attach_fields, complete_report

logger = logging.getLogger(__name__)

POLL_S = 0.1
"""Time between two looks at what is left to do before the server ends."""

DROPPED_FIELDS = ("service_tier", "user")
"""Fields of OpenAI's requests that SGLang does not hand on."""

ABORT_S = 2.0
"""Time for aborts to be answered then."""

KEPT_REPORTS = 10_000
"""Reports of finished requests kept for ``/econoserve/requests/{id}``."""

TARGETS: dict[str, dict[str, str]] = {
    "sglang.srt.managers.tokenizer_manager.TokenizerManager": {
        "sigterm_watchdog": "a7c8325071b2137783a428e579165d9c19a55d9d94fdd54cd86b69bdb531fc6b",
        "generate_request": "894e0b7b045095200ca7ab30150bdcc7ef605c759d5d487d95427c473cf61f0a",
        "_handle_abort_finish_reason": "69898a3eeed2dec9dfdf0b0debfb8c89c2d291d9dcc3ece5bd122cd7a74f1e46",
        "update_request_meta_info": "acccc58e0ca8eb2f63d2441f7c037919f17f91154903fd8686a5d46d6f7f5b8a",
    },
    "sglang.srt.entrypoints.engine": {
        "init_tokenizer_manager": "60ae903ef4cd093ec1165e422219b9c0ba3a11853fd503a513d28071ad798707",
    },
}


async def _dropped_fields_of(request: Any) -> dict[str, Any]:
    """OpenAI's ``service_tier`` and ``user`` of an HTTP request, which upstream drops."""
    if not isinstance(request, Request) or "json" not in request.headers.get("content-type", ""):
        return {}
    # Both are cached: the endpoint has read them.
    text = await request.body()
    if not any(f'"{name}"'.encode() in text for name in DROPPED_FIELDS):
        return {}
    body = await request.json()
    found = body if isinstance(body, dict) else {}
    return {name: found[name] for name in DROPPED_FIELDS if name in found}


def _raise_refusal(output: Any, alone: bool, request: Any) -> None:
    """Upstream streams a refusal by the scheduler as an output; before any other it is an error."""
    if not isinstance(output, dict):
        return
    reason = output["meta_info"].get("finish_reason") or {}
    if reason.get("type") != "abort":
        return
    if alone and reason.get("status_code") == HTTPStatus.BAD_REQUEST:
        raise ValueError(reason["message"])
    refusal = refusal_of(output["meta_info"])
    if refusal is not None and can_answer(request):
        raise refusal


class EconoTokenizerManager(TokenizerManager):
    """Upstream's tokenizer manager that takes SLOs in and reports on them.

    Attributes:
        drain_s: time for requests to end after SIGTERM.
        reports: report by request id of the last finished requests, oldest first.
    """

    drain_s = 5.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.reports: OrderedDict[str, dict[str, Any]] = OrderedDict()
        super().__init__(*args, **kwargs)

    async def sigterm_watchdog(self) -> None:
        """See upstream, which waits until every request has ended; here only so long."""
        while not self.gracefully_exit:
            await asyncio.sleep(POLL_S)
        await self._wait_for_requests(self.drain_s)
        if self.rid_to_state:
            logger.warning(
                "%d requests have not ended %g s after SIGTERM (--econoserve-drain-s): aborted",
                len(self.rid_to_state),
                self.drain_s,
            )
            self.abort_request(abort_all=True)
            await self._wait_for_requests(ABORT_S)
        await super().sigterm_watchdog()

    async def _wait_for_requests(self, limit_s: float) -> None:
        until_s = time.monotonic() + limit_s
        while self.rid_to_state and time.monotonic() < until_s:
            await asyncio.sleep(POLL_S)

    async def generate_request(
        self, obj: GenerateReqInput | EmbeddingReqInput, request: Any = None
    ) -> AsyncIterator[dict[str, Any]]:
        """Serve a request; see upstream.

        Args:
            obj: the request.
            request: the HTTP request it came with, if any; its SLO headers, its
                ``service_tier`` and its ``user`` are read.

        Yields:
            Outputs as upstream.

        Raises:
            ValueError: something about an SLO is wrong, or the scheduler found the request bad;
                becomes HTTP 400.
            HTTPException: the scheduler refused the request for now, with ``Retry-After``. A
                stream raises it if that comes first, under our own HTTP entry point.
        """
        if isinstance(obj, GenerateReqInput):
            headers = request.headers if request is not None else {}
            dropped = await _dropped_fields_of(request)
            obj.sampling_params = attach_fields(obj.sampling_params, headers, **dropped)
        started = False
        try:
            # Closed at once when a refusal is raised, so that the other prompts are aborted.
            async with aclosing(super().generate_request(obj, request)) as outputs:
                async for output in outputs:
                    if not started and isinstance(obj, GenerateReqInput):
                        _raise_refusal(output, obj.batch_size == 1, request)
                    started = True
                    yield output
        except HTTPException as error:
            answer_with(request, error)
            raise

    async def _handle_abort_finish_reason(
        self, out: dict[str, Any], state: ReqState, is_stream: bool
    ) -> dict[str, Any] | None:
        try:
            answer: dict[str, Any] | None = await super()._handle_abort_finish_reason(
                out, state, is_stream
            )
        except HTTPException as error:
            raise refusal_of(out["meta_info"]) or error from None
        return answer

    def update_request_meta_info(
        self,
        meta_info: dict,
        state: ReqState,
        customized_info: dict,
        index: int,
        finish_reason: dict | None,
    ) -> None:
        """Fill an answer's ``meta_info``; see upstream.

        Args:
            meta_info: filled in place; gets ``econoserve`` once the request has finished.
            state: the request's state in this process.
            customized_info: fields of the scheduler's message.
            index: the request's position in that message.
            finish_reason: why it finished, if it has.
        """
        others = {key: value for key, value in customized_info.items() if key != REPORT_KEY}
        super().update_request_meta_info(meta_info, state, others, index, finish_reason)
        reports = customized_info.get(REPORT_KEY)
        if reports is None or not reports[index]:
            return
        stats = state.time_stats
        now_s = time.perf_counter()
        report = complete_report(
            reports[index][-1],
            first_token_s=(stats.first_token_time or now_s) - stats.created_time,
            finished_s=now_s - stats.created_time,
            streamed=state.obj.stream,
        )
        meta_info[REPORT_KEY] = report
        self.reports[meta_info["id"]] = report
        while len(self.reports) > KEPT_REPORTS:
            self.reports.popitem(last=False)
