"""Seam: what the scheduler tells about a finished request.

Upstream: ``SchedulerOutputStreamer`` may add per-request fields to its messages
(``build_additional_customized_info``), chosen by ``Scheduler.get_output_streamer_class``; the
detokenizer passes them on and the tokenizer process puts them into ``meta_info``. Changed: one
small dict per finished request. These are public seams; the module only binds them.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

REPORT_KEY = "econoserve"
"""The report's name in messages and in ``meta_info``."""

TARGETS: dict[str, dict[str, str]] = {
    "sglang.srt.managers.scheduler.Scheduler": {
        "get_output_streamer_class": "ec7f2f93f3a97f1ce1ecc4b57d2f966225e8a15ee5df3f3cc7ebac5725277808",
        "init_output_streamer": "b57b58d8d26d47c1953da5fe769d18204bc2c5cd560e28321d5ea74ef608d4c4",
    },
    "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer": {
        "_stream_output_generation": "830e84a497de644a3f3e66163ae5212798ba653d6dabb315a41f2735d6333d8b",
    },
}


class ReportingStreamer(SchedulerOutputStreamer):
    """Upstream's streamer with the scheduler's report on finished requests.

    Attributes:
        report: gives the report of a request, made of msgpack-safe values.
    """

    has_additional_customized_info: ClassVar[bool] = True
    report: Callable[[Req], dict[str, Any]] = staticmethod(lambda req: {})

    def build_additional_customized_info(self, reqs: list[Req]) -> dict[str, list]:
        """One list per request of this message: its report if it has finished, else empty.

        Args:
            reqs: the requests in the message.

        Returns:
            The lists under ``REPORT_KEY``, in the order of ``reqs``; nothing if none has
            finished, so that no list of nothing is pickled and sent with every token. Upstream
            takes an empty list and none at all alike.
        """
        if not any(req.finished() for req in reqs):
            return {}
        return {REPORT_KEY: [[self.report(req)] if req.finished() else [] for req in reqs]}

    def is_request_level_customized_info_key(self, key: str) -> bool:
        """Whether a field belongs to the request, not to its tokens.

        Args:
            key: the field's name.

        Returns:
            ``True`` for our report.
        """
        return key == REPORT_KEY
