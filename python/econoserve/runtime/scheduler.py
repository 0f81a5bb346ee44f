"""EconoServe in SGLang's scheduler process: asks the policy, carries out the plan, reports back.

Owns the translation between SGLang's requests and batches and the policy's tasks and plans. It
must not decide: what runs next is the policy's, how it runs is SGLang's.
"""

import logging
from functools import partial
from typing import Any

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.managers.io_struct import GetInternalStateReq
from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch

from econoserve.config import RuntimeConfig
from econoserve.core.types import (
    CachedPrefix,
    IterationPlan,
    Launch,
    Preemption,
    Prefilled,
    View,
)
from econoserve.patches.decode_batch import build_decode_batch, release_for_recompute
from econoserve.patches.output_report import ReportingStreamer
from econoserve.patches.planned_prefill import PlannedOrder, PlannedPrefillAdder
from econoserve.patches.scheduler_loop import ParkingScheduler
from econoserve.runtime.host import PolicyHost
from econoserve.runtime.requests import parkable
from econoserve.runtime.support import Unsupported, check_arguments, check_pools, check_release

logger = logging.getLogger(__name__)

EMPTY_PLAN = IterationPlan()


class EconoScheduler(ParkingScheduler):
    """SGLang's scheduler with EconoServe's policy; arguments as upstream."""

    def init_running_status(self) -> None:
        """See upstream; also reads our settings and refuses what we do not support."""
        self.config = RuntimeConfig.from_environment()
        check_arguments(resolving_view(self.server_args))
        for sentence in check_release(self.config.allow_untested):
            logger.warning("EconoServe runs on an untested SGLang: %s", sentence)
        self.active_plan: IterationPlan | None = None
        self._preempting: frozenset[str] = frozenset()
        super().init_running_status()

    def init_chunked_prefill(self) -> None:
        """See upstream; decode and prompt tokens always share a forward pass."""
        super().init_chunked_prefill()
        if self.chunked_prefill_size is None:
            raise Unsupported("EconoServe needs chunked prefill: set --chunked-prefill-size")
        self.is_mixed_chunk = True

    def init_schedule_policy(self) -> None:
        """See upstream; also builds our policy, predictor and ledger."""
        super().init_schedule_policy()
        check_pools(self.is_hybrid_swa, self.is_hybrid_ssm, self.is_generation)
        self.policy = PlannedOrder(
            self.schedule_policy,
            self.tree_cache,
            self.enable_hierarchical_cache,
            self.enable_priority_scheduling,
            self.schedule_low_priority_values_first,
        )
        default_tfs = 512 if self.device == "cpu" else 2048
        self.host = PolicyHost(
            self.config,
            capacity_tokens=self.max_total_num_tokens,
            tfs_tokens=min(self.config.tfs or default_tfs, self.chunked_prefill_size),
        )

    def get_prefill_adder_class(self) -> Any:
        """The class that admits prompts: ours while a plan is followed, else upstream's.

        Returns:
            A callable with upstream's constructor arguments.
        """
        if self.active_plan is None:
            return super().get_prefill_adder_class()
        return partial(PlannedPrefillAdder, planned=dict(self.active_plan.prefill))

    def get_output_streamer_class(self) -> type[ReportingStreamer]:
        """The streamer that adds our report to finished requests.

        Returns:
            A class bound to this scheduler.
        """
        report = staticmethod(lambda req: self.host.records.report(req, self.now_s))
        return type("EconoStreamer", (ReportingStreamer,), {"report": report})

    def refusal(self, req: Req) -> str | None:
        """See ``ParkingScheduler.refusal``."""
        return self.host.refusal(req, self.now_s)

    def on_queued(self, req: Req) -> None:
        """See ``ParkingScheduler.on_queued``."""
        record = self.host.records.get(req.rid)
        if record is not None and req.retraction_count > 0:
            record.preemptions += 1
            if req.rid not in self._preempting:
                self.host.counters.allocation_failures += 1
        self.host.queue(req, self.now_s)

    def on_gone(self, req: Req) -> None:
        """See ``ParkingScheduler.on_gone``."""
        self.parked.pop(req.rid, None)
        self.host.forget(req)

    def get_next_batch_to_run(
        self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> NextBatchPlan:
        """Plan an iteration, bring the batches into the planned shape, and let upstream build it.

        Args:
            running_batch: requests that decode.
            last_batch: the batch launched last.

        Returns:
            Upstream's answer: the batch to run, and the running batch.
        """
        self.process_pending_chunked_abort()
        plan = self._plan(running_batch, last_batch)
        followed = EMPTY_PLAN if plan is None else plan
        batches = [batch for batch in (running_batch, last_batch) if batch is not None]
        self._preempt(followed, batches)
        resumed = self._resume(followed if plan is not None else None)
        if last_batch is not None and plan is not None:
            self._park(followed, last_batch)
        if resumed:
            batch = build_decode_batch(self, resumed)
            running_batch.filter_batch()
            if running_batch.is_empty():
                running_batch = batch
            else:
                running_batch.merge_batch(batch)
        running_batch.batch_is_full = False
        self.active_plan = plan
        self.policy.planned = None if plan is None else [rid for rid, _ in plan.prefill]
        answer = super().get_next_batch_to_run(running_batch, last_batch)
        self.active_plan = None
        self._report_launch(followed, answer)
        return answer

    def get_new_batch_prefill(self, running_batch: ScheduleBatch) -> NextBatchPlan:
        """See upstream; builds no prefill batch where the plan has none.

        Args:
            running_batch: requests that decode.

        Returns:
            The prefill batch, if any, and the running batch.
        """
        if self.active_plan is not None and not self.active_plan.prefill:
            if self.grammar_manager.has_waiting_grammars():
                for req in self.grammar_manager.get_ready_grammar_requests():
                    self._add_request_to_queue(req)
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        return super().get_new_batch_prefill(running_batch)

    def _plan(
        self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> IterationPlan | None:
        if self.host.needs_rebuild:
            started = {req.rid: req for req in self.parked.values()}
            for batch in (running_batch, last_batch):
                for req in batch.reqs if batch is not None else ():
                    if req is not self.chunked_req and req.kv.holds_kv and not req.finished():
                        started[req.rid] = req
            self.host.rebuild(self.waiting_queue, list(started.values()), self.chunked_req)
            return None
        available = self.token_to_kv_pool_allocator.available_size()
        evictable = self.tree_cache.evictable_size()
        waiting = {req.rid: req for req in self.waiting_queue}
        view = View(
            now_s=self.now_s,
            capacity_tokens=self.max_total_num_tokens,
            used_tokens=self.max_total_num_tokens - available - evictable,
            free_rows=self.get_num_allocatable_reqs(
                len(running_batch.reqs), running_batch=running_batch
            ),
            max_running=self.max_running_requests,
            cached_prefix=lambda rid: self._cached_prefix(waiting[rid]),
        )
        return self.host.plan(view)

    def _cached_prefix(self, req: Req) -> CachedPrefix:
        """Match a waiting prompt, and see what pinning the match would take from free KV."""
        req.init_next_round_input(self.tree_cache)
        if req.prefix_len == 0:
            return CachedPrefix()
        before = self.tree_cache.evictable_size()
        lock = self.tree_cache.lock(req.last_node)
        pinned = before - self.tree_cache.evictable_size()
        self.tree_cache.unlock(lock)
        return CachedPrefix(req.prefix_len, evictable_tokens=pinned, key=req.last_node)

    def _preempt(self, plan: IterationPlan, batches: list[ScheduleBatch]) -> None:
        if not plan.preempt:
            return
        by_rid = {req.rid: req for batch in batches for req in batch.reqs if not req.finished()}
        leaving = {rid for rid, how in plan.preempt if how is Preemption.RECOMPUTE}
        for batch in batches:
            batch.filter_batch(reqs_to_exclude=[req for req in batch.reqs if req.rid in leaving])
        self._recompute(
            [
                self.parked.pop(rid, None) or by_rid[rid]
                for rid, _ in plan.preempt
                if rid in leaving and (rid in self.parked or rid in by_rid)
            ]
        )

    def _recompute(self, reqs: list[Req]) -> None:
        self._preempting = frozenset(req.rid for req in reqs)
        for req in reqs:
            self.host.records.unparked(req.rid, self.now_s)
            self.host.counters.preempted += 1
            release_for_recompute(self, req)
            if req.to_finish is None:
                self._add_request_to_queue(req, is_retracted=True)
            else:
                self.retire_unadmitted_request(req)
                self.on_gone(req)
        self._preempting = frozenset()

    def requeue_parked(self) -> None:
        """See ``ParkingScheduler.requeue_parked``."""
        reqs, self.parked = list(self.parked.values()), {}
        self._recompute(reqs)

    def _resume(self, plan: IterationPlan | None) -> list[Req]:
        """Take the GTs to resume out of the parked ones; without a plan, all of them."""
        rids = list(self.parked) if plan is None else [r for r in plan.resume if r in self.parked]
        for rid in rids:
            self.host.records.unparked(rid, self.now_s)
        self.host.counters.resumed += len(rids)
        return [self.parked.pop(rid) for rid in rids]

    def _park(self, plan: IterationPlan, last_batch: ScheduleBatch) -> None:
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
        last_batch.filter_batch(
            reqs_to_exclude=[req for req in (last_batch.chunked_req, *parked) if req is not None]
        )
        for req in parked:
            self.parked[req.rid] = req
            self.host.records.parked(req.rid, self.now_s)

    def _report_launch(self, plan: IterationPlan, answer: NextBatchPlan) -> None:
        """Tell the policy what upstream really launched."""
        batch = answer.batch_to_run
        prefilled: list[Prefilled] = []
        decoding: list[Req] = []
        if batch is not None and batch.forward_mode.is_decode():
            decoding = batch.reqs
        elif batch is not None and batch.forward_mode.is_extend():
            decoding = batch.decoding_reqs or []
            mixed = len(decoding)
            self.host.counters.mixed_batches += mixed > 0
            prompts = batch.reqs[: len(batch.reqs) - mixed]
            for req, prefix, tokens in zip(
                prompts, batch.prefix_lens, batch.extend_lens, strict=False
            ):
                done = req is not self.chunked_req
                key = req.last_node if prefix else None
                prefilled.append(Prefilled(req.rid, tokens, prefix, done, key))
                record = self.host.records.get(req.rid)
                if record is not None and record.started_s is None:
                    record.started_s = self.now_s
                    self.host.counters.chunked += not done
        running = {req.rid: None for req in (*answer.running_batch.reqs, *decoding)}
        launch = Launch(
            prefilled=tuple(prefilled),
            resumed=tuple(running),
            decoded=tuple(req.rid for req in decoding),
        )
        self.host.launched(plan, launch)

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        """See upstream; also counts tokens and learns from finished responses.

        Args:
            batch: the batch as it was launched.
            result: what came of it.
        """
        super().process_batch_result(batch, result)
        for req in self.host.results(batch.reqs, self.now_s):
            self.on_gone(req)

    def get_internal_state(self, recv_req: GetInternalStateReq) -> Any:
        """See upstream; adds ``econoserve``: the ledger, the queues and the counters.

        Args:
            recv_req: the query.

        Returns:
            Upstream's answer with our part in ``internal_state``.
        """
        output = super().get_internal_state(recv_req)
        output.internal_state["econoserve"] = {**self.host.state(), "parked": len(self.parked)}
        return output
