"""The policy in the scheduler process: its tasks, its predictions, its failures.

Owns the policy, the predictor, the records and the counters of this rank. It knows requests but
no batches; what it answers is carried out by ``EconoScheduler``.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req

from econoserve.config import OnError, RuntimeConfig
from econoserve.core.cost import TfsConfig
from econoserve.core.kvc import KvcConfig
from econoserve.core.lengths import LengthPrediction
from econoserve.core.order import LengthOrder, OrderConfig
from econoserve.core.types import (
    IterationPlan,
    Launch,
    NeverFits,
    Outcome,
    Prefilled,
    View,
)
from econoserve.policies.econoserve import EconoServe, EconoServeConfig
from econoserve.prediction.quantile import QuantilePredictor
from econoserve.runtime.requests import Records, learn_from

logger = logging.getLogger(__name__)


class PolicyHost:
    """Feeds the policy with requests and keeps serving when it raises.

    Args:
        config: the user's settings.
        capacity_tokens: size of the KVC.
        tfs_tokens: target forward size.
    """

    def __init__(self, config: RuntimeConfig, capacity_tokens: int, tfs_tokens: int) -> None:
        self.records = Records()
        self.counters = self.records.counters
        self.predictor = QuantilePredictor(config.rl_quantile, prior_tokens=config.rl_prior)
        self._config = config
        self._policy_config = EconoServeConfig(
            capacity_tokens=capacity_tokens,
            kvc=KvcConfig(reserve_fraction=config.kvc_reserve),
            order=OrderConfig(
                length_order=LengthOrder(config.length_order),
                window_s=config.window_ms / 1e3,
                best_effort_s=config.best_effort_ms / 1e3,
            ),
            tfs=TfsConfig(pinned_tokens=tfs_tokens),
            parked_fraction=config.parked_kvc,
            starvation_s=config.starvation_ms / 1e3,
        )
        self._policy = EconoServe(self._policy_config)
        self._lost_track = False

    def refusal(self, req: Req, now_s: float) -> str | None:
        """Why a request that was just received cannot be served; opens its record if it can.

        Args:
            req: the request.
            now_s: the time.

        Returns:
            A sentence for its sender, or ``None``.
        """
        if req.beam_group is not None:
            return "beam_width: beam search is not supported, set it to 1"
        if req.rid in self.records:
            return f"rid={req.rid!r} is being served already: give each request its own"
        prompt_tokens = len(req.origin_input_ids)
        if prompt_tokens + 1 > self._policy_config.capacity_tokens:
            return str(NeverFits.of(prompt_tokens, self._policy_config.capacity_tokens))
        try:
            self.records.open(req, now_s, self._predict(req))
        except ValueError as error:
            return str(error)
        return None

    def queue(self, req: Req, now_s: float) -> None:
        """A request entered the waiting queue, for the first time or to be computed again.

        Args:
            req: the request.
            now_s: the time.
        """
        prediction = self._predict(req)
        self.records.open(req, now_s, prediction)
        with self._tracking():
            self._policy.requeue(self.records.task(req, prediction))

    def forget(self, req: Req) -> None:
        """A request is gone.

        Args:
            req: the request; unknown ones are ignored.
        """
        self.records.close(req.rid)
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

    def launched(self, plan: IterationPlan, launch: Launch) -> None:
        """Tell the policy what started.

        Args:
            plan: the plan that was followed.
            launch: the iteration.
        """
        with self._tracking(launch):
            self._policy.on_launch(plan, launch)

    def results(self, reqs: Iterable[Req], now_s: float) -> list[Req]:
        """Count the tokens that came back and learn from responses that ended.

        Args:
            reqs: requests whose results were processed.
            now_s: the time.

        Returns:
            Those that have finished and are known; the caller forgets them.
        """
        finished = []
        for req in reqs:
            record = self.records.get(req.rid)
            if record is None:
                continue
            produced = len(req.output_ids) - record.counted_tokens
            if produced > 0:
                record.counted_tokens += produced
                if record.first_token_s is None:
                    record.first_token_s = now_s
                with self._tracking():
                    self._policy.on_tokens(req.rid, produced)
            if req.finished():
                finished.append(req)
                learn_from(req, self.predictor)
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
        self._policy = EconoServe(self._policy_config)
        self._lost_track = False
        with self._tracking():
            for req in (*waiting, *holders):
                if req.rid in self.records:
                    self._policy.add(self.records.task(req, self._predict(req)))
            parts = tuple(
                Prefilled(req.rid, req.kv.kv_committed_len, 0, req is not chunked)
                for req in holders
            )
            self._policy.on_launch(IterationPlan(), Launch(prefilled=parts))

    @property
    def needs_rebuild(self) -> bool:
        """Whether the policy raised and its books may be wrong."""
        return self._lost_track

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
            "tfs_tokens": self._policy_config.tfs.pinned_tokens,
            **{f"total_{name}": value for name, value in asdict(self.counters).items()},
        }

    def _predict(self, req: Req) -> LengthPrediction:
        return self.predictor.predict(req.sampling_params.max_new_tokens)

    @contextmanager
    def _tracking(self, state: object = None) -> Iterator[None]:
        """Keep an error of the policy from ending the server, if the user wants it so."""
        try:
            yield
        except Exception:
            self.counters.planning_errors += 1
            if self._config.on_error == OnError.CRASH.value:
                raise
            self._lost_track = True
            if self.counters.planning_errors == 1:
                logger.exception(
                    "The policy failed; SGLang's own decision is used meanwhile. State: %r, %r",
                    self.state(),
                    state,
                )
