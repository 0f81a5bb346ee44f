"""Seam: SGLang's scheduler loop asks for the next batch; requests come, go and are counted.

Upstream: ``Scheduler.get_next_batch_to_run`` merges finished prefills into the running batch,
prefills while its estimate allows, else decodes and retracts when the pool is full. Changed: the
subclass here turns those steps into events for whoever owns the decisions (``on_*`` methods) and
lets parked requests be seen wherever upstream looks for live ones. Why no public seam serves:
the methods are override points, but nothing upstream knows requests outside its two batches. An
upstream registry of live requests would make most of this module unnecessary.
"""

import time
from collections import deque
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import broadcast_pyobj

from econoserve.patches.decode_batch import finish_parked
from econoserve.patches.host_kvc import is_offloaded

TARGETS: dict[str, dict[str, str]] = {
    "sglang.srt.managers.scheduler.Scheduler": {
        "event_loop_normal": "c328a45b821f18a07d1103648d2ececc2a82604c6ef57074e21ccdad73b8ca1d",
        "event_loop_overlap": "c093eb14e50c1ac62ba040fda2f47447e29c2105357a39e1095b5a31af5d043a",
        "get_next_batch_to_run": "34f30fd4dfb13d741ef8aae209ca7de67fa00846ee58ffa7706fc3b12890fae0",
        "get_new_batch_prefill": "a8b9a7a4fee3e50eea30094ab73dfcc4c840c8398c1d4d8cc5b231849d2980ee",
        "update_running_batch": "6962823239da9a8939e6adad29e48b5729b957d4c6537beacb319d2a2fd0db50",
        "process_batch_result": "726305f46a979a47a7bc334d9d8b98122943adf36da5a977ce2292c21ff7a8e2",
        "process_input_requests": "b8c3ef031ea741a8b50b937cdd84fdcf59e2fce4f6cbd3cc6537225193e6a52f",
        "process_pending_chunked_abort": "62e3fce1240d07a434cdb94cefbd686f2c001ef607704d68b72779b5648771ae",
        "_add_request_to_queue": "056a60799b02ac479f90d60196205e9a48eb85bb66210b5a12de9fba98d72b0a",
        "retire_unadmitted_request": "659573e8a6e7f36698c2b4cc1dc2d8eb8992f7ce62fbe9ea032c0a3e1da0fc81",
        "send_abort_output": "fd50df816ad695e92c7dfcbf53421b55b47007e19a5f8699720edf00cb6adcb9",
        "abort_request": "b16ca1103b1df7f570f453e0e16be33df8b51e69fc874dc8e065f53b4531c547",
        "collect_inflight_reqs": "fb6f29c470bccb534ac168f0b5a51716beabbb9458a39cfd4a7df30fbcedccfd",
        "_poll_timeout_aborts": "563ad485b205a3efdd44f467ed81cad2412417bba17314f7b7239257b661bec7",
        "is_fully_idle": "de1b97c37c2842d2a486500bcf471d45c2419226bb59cc39834ec094fc5845f4",
        "pause_generation": "b5afa4cbaf6fbea9e9b8d37d8b59cc1d7a0e66acf95d5112826f39feb31122c2",
        "init_running_status": "91e423123683c4f539142731fc09dd8bb19fabd20bcde1cf526ee2abd50fc3d9",
        "init_chunked_prefill": "a391d7a53ace87d8f082c52697fa3747dfcf2727b164b9540521f1348c39e3e7",
        "init_schedule_policy": "91e50a99cc80f8f85aa1e10ad4d022cd64437772a137af4a44f306c72f2715e0",
        "init_invariant_checker": "2a8bca7002092208d6a2c846a837de52884545a867659c6f073a821c0b1eca68",
        "init_load_inquirer": "01d535dfc92a123a33dbf05b9b1d5b594bf0de928464e5b586ecdd7870964ddb",
        "can_schedule_lora_req": "2d821a0bbdae91c02be9ab540d9b6d623cfc6acb4a9c2ee66f7e082946153df6",
        "run_batch": "4e9bb4d5e649e2f169fcc5d0621a2218d0046acc13d121e6065e41cca40ce495",
    },
    "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor": {
        "process_batch_result_prefill": "a43539bf03ee4abfffcf4fa9af744e2bda3048baeac7786f15b0d7ed90d2a2e5",
        "process_batch_result_decode": "c4c08ab3f86900854e99354ccb5d3867158570fb7c7a0acd60df7e1b14a7c27f",
    },
    "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker": {
        "_requests_owning_rows": "c6c35aedd0ce6971ba7facd46379c8e276cc73ac2085eed081a848313130aba0",
    },
}


@dataclass(slots=True)
class ClockTick:
    """Rank 0's time, broadcast with the requests so that every rank plans with the same.

    Attributes:
        now_s: seconds on rank 0's monotonic clock.
        elapsed_s: how long iterations took on rank 0, by their number.
    """

    now_s: float
    elapsed_s: dict[int, float]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served.

    Attributes:
        message: a sentence for its sender.
        status: HTTP status.
        kind: the error's type in the answer.
    """

    message: str
    status: HTTPStatus = HTTPStatus.BAD_REQUEST
    kind: str = "BadRequestError"


class ParkingScheduler(Scheduler):
    """Upstream's scheduler that knows parked requests and reports what happens to requests.

    Attributes:
        parked: requests that hold KV outside every batch, by id, in the order they were parked;
            that of some lies in host memory.
        now_s: the time of this iteration, the same on every tensor-parallel rank.
    """

    def init_running_status(self) -> None:
        """See upstream; also starts with nothing parked."""
        super().init_running_status()
        self.parked: dict[str, Req] = {}
        self.now_s = 0.0
        self._elapsed_s: dict[int, float] = {}
        self._launched_s: deque[float] = deque()
        self._done = 0
        self._done_s = 0.0

    def on_elapsed(self, number: int, elapsed_s: float) -> None:
        """An iteration's time is known, the same on every tensor-parallel rank.

        Args:
            number: of the batch, from 0 in the order of launches.
            elapsed_s: how long it took.
        """

    def on_queued(self, req: Req) -> None:
        """A request entered the waiting queue, new or to be computed again.

        Args:
            req: the request.
        """

    def on_gone(self, req: Req) -> None:
        """A request left without a final result: aborted or refused.

        Args:
            req: the request.
        """

    def on_refused(self, req: Req) -> None:
        """A request was refused on arrival, by upstream or by us.

        Args:
            req: the request, with its error in ``to_finish``.
        """

    def refusal(self, req: Req) -> Refusal | None:
        """Why a request that was just received cannot be served.

        Args:
            req: the request.

        Returns:
            The reason, or ``None`` to queue it.
        """
        return None

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        returns = is_retracted or req.retraction_count > 0
        if req.to_finish is None and not returns and (refusal := self.refusal(req)):
            req.set_finish_with_abort(refusal.message, refusal.status, refusal.kind)
        if req.to_finish is not None and not returns and not req.kv.holds_kv:
            self.on_refused(req)
            # Refused already: answer now instead of after a forward pass over a stub.
            self.retire_unadmitted_request(req)
            self.on_gone(req)
            return
        waiting = len(self.waiting_queue)
        super()._add_request_to_queue(req, is_retracted)
        if len(self.waiting_queue) > waiting and self.waiting_queue[-1] is req:
            self.on_queued(req)

    def refuse_waiting(self, refusals: dict[str, Refusal]) -> list[Req]:
        """Answer waiting requests with errors.

        Args:
            refusals: the error by request id; requests that do not wait are left alone.

        Returns:
            Those that waited.
        """
        refused = [req for req in self.waiting_queue if req.rid in refusals]
        if refused:
            self.waiting_queue = [req for req in self.waiting_queue if req.rid not in refusals]
        for req in refused:
            refusal = refusals[req.rid]
            req.set_finish_with_abort(refusal.message, refusal.status, refusal.kind)
            self.retire_unadmitted_request(req)
        return refused

    def send_abort_output(self, abort_req: AbortReq, req: Req) -> None:
        """See upstream; every request that ends without a result passes here.

        Args:
            abort_req: the message.
            req: the request.
        """
        super().send_abort_output(abort_req, req)
        self.on_gone(req)

    def process_pending_chunked_abort(self) -> None:
        """See upstream; also forgets the request if its prompt was given up."""
        chunked = self.chunked_req
        super().process_pending_chunked_abort()
        if chunked is not None and self.chunked_req is None:
            self.on_gone(chunked)

    def abort_request(self, recv_req: AbortReq) -> None:
        """See upstream; parked requests end at once and free their KV.

        Args:
            recv_req: which requests, by prefix of their id, or all.
        """
        super().abort_request(recv_req)
        for req in list(self.parked.values()):
            if req.to_finish is not None:
                self._end_parked(req)

    def _collect_inflight_batches(self) -> list[ScheduleBatch | None]:
        parked = ScheduleBatch(reqs=list(self.parked.values()))
        return [*super()._collect_inflight_batches(), parked]

    def _end_parked(self, req: Req) -> None:
        del self.parked[req.rid]
        finish_parked(self, req)
        self.on_gone(req)

    def _poll_timeout_aborts(self) -> list[Any]:
        aborts: list[Any] = super()._poll_timeout_aborts()
        if self.tp_size > 1 and not self.is_fully_idle():
            elapsed_s, self._elapsed_s = self._elapsed_s, {}
            aborts.append(ClockTick(time.monotonic(), elapsed_s))
        return aborts

    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        """See upstream; takes the time of this iteration.

        Args:
            recv_reqs: what was received, the same on every rank.
        """
        ticks = [req for req in recv_reqs if isinstance(req, ClockTick)]
        if self.tp_size == 1:
            self.now_s = time.monotonic()
        elif ticks:
            self.now_s = ticks[-1].now_s
            for tick in ticks:
                for number, elapsed_s in tick.elapsed_s.items():
                    self.on_elapsed(number, elapsed_s)
            recv_reqs = [req for req in recv_reqs if not isinstance(req, ClockTick)]
        elif recv_reqs:
            # After an idle time there was no tick; every rank got the same requests and is here.
            group = get_parallel().tp_group
            (self.now_s,) = broadcast_pyobj(
                [time.monotonic()], group.rank, group.cpu_group, src=group.ranks[0]
            )
        super().process_input_requests(recv_reqs)

    def run_batch(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        """See upstream; notes when the batch was launched.

        Args:
            batch: the batch.
            args: as upstream.
            kwargs: as upstream.

        Returns:
            As upstream.
        """
        started_s = time.perf_counter()
        result = super().run_batch(batch, *args, **kwargs)
        # On a CPU the forward pass has run by now, else only its launch.
        on_cpu = self.device == "cpu"
        self._launched_s.append(time.perf_counter() - started_s if on_cpu else started_s)
        return result

    def _batch_is_done(self) -> None:
        """The oldest batch in flight has its result; on a GPU it began when the one before ended."""
        if not self._launched_s:
            return
        launched_s, now_s = self._launched_s.popleft(), time.perf_counter()
        elapsed_s = launched_s if self.device == "cpu" else now_s - max(launched_s, self._done_s)
        number, self._done, self._done_s = self._done, self._done + 1, now_s
        if self.tp_size == 1:
            self.on_elapsed(number, elapsed_s)
        elif get_parallel().tp_rank == 0:
            self._elapsed_s[number] = elapsed_s

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        """See upstream; also takes the time.

        Args:
            batch: the batch as it was launched.
            result: what came of it.
        """
        super().process_batch_result(batch, result)
        self._batch_is_done()

    def is_fully_idle(self, for_health_check: bool = False, ignore_waiting: bool = False) -> bool:
        """See upstream; a parked request is work.

        Args:
            for_health_check: as upstream.
            ignore_waiting: as upstream.

        Returns:
            Whether nothing is queued, parked or running.
        """
        return not self.parked and super().is_fully_idle(for_health_check, ignore_waiting)

    def init_invariant_checker(self) -> None:
        """See upstream; the memory check while busy counts parked requests as owners of KV."""
        super().init_invariant_checker()
        self.invariant_checker.get_running_batch = self._batch_of_owners

    def init_load_inquirer(self) -> None:
        """See upstream; the load that is balanced over replicas counts parked requests."""
        super().init_load_inquirer()
        self.load_inquirer = replace(self.load_inquirer, get_running_batch=self._batch_of_owners)

    def _batch_of_owners(self) -> ScheduleBatch:
        owners = [req for req in self.parked.values() if not is_offloaded(req)]
        if not owners:
            return self.running_batch
        return ScheduleBatch(reqs=[*self.running_batch.reqs, *owners])

    def can_schedule_lora_req(self, req: Req, running_loras: set[str | None]) -> bool:
        """See upstream; the adapters of parked requests keep their places, so that all can resume.

        Args:
            req: a waiting request.
            running_loras: adapters of what runs.

        Returns:
            Whether its adapter has a place, too.
        """
        parked = {other.lora_id for other in self.parked.values()}
        return super().can_schedule_lora_req(req, running_loras | parked)

    def pause_generation(self, recv_req: Any) -> None:
        """See upstream; a pause that retracts takes back parked requests, too.

        Args:
            recv_req: the pause request.
        """
        if recv_req.mode == "retract":
            self.requeue_parked()
        super().pause_generation(recv_req)

    def requeue_parked(self) -> None:
        """Take the KV of every parked request back and queue it again."""
