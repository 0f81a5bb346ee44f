"""EconoServe in SGLang's scheduler process: asks the policy, carries out the plan, reports back.

Owns the translation between SGLang's requests and batches and the policy's tasks and plans. It
must not decide: what runs next is the policy's, how it runs is SGLang's.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.managers.io_struct import GetInternalStateReq
from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch
from sglang.srt.runtime_context import get_parallel

from econoserve.config import OnError, RuntimeConfig
from econoserve.core.types import (
    IterationPlan,
    Launch,
    Preemption,
    Prefilled,
    View,
    always_startable,
)
from econoserve.patches.host_kvc import bytes_per_token
from econoserve.patches.output_report import ReportingStreamer
from econoserve.patches.planned_prefill import PlannedOrder, PlannedPrefillAdder
from econoserve.patches.scheduler_loop import Refusal
from econoserve.runtime.agreement import Agreement, first_ranks
from econoserve.runtime.building import Machine, host_tokens
from econoserve.runtime.feed import MetricsFeed
from econoserve.runtime.host import PolicyHost
from econoserve.runtime.learning import BUSY_PERIOD_S, IDLE_PERIOD_S, Learner, Place
from econoserve.runtime.metrics import Metrics
from econoserve.runtime.prefixes import cached_prefix, released_tokens
from econoserve.runtime.shaping import ShapingScheduler
from econoserve.runtime.stopwatch import Stopwatch
from econoserve.runtime.support import (
    Unsupported,
    check_arguments,
    check_policy,
    check_pools,
    check_release,
)

logger = logging.getLogger(__name__)

EMPTY_PLAN = IterationPlan()

PATIENCE_ITERATIONS = 4
"""Iterations without a batch, although something waits, after which SGLang decides."""

PATIENCE_S = 0.05
"""And time that must have passed by then."""


class EconoScheduler(ShapingScheduler):
    """SGLang's scheduler with EconoServe's policy; arguments as upstream."""

    def init_running_status(self) -> None:
        """See upstream; also reads our settings and refuses what we do not support."""
        self.config = RuntimeConfig.from_environment()
        arguments = resolving_view(self.server_args)
        check_arguments(arguments)
        check_policy(arguments, self.config.policy)
        for sentence in check_release(self.config.allow_untested):
            logger.warning("EconoServe runs on an untested SGLang: %s", sentence)
        self.active_plan: IterationPlan | None = None
        self.agreement = Agreement(self.config.check_ranks)
        self._stalled, self._stalled_s = 0, 0.0
        self._own_time = Stopwatch()
        super().init_running_status()

    def init_chunked_prefill(self) -> None:
        """See upstream; decode and prompt tokens share a forward pass unless the plan pauses."""
        super().init_chunked_prefill()
        if self.chunked_prefill_size is None:
            raise Unsupported("EconoServe needs chunked prefill: set --chunked-prefill-size")

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
        machine = Machine(
            capacity_tokens=self.max_total_num_tokens,
            chunk_tokens=self.chunked_prefill_size,
            budget_tokens=512 if self.device == "cpu" else 2048,
            context_tokens=self.model_config.context_len,
            max_running=self.max_running_requests,
            bytes_per_token=bytes_per_token(self),
            tensor=get_parallel().tp_size,
        )
        self.host = PolicyHost(self.config, machine, self._learner())
        self.host_tokens = host_tokens(self.config, machine)
        self.feed: MetricsFeed | None = None
        if self.metrics_collector_context.current_scheduler_metrics_enabled:
            metrics = Metrics(self.metrics_collector.labels)
            self.feed = MetricsFeed(metrics, self.host.counters)

    def _learner(self) -> Learner:
        parallel = get_parallel()
        place = Place(
            replica=parallel.dp_rank if parallel.num_dp_ranks > 1 else None,
            writes=parallel.tp_rank == 0,
            longest_tokens=self.max_req_len,
            adapter_of=lambda req: self.kv_event_lora_names.resolve(req.lora_id) or "",
            agree=first_ranks,
        )
        return Learner(self.config, place)

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
        report = staticmethod(lambda req: self.host.report(req, self.now_s))
        return type("EconoStreamer", (ReportingStreamer,), {"report": report})

    def refusal(self, req: Req) -> Refusal | None:
        """See ``ParkingScheduler.refusal``."""
        return self.host.refusal(req, self.now_s)

    def on_refused(self, req: Req) -> None:
        """See ``ParkingScheduler.on_refused``."""
        self.host.refused(req)

    def on_queued(self, req: Req) -> None:
        """See ``ParkingScheduler.on_queued``."""
        record = self.host.records.get(req.rid)
        if record is not None and req.retraction_count > 0:
            record.preemptions += 1
            # A pause that retracts is the user's will.
            if req.rid not in self._preempting and not self._engine_paused:
                self.host.counters.allocation_failures += 1
        self.host.queue(req, self.now_s)

    def on_elapsed(self, number: int, elapsed_s: float) -> None:
        """See ``ParkingScheduler.on_elapsed``."""
        with self._own_time:
            self.host.elapsed(number, elapsed_s)

    def on_gone(self, req: Req) -> None:
        """See ``ParkingScheduler.on_gone``."""
        if self.parked.get(req.rid) is req:
            del self.parked[req.rid]
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
        with self._own_time:
            plan = self._plan(running_batch, last_batch)
            running_batch = self.shape(plan, running_batch, last_batch)
        self.active_plan = plan
        self.is_mixed_chunk = plan is None or not plan.pauses
        self.policy.planned = None if plan is None else [rid for rid, _ in plan.prefill]
        answer = super().get_next_batch_to_run(running_batch, last_batch)
        self.active_plan = None
        with self._own_time:
            self._report_launch(EMPTY_PLAN if plan is None else plan, answer)
            self._watch_progress(answer, last_batch)
        return answer

    def _watch_progress(self, answer: NextBatchPlan, last_batch: ScheduleBatch | None) -> None:
        """Let SGLang decide once if nothing runs although something waits."""
        waits = self.waiting_queue or self.parked or answer.running_batch.reqs
        if answer.batch_to_run is not None or last_batch is not None or not waits:
            self._stalled = 0
            return
        if self._stalled == 0:
            self._stalled_s = self.now_s
        self._stalled += 1
        if self._stalled >= PATIENCE_ITERATIONS and self.now_s - self._stalled_s >= PATIENCE_S:
            self._stalled = 0
            self.host.stalled()

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
            self._check_ranks(None)
            self.requeue_offloaded()
            started = {req.rid: req for req in self.parked.values()}
            for batch in (running_batch, last_batch):
                for req in batch.reqs if batch is not None else ():
                    if req is not self.chunked_req and req.kv.holds_kv and not req.finished():
                        started[req.rid] = req
            self.host.rebuild(self.waiting_queue, list(started.values()), self.chunked_req)
            return None
        view = View(
            now_s=self.now_s,
            capacity_tokens=self.max_total_num_tokens,
            used_tokens=self._used_tokens(),
            free_rows=self.get_num_allocatable_reqs(
                len(running_batch.reqs), running_batch=running_batch
            ),
            max_running=self.max_running_requests,
            cached_prefix=lambda rid: cached_prefix(self.host.records[rid].req, self.tree_cache),
            released=lambda rid: released_tokens(self.host.records[rid].req, self.tree_cache),
            startable=self._startable([running_batch, last_batch]),
        )
        if self.config.check_books:
            self._check_books(view, [running_batch, last_batch])
        started_s = time.perf_counter()
        plan = self.host.plan(view)
        if self.feed is not None:
            self.feed.planned(time.perf_counter() - started_s)
        self._check_ranks(plan)
        return plan

    def _startable(self, batches: list[ScheduleBatch | None]) -> Callable[[str], bool]:
        """Whether a waiting request's adapter has a place beside those of what runs."""
        if not self.enable_lora:
            return always_startable
        reqs = [req for batch in batches if batch is not None for req in batch.reqs]
        reqs += [self.chunked_req] if self.chunked_req else []
        adapters = {req.lora_id for req in reqs if not req.finished()}

        def startable(rid: str) -> bool:
            return self.can_schedule_lora_req(self.host.records[rid].req, adapters)

        return startable

    def _used_tokens(self) -> int:
        available = self.token_to_kv_pool_allocator.available_size()
        return self.max_total_num_tokens - available - self.tree_cache.evictable_size()

    def _check_books(self, view: View, batches: list[ScheduleBatch | None]) -> None:
        reqs = [req for batch in batches if batch is not None for req in batch.reqs]
        reqs += [*self.parked.values(), *([self.chunked_req] if self.chunked_req else [])]
        held = {req.rid: req.kv.kv_allocated_len for req in reqs if req.kv.holds_kv}
        self.host.check_books(held, view, self.tree_cache.protected_size())

    def _check_ranks(self, plan: IterationPlan | None) -> None:
        """Take a plan into the digest, once per iteration on every rank; compare when it is due."""
        if self.tp_size == 1 or not self.agreement.note(plan):
            return
        if self.agreement.holds(get_parallel().tp_group.cpu_group):
            return
        self.host.counters.rank_divergences += 1
        message = "the tensor-parallel ranks have planned differently"
        if self.config.on_error == OnError.CRASH.value:
            raise RuntimeError(message)
        if self.host.counters.rank_divergences == 1:
            logger.error("%s; outputs may be wrong and the server may hang", message)

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
            self.host.counters.pauses += plan.pauses
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
        decoded = running = tuple([req.rid for req in decoding])
        if decoding is not answer.running_batch.reqs:
            running = tuple(dict.fromkeys((*(r.rid for r in answer.running_batch.reqs), *decoded)))
        moved = self.moved.items()
        launch = Launch(
            prefilled=tuple(prefilled),
            resumed=running,
            parked=tuple([rid for rid, how in moved if how is Preemption.PARK]),
            offloaded=tuple([rid for rid, how in moved if how is Preemption.OFFLOAD]),
            dropped=tuple(self.dropped),
            decoded=decoded,
        )
        self.host.launched(plan, launch)
        if self.feed is not None:
            self.feed.launched(launch, self.host.tfs_tokens())
            if self.feed.due(self.now_s):
                self._publish()

    def _publish(self) -> None:
        state, used_tokens = self.host.state(), self._used_tokens()
        parked_tokens = sum(req.kv.kv_allocated_len for req in self.parked.values())
        more = {"parked_tokens": parked_tokens, "offloaded_tokens": self.offloaded_tokens()}
        self.feed.publish({**state, **more, "used_tokens": used_tokens}, self.now_s)

    def on_idle(self) -> None:
        """See upstream; also shows once that nothing is going on, and keeps what was learned."""
        self.host.learner.keep(time.monotonic(), IDLE_PERIOD_S)
        if self.feed is not None and not self.feed.idle:
            if self.feed.due(self.now_s) or self.is_fully_idle():
                self._publish()
            self.feed.idle = self.is_fully_idle()
        super().on_idle()

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        """See upstream; also counts tokens and learns from finished responses.

        Args:
            batch: the batch as it was launched.
            result: what came of it.
        """
        super().process_batch_result(batch, result)
        with self._own_time:
            self.host.learner.keep(self.now_s, BUSY_PERIOD_S)
            # For reports only: what decides goes by the time of the iteration.
            for req in self.host.results(batch.reqs, time.monotonic(), self.feed):
                self.on_gone(req)

    def get_internal_state(self, recv_req: GetInternalStateReq) -> Any:
        """See upstream; adds ``econoserve``: the ledger, the queues and the counters.

        Args:
            recv_req: the query.

        Returns:
            Upstream's answer with our part in ``internal_state``.
        """
        output = super().get_internal_state(recv_req)
        output.internal_state["econoserve"] = {
            **self.host.state(),
            "parked": len(self.parked),
            "offloaded_tokens": self.offloaded_tokens(),
            "total_scheduling_s": self._own_time.total_s,
        }
        return output
