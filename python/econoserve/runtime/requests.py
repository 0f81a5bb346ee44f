"""What the runtime remembers of each request: for the policy's task and for the report.

Owns the records of live requests and the counters. It must not decide anything.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sglang.srt.managers.schedule_batch import Req

from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import Slo, Task
from econoserve.prediction.request import RequestFeatures
from econoserve.slo import read_classes, resolve_slo

RATE_WINDOW = 64
"""Requests that ended last, by which the rate of service is known."""


@dataclass(slots=True)
class Record:
    """One live request; times in seconds on the scheduler's clock.

    Attributes:
        req: the request.
        arrival_s: when the scheduler got it.
        features: what its length is predicted from.
        prediction: its RL as predicted on arrival.
        slo: its objectives.
        slo_class: the class that it belongs to.
        started_s: when its prompt was first in a forward pass.
        parked_since_s: when its GT last began to wait with its KVC, if it does.
        parked_s: time so waited, before ``parked_since_s``.
        preemptions: times its KVC was taken back.
        counted_tokens: output tokens the policy was told of.
        first_token_s: when its first token came back.
    """

    req: Req
    arrival_s: float
    features: RequestFeatures
    prediction: LengthPrediction
    slo: Slo
    slo_class: str = "default"
    started_s: float | None = None
    parked_since_s: float | None = None
    parked_s: float = 0.0
    preemptions: int = 0
    counted_tokens: int = 0
    first_token_s: float | None = None


@dataclass(slots=True)
class Counters:
    """Totals since the start of the process.

    Attributes:
        parked: GTs that waited with their KVC at least one iteration.
        resumed: GTs that joined the batch after that.
        preempted: requests whose KVC was taken back by plan, to be computed again.
        recomputed_tokens: KVC that those held.
        offloaded: requests whose KVC was moved to host memory by plan.
        set_aside: requests that left the running batch with their KVC by plan.
        refused_queue_full: requests refused because too many waited.
        refused_late: requests refused because they could not keep their SLO.
        refused_too_large: requests refused because their prompt exceeds the KVC.
        allocation_failures: requests that SGLang had to retract because the pool was full.
        chunked: prompts that needed more than one forward pass.
        mixed_batches: forward passes with decode and prompt tokens.
        pauses: forward passes of prompts alone that running requests sat out.
        planning_errors: plans that raised.
        stalls: times that nothing ran although something waited, and SGLang decided.
        rank_divergences: comparisons in which tensor-parallel ranks had planned differently.
    """

    parked: int = 0
    resumed: int = 0
    preempted: int = 0
    recomputed_tokens: int = 0
    offloaded: int = 0
    set_aside: int = 0
    refused_queue_full: int = 0
    refused_late: int = 0
    refused_too_large: int = 0
    allocation_failures: int = 0
    chunked: int = 0
    mixed_batches: int = 0
    pauses: int = 0
    planning_errors: int = 0
    stalls: int = 0
    rank_divergences: int = 0


class Pace:
    """How fast requests end, by those that ended last.

    Attributes:
        ended_s: when they did.
    """

    def __init__(self) -> None:
        self.ended_s: deque[float] = deque(maxlen=RATE_WINDOW)

    def retry_after_s(self, waiting: int, now_s: float) -> float:
        """When a request that is refused now might be served: half of the queue later.

        Args:
            waiting: requests in the queue.
            now_s: the time.

        Returns:
            Seconds, from 1 to 60.
        """
        if len(self.ended_s) < 2 or now_s <= self.ended_s[0]:
            return 1.0
        rate_per_s = len(self.ended_s) / (now_s - self.ended_s[0])
        return float(min(max(math.ceil(waiting / 2 / rate_per_s), 1), 60))


class Records:
    """Records of the live requests, by request id.

    Args:
        slo_class: SLO classes as on the command line.
    """

    def __init__(self, slo_class: Iterable[str] = ()) -> None:
        self._classes = read_classes(slo_class)
        self._records: dict[str, Record] = {}
        self.counters = Counters()

    def __contains__(self, rid: str) -> bool:
        return rid in self._records

    def __getitem__(self, rid: str) -> Record:
        return self._records[rid]

    def get(self, rid: str) -> Record | None:
        """The record of a request.

        Args:
            rid: request id.

        Returns:
            The record, or ``None`` if the request is not live.
        """
        return self._records.get(rid)

    def open(
        self, req: Req, now_s: float, features: RequestFeatures, prediction: LengthPrediction
    ) -> Record:
        """Start a record.

        Args:
            req: the request.
            now_s: the time.
            features: what its length is predicted from.
            prediction: its predicted RL.

        Returns:
            The record.

        Raises:
            ValueError: something about its SLO is wrong.
        """
        slo_class, slo = self.slo_of(req)
        record = Record(req, now_s, features, prediction, slo, slo_class)
        self._records[req.rid] = record
        return record

    def slo_of(self, req: Req) -> tuple[str, Slo]:
        """A request's SLO.

        Args:
            req: the request.

        Returns:
            The class's name, and the objectives.

        Raises:
            ValueError: something about it is wrong.
        """
        return resolve_slo(req.sampling_params.custom_params, self._classes)

    def close(self, rid: str) -> None:
        """Forget a request.

        Args:
            rid: request id; unknown ids are ignored.
        """
        self._records.pop(rid, None)

    def parked(self, rid: str, now_s: float) -> None:
        """A GT began to wait with its KVC.

        Args:
            rid: request id.
            now_s: the time.
        """
        self._records[rid].parked_since_s = now_s
        self.counters.parked += 1

    def unparked(self, rid: str, now_s: float) -> None:
        """A GT no longer waits with its KVC.

        Args:
            rid: request id.
            now_s: the time.
        """
        record = self._records[rid]
        if record.parked_since_s is not None:
            record.parked_s += now_s - record.parked_since_s
            record.parked_since_s = None

    def task(self, req: Req, prediction: LengthPrediction) -> Task:
        """The policy's view of a request that is queued.

        Args:
            req: a request with a record.
            prediction: its predicted RL.

        Returns:
            The task.
        """
        record = self._records[req.rid]
        return Task(
            rid=req.rid,
            arrival_s=record.arrival_s,
            prompt_tokens=len(req.origin_input_ids) + len(req.output_ids),
            prediction=prediction,
            slo=record.slo,
            parkable=parkable(req),
            generated_tokens=len(req.output_ids),
        )

    def report(self, req: Req, now_s: float) -> dict[str, Any]:
        """What to tell the sender of a request that has finished.

        Args:
            req: the request.
            now_s: the time.

        Returns:
            Plain values: tokens, milliseconds in the scheduler, preemptions, and the SLO.
        """
        record = self._records.get(req.rid)
        known = record is not None
        if record is None:
            nothing = LengthPrediction((), 1.0, 0)
            record = Record(req, now_s, RequestFeatures(0, 0), nothing, Slo())
        started_s = now_s if record.started_s is None else record.started_s
        parked_s = record.parked_s
        if record.parked_since_s is not None:
            parked_s += now_s - record.parked_since_s
        decode_s = 0.0 if record.first_token_s is None else now_s - record.first_token_s
        slo = {
            name.removesuffix("_s") + "_ms": seconds * 1e3
            for name, seconds in asdict(record.slo).items()
            if seconds is not None
        }
        return {
            "prompt_tokens": len(req.origin_input_ids),
            "predicted_tokens": record.prediction.tokens if known else 0,
            "output_tokens": len(req.output_ids_through_stop),
            "queue_ms": round((started_s - record.arrival_s) * 1e3, 3),
            "parked_ms": round(parked_s * 1e3, 3),
            "preemptions": record.preemptions,
            "decode_ms": decode_s * 1e3,
            "slo": slo or None,
            "slo_class": record.slo_class,
        }


def parkable(req: Req) -> bool:
    """Whether a GT may be taken out of the batch and rebuilt without changing its output.

    SGLang's penalizers keep state in the batch that cannot be rebuilt from the request.

    Args:
        req: the request.

    Returns:
        ``False`` for requests with penalties or a minimum length.
    """
    params = req.sampling_params
    return (
        params.frequency_penalty == 0.0
        and params.presence_penalty == 0.0
        and params.repetition_penalty == 1.0
        and params.min_new_tokens == 0
    )
