"""Seam: which prompts a forward pass prefills, and how many tokens of each.

Upstream: ``Scheduler._get_new_batch_prefill_raw`` sorts the waiting queue by its
``SchedulePolicy`` and lets a ``PrefillAdder`` admit requests while its own estimate of future KV
use allows. Changed: the order and the amounts come from an ``IterationPlan``; the adder only
checks that the tokens exist now. Why no public seam serves: ``get_prefill_adder_class`` is one and
is used, but the order has none. An upstream hook that takes ``[(request, tokens)]`` would make
this module unnecessary.
"""

from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import (
    AddReqResult,
    PrefillAdder,
    SchedulePolicy,
    _PrefillAdmission,
)

TARGETS: dict[str, dict[str, str]] = {
    "sglang.srt.managers.scheduler.Scheduler": {
        "_get_new_batch_prefill_raw": "09e8cf03a4d0c1bb2eaeed359d929a07c7df0c44281849b92ed2cba922402eec",
        "get_num_allocatable_reqs": "9ef9b9c5af8eca41c1c4b043115b78335fb13b792ce9e92ef2893442ddc2ba6f",
    },
    "sglang.srt.managers.schedule_policy.PrefillAdder": {
        "__init__": "311684cd26be5b49ecc864a1f5adabf6263513b986c4d8d5738703b8d58615aa",
        "add_chunked_req": "af3ae7db76b5e8d2adab38add0312ebbaae1932f2095c39fe670be6db67e53cc",
        "add_one_req": "11ea292b16f33cb686bf72862fee68949b2586dac1b4c42a45525c6b43c17f7f",
        "_commit_prefill_admission": "6151e6da5dfb0b6f7a8a8a8ecd50a3c85b1abc5a6dc4de858523750327bf006e",
        "_update_prefill_budget": "63965ae1945bd25ffa773e73e0c1976d13bc914d542863ec2a5c6fd6b6b3c150",
        "_lock_node": "ed8817097244cf1cddda673edda1a8902f7c7e8ea7661367ea4778a1b1ddbc7f",
    },
    "sglang.srt.managers.schedule_policy.SchedulePolicy": {
        "calc_priority": "7584774bd710d20ea1b05d1b8900f8e029f981844a5cd9e02f92d8ac23f9f1d3",
    },
    "sglang.srt.mem_cache.prefill_budget": {
        "PrefillBudget": "887795e5af9fb2fe3c7d341e870a9254afd421c1c7a44c6a880d859ce45a434c",
    },
    "sglang.srt.managers.schedule_batch.ScheduleBatch": {
        "mix_with_running": "6101dfc75b7c256459823933d8515e41d018f288266bcb2cca8f23d7d4ea7dd9",
    },
    "sglang.srt.managers.schedule_batch.Req": {
        "init_next_round_input": "e7af52023f823aec3726cf67236ed435b6cf8e585376f3032bcb636bf73372fb",
    },
}


class PlannedOrder(SchedulePolicy):
    """Upstream's queue order, or the plan's while one is set.

    Attributes:
        planned: request ids in the order to admit, or ``None`` for upstream's own order.
    """

    planned: list[str] | None = None

    def calc_priority(
        self, waiting_queue: list[Req], running_batch: Any = None, processed_tokens: int = 0
    ) -> None:
        """Sort the waiting queue in place; see upstream's method of this name.

        Args:
            waiting_queue: requests that wait for prefill.
            running_batch: the running batch, for upstream's order.
            processed_tokens: upstream's token counter, for its order.
        """
        if self.planned is None:
            super().calc_priority(waiting_queue, running_batch, processed_tokens)
            return
        # The planned ones to the front; the others, who may be many, stay as they are.
        rank = {rid: position for position, rid in enumerate(self.planned)}
        places: list[int] = []
        for place, req in enumerate(waiting_queue):
            if len(places) == len(rank):
                break
            if req.rid in rank:
                places.append(place)
        planned = [waiting_queue.pop(place) for place in reversed(places)]
        waiting_queue[:0] = sorted(planned, key=lambda req: rank[req.rid])


class PlannedPrefillAdder(PrefillAdder):
    """Admits exactly the planned prompts; the ledger has decided that they fit.

    Args:
        planned: tokens to prefill by request id; at most one ends inside its prompt.
        args: as upstream.
        kwargs: as upstream.
    """

    def __init__(self, *args: Any, planned: dict[str, int], **kwargs: Any) -> None:
        self._planned = dict(planned)
        super().__init__(*args, **kwargs)

    def _get_running_request_total_token_offset(self, req: Req) -> int:
        """Upstream's guess of what a running request will use; the ledger knows better."""
        return 0

    def budget_state(self) -> AddReqResult:
        """Continue while planned prompts are left.

        Returns:
            ``CONTINUE`` or ``OTHER``.
        """
        return AddReqResult.CONTINUE if self._planned else AddReqResult.OTHER

    def add_chunked_req(self, req: Req) -> Req | None:
        """Continue the prompt that is under way.

        Args:
            req: the request whose prompt is partly prefilled.

        Returns:
            The request if its prompt is still unfinished after this pass, else ``None``.
        """
        tokens = self._planned.pop(req.rid, 0)
        tokens = min(tokens, int(self.memory_budget.remaining_current))
        if tokens < 1:
            # Upstream counts a pass against the unfinished prompt whenever anything is
            # prefilled, so nothing else may run without it.
            self._planned.clear()
            return req
        self.rem_chunk_tokens = tokens
        return super().add_chunked_req(req)

    def add_one_req(
        self, req: Req, has_chunked_req: bool, truncation_align_size: int | None
    ) -> AddReqResult:
        """Admit one waiting request if the plan names it and its tokens are there.

        Args:
            req: the request; its prefix match is current.
            has_chunked_req: whether an unfinished prompt is in this pass.
            truncation_align_size: an unfinished prompt ends on a multiple of this.

        Returns:
            Whether the caller may go on to the next request.
        """
        tokens = self._planned.pop(req.rid, None)
        if tokens is None:
            return AddReqResult.OTHER
        left = len(req.full_untruncated_fill_ids) - req.prefix_len
        unfinished = tokens < left
        if unfinished and truncation_align_size:
            tokens = tokens // truncation_align_size * truncation_align_size
        tokens = min(tokens, left)
        if unfinished and (has_chunked_req or self.new_chunked_req is not None or tokens < 1):
            return AddReqResult.OTHER
        with self._lock_node(req.last_node):
            if tokens > self.memory_budget.remaining_current:
                return AddReqResult.OTHER
            admission = _PrefillAdmission(req.prefix_len, tokens, 0, unfinished, 0)
            self._commit_prefill_admission(req, admission, 0)
        return self.budget_state()
