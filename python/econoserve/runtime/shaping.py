"""Brings SGLang's batches into the shape that a plan asks for, before SGLang builds the next one.

Owns the moves of requests between the running batch, the parked ones, host memory and the waiting
queue. It carries out; what to move is the plan's.
"""

from http import HTTPStatus
from typing import Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from econoserve.core.types import IterationPlan, Preemption
from econoserve.patches.decode_batch import build_decode_batch, release_for_recompute
from econoserve.patches.host_kvc import discard, is_offloaded, offload, restore
from econoserve.patches.scheduler_loop import ParkingScheduler, Refusal
from econoserve.runtime.host import PolicyHost
from econoserve.runtime.requests import parkable


class ShapingScheduler(ParkingScheduler):
    """Upstream's scheduler with batches that follow a plan.

    Attributes:
        host: the policy and what is known of each request.
        host_tokens: KVC that host memory may hold.
        moved: requests that left the running batch in this iteration and keep their KVC, by id.
        dropped: those of them whose token in flight was lost.
    """

    host: PolicyHost

    def init_running_status(self) -> None:
        """See upstream; also starts with nothing moved."""
        super().init_running_status()
        self.host_tokens = 0
        self.moved: dict[str, Preemption] = {}
        self.dropped: list[str] = []
        self._preempting: frozenset[str] = frozenset()

    def shape(
        self,
        plan: IterationPlan | None,
        running_batch: ScheduleBatch,
        last_batch: ScheduleBatch | None,
    ) -> ScheduleBatch:
        """Refuse, preempt, park and resume as planned.

        Args:
            plan: the plan; without one all parked requests are resumed.
            running_batch: requests that decode.
            last_batch: the batch launched last.

        Returns:
            The running batch.
        """
        self.moved, self.dropped = {}, []
        if plan is not None:
            self._refuse_late(plan)
            self._preempt(plan, [b for b in (running_batch, last_batch) if b is not None])
        resumed = self._resume(plan)
        if plan is not None and last_batch is not None:
            self._park_prefilled(plan, last_batch)
        if resumed:
            batch = build_decode_batch(self, resumed)
            running_batch.filter_batch()
            if running_batch.is_empty():
                running_batch = batch
            else:
                running_batch.merge_batch(batch)
        running_batch.batch_is_full = False
        return running_batch

    def offloaded_tokens(self) -> int:
        """KVC in host memory.

        Returns:
            Tokens.
        """
        return sum(req.seqlen - 1 for req in self.parked.values() if is_offloaded(req))

    def requeue_parked(self) -> None:
        """See ``ParkingScheduler.requeue_parked``."""
        reqs, self.parked = list(self.parked.values()), {}
        self._recompute(reqs)

    def requeue_offloaded(self) -> None:
        """Let requests whose KVC lies in host memory be computed again."""
        self._recompute(
            [self.parked.pop(rid) for rid, req in list(self.parked.items()) if is_offloaded(req)]
        )

    def _refuse_late(self, plan: IterationPlan) -> None:
        if not plan.reject:
            return
        refusals = {
            rid: Refusal(reason, HTTPStatus.SERVICE_UNAVAILABLE, "SloUnreachable")
            for rid, reason in plan.reject
        }
        for req in self.refuse_waiting(refusals):
            self.host.rejected(req)

    def _preempt(self, plan: IterationPlan, batches: list[ScheduleBatch]) -> None:
        if not plan.preempt:
            return
        running = {req.rid: req for batch in batches for req in batch.reqs if not req.finished()}
        leaving: list[tuple[Req, Preemption]] = []
        for rid, how in plan.preempt:
            req = self.parked.get(rid) or running.get(rid)
            if req is None or req is self.chunked_req:
                continue
            if how is Preemption.OFFLOAD and not parkable(req):
                how = Preemption.RECOMPUTE
            if how is Preemption.PARK and (not parkable(req) or req.to_finish is not None):
                continue
            leaving.append((req, how))
        gone = {req.rid for req, _ in leaving}
        for batch in batches:
            batch.filter_batch(reqs_to_exclude=[req for req in batch.reqs if req.rid in gone])
        room = self.host_tokens - self.offloaded_tokens()
        recompute = []
        for req, how in leaving:
            moves = how is Preemption.OFFLOAD and req.to_finish is None and req.seqlen - 1 <= room
            if how is Preemption.PARK:
                self._set_aside(req, how)
            elif moves and (dropped := offload(self, req)) is not None:
                room -= req.seqlen - 1
                self._set_aside(req, how)
                if dropped:
                    self.dropped.append(req.rid)
            else:
                self.parked.pop(req.rid, None)
                recompute.append(req)
        self._recompute(recompute)

    def _set_aside(self, req: Req, how: Preemption) -> None:
        if req.rid not in self.parked:
            self.parked[req.rid] = req
            self.host.records.parked(req.rid, self.now_s)
        self.moved[req.rid] = how
        self.host.preempted(req, how)

    def _recompute(self, reqs: list[Req]) -> None:
        self._preempting = frozenset(req.rid for req in reqs)
        for req in reqs:
            self.host.records.unparked(req.rid, self.now_s)
            self.host.preempted(req, Preemption.RECOMPUTE)
            if is_offloaded(req):
                discard(req)
            else:
                release_for_recompute(self, req)
            if req.to_finish is None:
                self._add_request_to_queue(req, is_retracted=True)
            else:
                self.retire_unadmitted_request(req)
                self.on_gone(req)
        self._preempting = frozenset()

    def _resume(self, plan: IterationPlan | None) -> list[Req]:
        """Take the GTs to resume out of the parked ones; without a plan, all that hold KVC."""
        if plan is None:
            rids = [rid for rid, req in self.parked.items() if not is_offloaded(req)]
        else:
            rids = [rid for rid in plan.resume if rid in self.parked and rid not in self.moved]
        reqs = []
        for rid in rids:
            if is_offloaded(self.parked[rid]) and not self._has_room(self.parked[rid]):
                continue
            req = self.parked.pop(rid)
            if is_offloaded(req):
                restore(self, req)
            self.host.records.unparked(rid, self.now_s)
            reqs.append(req)
        self.host.counters.resumed += len(reqs)
        return reqs

    def _has_room(self, req: Req) -> bool:
        """Whether an offloaded request's row and slots can be had now."""
        allocator = self.token_to_kv_pool_allocator
        free = allocator.available_size() + self.tree_cache.evictable_size()
        return self.req_to_token_pool.available_size() > 0 and req.seqlen - 1 <= free

    def _park_prefilled(self, plan: IterationPlan, last_batch: ScheduleBatch) -> None:
        """Keep GTs whose prompt was just prefilled out of the running batch unless resumed."""
        if not last_batch.forward_mode.is_extend():
            return
        resumed = set(plan.resume)
        decoding = {req.rid for req in last_batch.decoding_reqs or ()}
        parked = [
            req
            for req in last_batch.reqs
            if req.rid not in resumed
            and req.rid not in decoding
            and req is not self.chunked_req
            and req is not last_batch.chunked_req
            and not req.finished()
            and req.to_finish is None
            and parkable(req)
        ]
        if not parked:
            return
        kept_out: list[Any] = [last_batch.chunked_req, *parked]
        last_batch.filter_batch(reqs_to_exclude=[req for req in kept_out if req is not None])
        for req in parked:
            self.parked[req.rid] = req
            self.host.records.parked(req.rid, self.now_s)
