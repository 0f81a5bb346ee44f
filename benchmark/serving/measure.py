"""One server at a time: start it, warm it up, replay the workloads, note what they cost, end it.

Owns the processes. A server is gone, with all that it started, before the next one starts.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmark.cpu_engine.processes import Failed, Worker, session_members
from benchmark.cpu_engine.serving import START_TIMEOUT_S, Server
from benchmark.cpu_engine.systems import ECONOSERVE, ROOT, VLLM, environment_of
from benchmark.scheduler_comparison.systems import cpu_busy_share
from benchmark.scheduler_comparison.workload import Vocabulary
from benchmark.serving.figures import by_class, figures, request_records, wrong_lengths
from benchmark.serving.records import Cell, Store
from benchmark.serving.systems import (
    KVC_TOKENS,
    METRICS,
    cached_tokens,
    common_body,
    family,
    preemptions,
    recomputed_tokens,
    request_body,
    request_headers,
    system,
)
from benchmark.serving.workloads import WORKLOADS, Request, Workload, generate, rate_rps

WARMUP_SEED = 999_983
WARMUP_RATE_RPS = 50.0
SHOWN_ERRORS = 5


class DifferentWork(Failed):
    """Responses do not have their lengths, so that systems cannot be compared."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is, beside its key; the same for all records of a folder.

    Attributes:
        arrivals_s: for so long requests arrive, times the workload's ``span``.
        requests: so many instead, if given.
        arrivals: ``poisson`` or ``gamma:CV``.
        slo_scale: factor on the objectives.
        warmup: requests before the first run of a server, unmeasured.
        drain_s: time after the last arrival in which answers count.
        seed: of the first repeat.
    """

    arrivals_s: float = 15.0
    requests: int | None = None
    arrivals: str = "poisson"
    slo_scale: float = 1.0
    warmup: int = 32
    drain_s: float = 60.0
    seed: int = 1

    def count(self, workload: Workload, rate: float) -> int:
        """Requests of a run.

        Args:
            workload: what arrives.
            rate: arrivals per second.

        Returns:
            How many, at least 1.
        """
        return self.requests or max(round(rate * self.arrivals_s * workload.span), 1)

    def requests_of(self, cell: Cell, vocabulary: Vocabulary) -> list[Request]:
        """The requests of a run: the same for all systems.

        No two runs of a server share prompts, so that nobody learns a length from an earlier run.

        Args:
            cell: its key.
            vocabulary: of the model.

        Returns:
            The requests.
        """
        workload = WORKLOADS[cell.workload]
        rate = rate_rps(workload, cell.load, cell.kvc)
        names = sorted(WORKLOADS)
        seed = (self.seed + cell.repeat) * 1_000_000 + names.index(cell.workload) * 100_000
        return generate(
            workload,
            self.count(workload, rate),
            rate,
            seed + round(1_000 * cell.load),
            vocabulary,
            arrivals=self.arrivals,
            slo_scale=self.slo_scale,
        )


class Client:
    """The load generator in a process of its own, the same for all systems.

    Args:
        logs: folder for what it prints and is given.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._worker: Worker | None = None
        self._processor = ""
        self.has_precedence = False

    def __enter__(self) -> Self:
        """Return it; leaving the block ends it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.stop()

    def stop(self) -> None:
        """End it; the next ``processor`` starts another one."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def processor(self) -> str:
        """Start it unless it is up.

        Returns:
            SGLang's text for the logit processor that ends responses.

        Raises:
            Failed: it did not start.
        """
        if self._worker is None:
            self._worker = Worker(
                "load generator",
                [sys.executable, "-m", "benchmark.serving.client"],
                environment_of(None),
                self._logs / "client.log",
                ROOT,
            )
            self._worker.send({})
            try:
                found = self._worker.receive(START_TIMEOUT_S)
                self._processor = found["processor"]
                self.has_precedence = found["has_precedence"]
            except Failed:
                self.stop()
                raise
        return self._processor

    def replay(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Send requests.

        Args:
            job: see ``client.replay``.
            limit_s: for all of it.

        Returns:
            What ``client.replay`` found, and ``client_cpu_s``.

        Raises:
            Failed: it did not end in time, or failed.
        """
        self.processor()
        worker = self._worker
        given, found = self._logs / "job.json", self._logs / "found.json"
        given.write_text(json.dumps(job))
        before_s = worker.cpu_s()
        try:
            worker.send({"job": str(given), "result": str(found)})
            worker.receive(limit_s)
        except Failed:
            self.stop()  # so that a late answer is not taken for the next one
            raise
        return {**json.loads(found.read_text()), "client_cpu_s": worker.cpu_s() - before_s}


@dataclass(slots=True)
class Session:
    """Everything that a measurement needs.

    Attributes:
        settings: what a run is.
        model: the model's folder.
        store: takes the records.
        logs: folder for what the processes print.
        say: takes lines for the user.
        facts: what was learned of each system.
        failures: what went wrong.
    """

    settings: Settings
    model: Path
    store: Store
    logs: Path
    say: Callable[[str], None]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def measure(self, servers: Sequence[Sequence[Cell]]) -> None:
        """Measure what is left to measure.

        A server that fails is noted and ends; the next one goes on.

        Args:
            servers: the runs of each server.
        """
        vocabulary = Vocabulary.of_model(self.model)
        with Client(self.logs) as client:
            for number, cells in enumerate(servers, start=1):
                first = cells[0]
                self.say(
                    f"server {number} of {len(servers)}: {first.system}, KVC {first.kvc}, "
                    f"repeat {first.repeat + 1}, {len(cells)} runs"
                )
                try:
                    self._serve(cells, client, vocabulary)
                except DifferentWork:
                    raise
                except Failed as failure:
                    self.failures.append(str(failure))
                    self.say(f"  {failure}")

    def _serve(self, cells: Sequence[Cell], client: Client, vocabulary: Vocabulary) -> None:
        first = cells[0]
        busy = cpu_busy_share()
        server = Server(system(first.system), self.model, self.logs, KVC_TOKENS[first.kvc])
        try:
            facts = server.wait_until_ready()
            self._check(first.system, server)
            self._note(first.system, server, facts)
            if self.settings.warmup:
                warmup = generate(
                    WORKLOADS["sharegpt"],
                    self.settings.warmup,
                    WARMUP_RATE_RPS,
                    WARMUP_SEED,
                    vocabulary,
                )
                self._replay(first.system, server, client, warmup, vocabulary)
            for cell in cells:
                self._run(cell, server, client, vocabulary, busy)
        finally:
            server.process.stop()
            if left := session_members(server.process.pid):
                raise Failed(f"{first.system}: processes {left} are still there")

    def _check(self, name: str, server: Server) -> None:
        """See that the scheduler that runs is the one that is measured."""
        if family(name) == VLLM:
            return
        info = json.loads(server.get("/server_info") or b"{}")
        ours = "econoserve" in info["internal_states"][0]
        if ours != (family(name) == ECONOSERVE):
            raise server.process.failure(f"system={name}: the other scheduler is running")
        tokens = info.get("max_total_num_tokens")
        self.facts.setdefault(name, {})["kvc_tokens_of_server"] = tokens

    def _note(self, name: str, server: Server, facts: dict[str, Any]) -> None:
        environment = server.process.busiest_environment()
        known = self.facts.setdefault(name, {})
        known["omp_num_threads"] = environment.get("OMP_NUM_THREADS")
        known["start_s"] = round(max(facts["start_s"], known.get("start_s", 0.0)), 1)
        self.say(f"  up after {facts['start_s']:.0f} s")

    def _replay(
        self,
        name: str,
        server: Server,
        client: Client,
        requests: Sequence[Request],
        vocabulary: Vocabulary,
    ) -> dict[str, Any]:
        limit_s = requests[-1].arrival_s + self.settings.drain_s
        job = {
            "url": server.url,
            "backend": system(name).client,
            "gauge": METRICS[family(name)].kvc_use,
            "timeout_s": limit_s,
            "body": common_body(name, str(self.model), client.processor()),
            "requests": [
                {
                    "arrival_s": request.arrival_s,
                    "prompt_ids": list(request.prompt_ids),
                    "body": request_body(name, request, vocabulary.eos_ids),
                    "headers": request_headers(request),
                }
                for request in requests
            ],
        }
        before_s = server.process.cpu_s()
        found = client.replay(job, 2 * limit_s + START_TIMEOUT_S)
        found["cpu_s"] = server.process.cpu_s() - before_s
        if server.process.status is not None:
            raise server.process.failure(f"exit status {server.process.status}")
        if wrong := wrong_lengths(requests, found["answers"]):
            raise DifferentWork(f"{name}: " + "; ".join(wrong[:SHOWN_ERRORS]))
        return found

    def _run(
        self,
        cell: Cell,
        server: Server,
        client: Client,
        vocabulary: Vocabulary,
        busy: float | None,
    ) -> None:
        requests = self.settings.requests_of(cell, vocabulary)
        began_s = time.monotonic()
        found = self._replay(cell.system, server, client, requests, vocabulary)
        answers, counters = found["answers"], found["counters"]
        outcomes = request_records(requests, answers)
        gauge = [value for value in found["gauge"] if value is not None]
        tokens = sum(answer["tokens"] for answer in answers)
        errors = [answer["error"] for answer in answers if answer["error"] is not None]
        record = {
            "kvc_tokens": KVC_TOKENS[cell.kvc],
            "rate_rps": rate_rps(WORKLOADS[cell.workload], cell.load, cell.kvc),
            **figures(outcomes),
            "classes": by_class(requests, outcomes),
            "preemptions": preemptions(cell.system, counters),
            "recomputed_tokens": recomputed_tokens(cell.system, counters),
            "cached_tokens": cached_tokens(cell.system, counters),
            "kvc_use_mean": round(sum(gauge) / len(gauge), 4) if gauge else None,
            "kvc_use_max": round(max(gauge), 4) if gauge else None,
            "cpu_s": round(found["cpu_s"], 2),
            "cpu_ms_per_token": round(1e3 * found["cpu_s"] / tokens, 4) if tokens else None,
            "client_cpu_s": round(found["client_cpu_s"], 2),
            "client_has_precedence": client.has_precedence,
            "client_lag_s": round(max(answer["lag_s"] for answer in answers), 4),
            "prompt_tokens": sum(len(request.prompt_ids) for request in requests),
            "output_tokens": tokens,
            "errors": sorted(set(errors))[:SHOWN_ERRORS],
            "busy_before": None if busy is None else round(busy, 3),
            "wall_s": round(time.monotonic() - began_s, 1),
        }
        self.store.add(cell, record, {**_columns(requests, answers), "counters": counters})
        self.say(
            f"  {cell.workload}, load {cell.load:g} ({record['rate_rps']:g}/s): "
            f"{record['served']} of {record['requests']}, SSR {record['ssr']:.2f}, "
            + (f"mean JCT {record['mean_jct_s']:.2f} s, " if record["served"] else "")
            + f"{record['wall_s']:.0f} s"
            + (f"; {errors[0]}" if errors else "")
        )


def _columns(
    requests: Sequence[Request], answers: Sequence[dict[str, Any]]
) -> dict[str, list[Any]]:
    """What came of each request, a list for each of its fields."""
    return {
        "arrival_s": [round(request.arrival_s, 4) for request in requests],
        "service_class": [request.service_class for request in requests],
        "slo": [
            {name: value for name, value in asdict(request.slo).items() if value is not None}
            for request in requests
        ],
        "prompt_tokens": [len(request.prompt_ids) for request in requests],
        "output_tokens": [request.output_tokens for request in requests],
        **{
            name: [_short(answer[name]) for answer in answers]
            for name in ("ttft_s", "jct_s", "tokens", "error")
        },
    }


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
