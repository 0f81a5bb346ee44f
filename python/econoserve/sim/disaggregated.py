"""Prefills and decodes on separate instances, as DistServe has it.

Owns the way of a request through both. The rules were read in LLMServe/DistServe at commit 82831f1
(the engine's ``context_stage_scheduler``, ``decoding_stage_scheduler`` and ``single_stage_engine``,
the scripts of its evaluation, and its simulator ``simdistserve``):

- A prefill instance computes whole prompts, first come, first served. A batch takes the next ones
  while it has no more than 128 prompts and 8,192 tokens (the evaluation's limits) and blocks for
  them are free. The first token is out when it ends. The KVC stays there until it is fetched.
- A decode instance fetches the KVC of a prompt when blocks are free for it, and while the prompts
  that wait there to decode hold less than 5 % of its blocks; first come, first served.
- It decodes all that it has, up to the largest batch, and takes blocks of 16 tokens as responses
  grow. When none is free, the last request to join moves to host memory, and the iteration waits;
  those come back first.
- With pipeline stages there is a batch for each. They take turns; a request stays in its batch. A
  stage takes its share of the pass, and in prefills 1 ms for each stage (``simdistserve``).
- A request goes to the instance with the fewest, the first one of equals (``simdistserve``).

Where we differ it is in favour of DistServe: an instance computes while KVC is moved, one request
at a time for each decode instance (its engine's loop waits for the move); a request joins a batch
if its own blocks are free (the engine counts those of one that waits twice); no time is added for
Ray (``simdistserve`` adds 2 ms and more to an iteration). With that put in, means agree with those
of ``simdistserve`` to about 1 % (``benchmark/simulator/distserve.py``).
"""

from collections.abc import Sequence
from operator import attrgetter

from econoserve.core.types import Outcome
from econoserve.sim.cluster import Clock, total_use
from econoserve.sim.decoding import DecodeServer
from econoserve.sim.prefilling import PrefillServer
from econoserve.sim.records import KvcUse, RequestRecord
from econoserve.sim.stages import Job, StageMachine, blocks_of
from econoserve.workload.trace import TraceRequest


class Disaggregated:
    """Prefill instances and decode instances.

    Args:
        prefill: machines of the former, at least one.
        decode: machines of the latter, at least one.
        clock: new.
        begin_s: when the run begins.

    Attributes:
        servers: all, prefill instances first.
        records: see ``sim.cluster.System``.
    """

    def __init__(
        self,
        prefill: Sequence[StageMachine],
        decode: Sequence[StageMachine],
        clock: Clock,
        begin_s: float,
    ) -> None:
        self._prefill = [
            PrefillServer(machine, clock, number, begin_s, self._hand_over)
            for number, machine in enumerate(prefill)
        ]
        self._decode = [
            DecodeServer(machine, clock, len(prefill) + number, begin_s, self._finish)
            for number, machine in enumerate(decode)
        ]
        self.servers = [*self._prefill, *self._decode]
        self.records: list[RequestRecord] = []
        # What is sure to fit, wherever a request goes.
        self._blocks = min(machine.blocks for machine in (*prefill, *decode))
        self._live = 0

    @property
    def use(self) -> KvcUse:
        """See ``sim.cluster.System``."""
        return total_use([server.use for server in self.servers])

    @property
    def busy(self) -> bool:
        """See ``sim.cluster.System``."""
        return self._live > 0

    def arrive(self, rid: str, request: TraceRequest) -> None:
        """See ``sim.cluster.System``; what does not fit into an instance is refused."""
        tokens, now_s = request.features.prompt_tokens, request.arrival_s
        record = RequestRecord(rid, now_s, tokens, request.output_tokens, request.slo)
        self.records.append(record)
        if blocks_of(tokens + request.output_tokens) > self._blocks:
            record.outcome, record.end_s = Outcome.REJECTED, now_s
            return
        self._live += 1
        min(self._prefill, key=attrgetter("load")).add(Job(request, record, tokens), now_s)

    def _hand_over(self, source: PrefillServer, job: Job, now_s: float) -> bool:
        """Give a computed prompt to a decode instance; ``False`` if its response is complete."""
        if job.produced == job.request.output_tokens:
            self._finish(job, now_s)
            return False
        min(self._decode, key=attrgetter("load")).offer(source, job, now_s)
        return True

    def _finish(self, job: Job, now_s: float) -> None:
        job.record.outcome, job.record.end_s = Outcome.FINISHED, now_s
        self._live -= 1
