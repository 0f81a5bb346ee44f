"""The policy in the scheduler process: its tasks, its predictions, its failures.

Owns the policy, the predictor, the records and the counters of this rank. It knows requests but
no batches; what it answers is carried out by ``EconoScheduler``.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req

from econoserve.config import OnError, RuntimeConfig
from econoserve.core.cost import IterationWork
from econoserve.core.types import (
    IterationPlan,
    Launch,
    NeverFits,
    Outcome,
    Preemption,
    Prefilled,
    View,
)
from econoserve.patches.scheduler_loop import Refusal
from econoserve.policies.econoserve import EconoServe
from econoserve.runtime.books import assert_true_books
from econoserve.runtime.building import Machine, build_policy
from econoserve.runtime.feed import MetricsFeed
from econoserve.runtime.iterations import iteration_log
from econoserve.runtime.learning import Learner
from econoserve.runtime.requests import Pace, Record, Records
from econoserve.runtime.tracking import Tracking, readable
from econoserve.runtime.work import work_of

logger = logging.getLogger(__name__)


class PolicyHost:
    """Feeds the policy with requests and keeps serving when it raises.

    Args:
        config: the user's settings.
        machine: the engine.
        learner: predicts response lengths; by default one that keeps nothing.
    """

    def __init__(
        self, config: RuntimeConfig, machine: Machine, learner: Learner | None = None
    ) -> None:
        self.records = Records(config.slo_class)
        self.counters = self.records.counters
        self.learner = learner or Learner(config)
        self._config = config
        self._machine = machine
        self._policy = build_policy(config, machine)
        self._iterations = iteration_log(config, machine, self.learner.place)
        self._works: dict[int, IterationWork] = {}
        self._launches = 0
        self._pace = Pace()
        self._lost_track = False

    def refusal(self, req: Req, now_s: float) -> Refusal | None:
        """Why a request that was just received cannot be served; opens its record if it can.

        Args:
            req: the request.
            now_s: the time.

        Returns:
            The reason, or ``None``.
        """
        if req.beam_group is not None:
            return Refusal("beam_width: beam search is not supported, set it to 1")
        if req.rid in self.records:
            return Refusal(f"rid={req.rid!r} is being served already: give each request its own")
        prompt_tokens = len(req.origin_input_ids)
        if prompt_tokens + 1 > self._machine.capacity_tokens:
            return Refusal(str(NeverFits.of(prompt_tokens, self._machine.capacity_tokens)))
        if self._queue_is_full(req):
            return Refusal(
                f"{self._config.max_queue} requests wait already (--econoserve-max-queue): try "
                f"again in {self.retry_after_s(now_s):.0f} s",
                HTTPStatus.TOO_MANY_REQUESTS,
                "RateLimitError",
            )
        try:
            self._open(req, now_s)
        except ValueError as error:
            return Refusal(str(error))
        return None

    def refused(self, req: Req) -> None:
        """Count a request that was refused on arrival, by upstream or by us.

        Args:
            req: the request.
        """
        error = req.to_finish
        self.counters.refused_queue_full += error.status_code == HTTPStatus.TOO_MANY_REQUESTS
        too_large = error.message.startswith(("Input length", "prompt_tokens"))
        self.counters.refused_too_large += too_large

    def retry_after_s(self, now_s: float) -> float:
        """When a request that is refused now might be served.

        Args:
            now_s: the time.

        Returns:
            Seconds, from 1 to 60.
        """
        return self._pace.retry_after_s(len(self._policy.books.waiting), now_s)

    def report(self, req: Req, now_s: float) -> dict[str, Any]:
        """What to tell the sender of a request that has ended.

        Args:
            req: the request.
            now_s: the time.

        Returns:
            Plain values; ``retry_after_s`` for one that was refused for the load.
        """
        report = self.records.report(req, now_s)
        status = getattr(req.finished_reason, "status_code", None)
        if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            report["retry_after_s"] = self.retry_after_s(now_s)
        return report

    def rejected(self, req: Req) -> None:
        """A request was refused by plan: it is too late for its SLO.

        Args:
            req: the request.
        """
        self.counters.refused_late += 1
        self._close(req.rid)
        with self._tracking():
            self._policy.remove(req.rid, Outcome.REJECTED)

    def preempted(self, req: Req, how: Preemption) -> None:
        """A request left the batch, or gave up its KVC, by plan.

        Args:
            req: the request.
            how: in which way.
        """
        if how is Preemption.RECOMPUTE:
            self.counters.preempted += 1
            self.counters.recomputed_tokens += max(req.kv.kv_committed_len, req.seqlen - 1)
        elif how is Preemption.OFFLOAD:
            self.counters.offloaded += 1
            self.records[req.rid].preemptions += 1
        else:
            self.counters.set_aside += 1

    def elapsed(self, number: int, elapsed_s: float) -> None:
        """An iteration's time is known.

        Args:
            number: of the launch, from 0.
            elapsed_s: how long it took.
        """
        work = self._works.pop(number, None)
        if work is not None:
            with self._tracking():
                self._policy.on_iteration(work, elapsed_s)

    def queue(self, req: Req, now_s: float) -> None:
        """A request entered the waiting queue, for the first time or to be computed again.

        Args:
            req: the request.
            now_s: the time.
        """
        record = self.records.get(req.rid) or self._open(req, now_s)
        prediction = record.prediction
        if req.output_ids:
            prediction = self.learner.predict(record.features)
        record.counted_tokens = len(req.output_ids)
        with self._tracking():
            self._policy.requeue(self.records.task(req, prediction))

    def forget(self, req: Req) -> None:
        """A request is gone.

        Args:
            req: the request; unknown ones are ignored.
        """
        record = self.records.get(req.rid)
        if record is not None and record.req is not req:
            # Another request of that id, which was refused.
            return
        self._close(req.rid)
        failed = not req.finished() or isinstance(req.finished_reason, FINISH_ABORT)
        with self._tracking():
            self._policy.remove(req.rid, Outcome.ABORTED if failed else Outcome.FINISHED)

    def plan(self, view: View) -> IterationPlan | None:
        """Ask the policy for a plan.

        Args:
            view: the machine now.

        Returns:
            The plan; ``None`` where the policy raised or lost track: SGLang decides, and
            ``rebuild`` is due.

        Raises:
            Exception: what the policy raised, with ``--econoserve-on-error crash``.
        """
        if self._lost_track:
            return None
        plan = None
        with self._tracking(view):
            plan = self._policy.plan(view)
        return plan

    def check_books(self, held: dict[str, int], view: View, shared_tokens: int) -> None:
        """Compare the ledger with the KV pool, if the user wants it so.

        Args:
            held: KVC by request.
            view: the machine now.
            shared_tokens: KVC of the prefix cache that requests pin.

        Raises:
            BooksError: they differ.
        """
        if not self._lost_track:
            assert_true_books(self._policy.ledger, held, view.used_tokens, shared_tokens)

    def launched(self, plan: IterationPlan, launch: Launch) -> None:
        """Tell the policy what started.

        Args:
            plan: the plan that was followed.
            launch: the iteration.
        """
        with self._tracking(launch):
            self._policy.on_launch(plan, launch)
            if launch.prefilled or launch.decoded:
                self._works[self._launches] = work_of(launch, self._policy)
            if self._iterations is not None:
                self._iterations.launched(launch, self._policy)
        self._launches += bool(launch.prefilled or launch.decoded)

    def _queue_is_full(self, req: Req) -> bool:
        limit = self._config.max_queue
        if limit is None or req.rid.startswith(HEALTH_CHECK_RID_PREFIX):
            return False
        return len(self._policy.books.waiting) >= limit

    def results(
        self, reqs: Iterable[Req], now_s: float, feed: MetricsFeed | None = None
    ) -> list[Req]:
        """Count the tokens that came back and learn from responses that ended.

        Args:
            reqs: requests whose results were processed.
            now_s: the time.
            feed: hears of complete responses.

        Returns:
            Those that have finished and are known; the caller forgets them.
        """
        finished: list[Req] = []
        stepped: list[str] = []
        grown: list[tuple[str, int]] = []
        for req in reqs:
            record = self.records.get(req.rid)
            if record is None or record.req is not req:
                continue
            produced = len(req.output_ids) - record.counted_tokens
            if produced > 0:
                record.counted_tokens += produced
                if record.first_token_s is None:
                    record.first_token_s = now_s
                if produced == 1:
                    stepped.append(req.rid)
                else:
                    grown.append((req.rid, produced))
            if req.finished():
                self._pace.ended_s.append(now_s)
                finished.append(req)
                if feed is not None and not isinstance(req.finished_reason, FINISH_ABORT):
                    feed.finished(record, len(req.output_ids_through_stop), now_s)
                self.learner.learn(req, record.features)
        with self._tracking():
            self._policy.on_step(stepped)
            for rid, tokens in grown:
                self._policy.on_tokens(rid, tokens)
        return finished

    def rebuild(self, waiting: list[Req], started: list[Req], chunked: Req | None) -> None:
        """Start a new policy from the requests as they are, after the old one raised.

        Args:
            waiting: requests in the waiting queue.
            started: requests whose prompt is in the KVC; they become GTs that do not run.
            chunked: the request whose prompt is under way, if any.
        """
        unfinished = () if chunked is None else (chunked,)
        holders = [req for req in (*started, *unfinished) if req.rid in self.records]
        cost = getattr(self._policy, "cost", None)
        self._policy = build_policy(self._config, self._machine)
        if isinstance(self._policy, EconoServe) and cost is not None:
            self._policy.cost.adopt(cost)
        self._lost_track = False
        with self._tracking():
            for req in (*waiting, *holders):
                if req.rid in self.records:
                    prediction = self.learner.predict(self.records[req.rid].features)
                    self._policy.add(self.records.task(req, prediction))
            parts = tuple(
                Prefilled(req.rid, req.kv.kv_committed_len, 0, req is not chunked)
                for req in holders
            )
            self._policy.on_launch(IterationPlan(), Launch(prefilled=parts))

    @property
    def needs_rebuild(self) -> bool:
        """Whether the policy raised and its books may be wrong."""
        return self._lost_track

    def stalled(self) -> None:
        """Nothing runs although something waits: SGLang decides next, and the books are rebuilt."""
        self.counters.stalls += 1
        self._lost_track = True
        if self.counters.stalls == 1:
            logger.warning("The policy lets nothing run: SGLang decides. State: %r", self.state())

    def state(self) -> dict[str, Any]:
        """The ledger, the queues and the totals, as plain values.

        Returns:
            A flat dict; tokens where a name says so.
        """
        books, ledger = self._policy.books, self._policy.ledger
        return {
            "capacity_tokens": ledger.capacity_tokens,
            "held_tokens": ledger.held_tokens,
            "promised_tokens": ledger.promised_tokens,
            "claims": len(ledger),
            "waiting": len(books.waiting),
            "prefilling": len(books.prefilling),
            "ready": len(books.ready) + len(books.starting),
            "running": len(books.running),
            "hosted_tokens": getattr(ledger, "hosted_tokens", 0),
            "tfs_tokens": self.tfs_tokens(),
            "prediction_coverage_90": round(self.learner.predictor.coverage(0.9), 4),
            "total_iterations": self._launches,
            "total_prediction_fallbacks": self.learner.predictor.fallbacks,
            **{f"total_{name}": value for name, value in asdict(self.counters).items()},
        }

    def tfs_tokens(self) -> int | None:
        """The target forward size now.

        Returns:
            Tokens; ``None`` where the policy has none.
        """
        if not isinstance(self._policy, EconoServe):
            return None
        return self._policy.tfs_tokens(len(self._policy.books.running), math.inf)

    def _open(self, req: Req, now_s: float) -> Record:
        self.records.slo_of(req)
        features = self.learner.features(req)
        return self.records.open(req, now_s, features, self.learner.predict(features))

    def _close(self, rid: str) -> None:
        record = self.records.get(rid)
        if record is not None:
            self.learner.forget(record.features)
            self.records.close(rid)

    def _tracking(self, state: object = None) -> Tracking:
        """Keep an error of the policy from ending the server, if the user wants it so."""
        return Tracking(self._failed, state)

    def _failed(self, state: object) -> bool:
        """The policy raised; whether the server goes on."""
        self.counters.planning_errors += 1
        if self._config.on_error == OnError.CRASH.value:
            return False
        self._lost_track = True
        if self.counters.planning_errors == 1:
            logger.exception(
                "The policy failed; SGLang's own decision is used meanwhile. State: %r, %r",
                readable(self.state),
                state,
            )
        return True
