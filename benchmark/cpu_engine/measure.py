"""The order of all runs: systems take turns, and a different one goes first in every repeat.

Owns which systems are up, what is run when, and what is noted beside the figures. A system that
fails is left out from then on; the others go on.
"""

import contextlib
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.cpu_engine.figures import BURST, DECODE, OPEN, Sample
from benchmark.cpu_engine.models import MEDIUM, TINY
from benchmark.cpu_engine.offline import OfflineEngine, Span, random_prompts
from benchmark.cpu_engine.processes import Failed
from benchmark.cpu_engine.serving import Client, Load, Server
from benchmark.cpu_engine.systems import System

PROMPT_SEED = 1
WARMUP_SEED = 1_000
FIRST_SEED = 1
IDLE_LOOK_S = 3.0
SETTLE_LOOK_S = 0.2
SETTLE_LIMIT_S = 5.0
SETTLED_CORES = 0.1
DECODE_BUDGET_S = 1.5
DECODE_MOST_PAIRS = 5
"""Short decode measurements are repeated within a sample until this time or this number."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured on a model.

    Attributes:
        repeats: samples per system of decode steps and bursts.
        open_repeats: samples per system of the open loop.
        batches: of the decode measurement.
        span: the output tokens whose steps are timed.
        burst: load of the burst.
        open: load of the open loop.
        warmup: load before both, unmeasured.
    """

    repeats: int
    open_repeats: int
    batches: tuple[int, ...]
    span: Span
    burst: Load
    open: Load
    warmup: Load


BATCHES = (1, 8, 32, 128)
FULL_SPAN = Span(39, 103)
QUICK_SPAN = Span(4, 36)
FULL = {
    TINY: Size(5, 5, BATCHES, FULL_SPAN, Load(200), Load(60, 4.0), Load(64)),
    MEDIUM: Size(5, 5, BATCHES, FULL_SPAN, Load(60), Load(30, 1.0), Load(32)),
}
QUICK = {
    TINY: Size(2, 1, BATCHES, QUICK_SPAN, Load(60), Load(40, 4.0), Load(32)),
    MEDIUM: Size(2, 1, BATCHES, QUICK_SPAN, Load(30), Load(10, 1.0), Load(16)),
}


@dataclass(slots=True)
class Session:
    """Everything that is measured, and what was learned on the way.

    Attributes:
        systems: what is measured.
        logs: folder for what the processes print.
        timeout_s: limit for one run.
        say: takes lines for the user.
        samples: what was measured so far.
        failures: what went wrong so far.
        facts: by system: versions, thread counts, idle CPU use.
    """

    systems: Sequence[System]
    logs: Path
    timeout_s: float
    say: Callable[[str], None]
    samples: list[Sample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def decode(self, model: str, folder: Path, size: Size) -> None:
        """Measure decode step times.

        Args:
            model: its name.
            folder: the model's folder.
            size: how much.
        """
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        prompts = random_prompts(max(size.batches), vocabulary, PROMPT_SEED)
        with self._up(
            f"{model}, offline",
            lambda system: OfflineEngine(
                system, folder, prompts, self.logs / f"{system.name}-offline.log"
            ),
        ) as engines:
            for system in list(engines):
                self._warm_up_decode(engines, system, size)
            self._note_idle(engines)
            for repeat in range(size.repeats):
                for batch in size.batches:
                    for system in rotated(list(engines), repeat):
                        self._decode_sample(engines, system, model, repeat, batch, size.span)

    def _warm_up_decode(self, engines: dict[str, Any], system: str, size: Size) -> None:
        self.say(f"  warm-up: {system}")
        with self._attempt(engines, system):
            for batch in sorted(size.batches, reverse=True):
                for tokens in (1, size.span.first, size.span.last):
                    engines[system].run(batch, tokens, self.timeout_s)

    def _decode_sample(
        self,
        engines: dict[str, Any],
        system: str,
        model: str,
        repeat: int,
        batch: int,
        span: Span,
    ) -> None:
        with self._attempt(engines, system), _usage(engines, system) as usage:
            pairs = []
            began_s = time.monotonic()
            while not pairs or (
                time.monotonic() - began_s < DECODE_BUDGET_S and len(pairs) < DECODE_MOST_PAIRS
            ):
                pairs.append(engines[system].step_ms(batch, span, self.timeout_s))
        if system not in engines:
            return
        step_ms = statistics.median(milliseconds for milliseconds, _ in pairs)
        details = {"runs": [seconds for _, seconds in pairs], **usage}
        self.samples.append(Sample(model, DECODE, system, repeat, {str(batch): step_ms}, details))
        self.say(f"  {repeat + 1}. {system}, batch {batch}: {step_ms:.2f} ms per step")

    def load(self, model: str, folder: Path, size: Size, measurements: Sequence[str]) -> None:
        """Measure servers under load.

        Args:
            model: its name.
            folder: the model's folder.
            size: how much.
            measurements: ``burst``, ``open`` or both.
        """
        with (
            Client(self.logs) as client,  # starts while the servers do
            self._up(
                f"{model}, servers", lambda system: Server(system, folder, self.logs)
            ) as servers,
        ):
            for system in list(servers):
                self.say(f"  warm-up: {system}")
                with self._attempt(servers, system):
                    servers[system].send(client, size.warmup, WARMUP_SEED, self.timeout_s)
            self._note_idle(servers)
            loads = {BURST: size.burst, OPEN: size.open}
            for repeat in range(max(size.repeats, size.open_repeats)):
                for measurement in measurements:
                    if repeat >= (size.open_repeats if measurement == OPEN else size.repeats):
                        continue
                    for system in rotated(list(servers), repeat):
                        send = functools.partial(
                            servers[system].send,
                            client,
                            loads[measurement],
                            FIRST_SEED + repeat,
                            self.timeout_s,
                        )
                        self._load_sample(servers, system, model, repeat, measurement, send)

    def _load_sample(
        self,
        servers: dict[str, Any],
        system: str,
        model: str,
        repeat: int,
        measurement: str,
        send: Callable[[], tuple[dict[str, float], dict[str, float]]],
    ) -> None:
        with self._attempt(servers, system), _usage(servers, system) as usage:
            values, details = send()
        if system not in servers:
            return
        self.samples.append(
            Sample(model, measurement, system, repeat, values, {**details, **usage})
        )
        self.say(
            f"  {repeat + 1}. {system}, {measurement}: {values['output_tokens_per_s']:.0f} tokens/s"
            f", TPOT {values['mean_tpot_ms']:.2f} ms"
        )

    @contextlib.contextmanager
    def _up(self, title: str, start: Callable[[System], Any]) -> Iterator[dict[str, Any]]:
        """Start all systems at once; leave out those that fail; end all at once."""
        self.say(f"{title}: starting {', '.join(system.name for system in self.systems)}")
        with contextlib.ExitStack() as stack:
            started = {system.name: stack.enter_context(start(system)) for system in self.systems}
            # On the way out this runs first, so that all end at the same time.
            stack.callback(lambda: [one.process.ask_to_stop() for one in started.values()])
            running = dict(started)
            for system in list(running):
                with self._attempt(running, system):
                    facts = running[system].wait_until_ready()
                    self.facts.setdefault(system, {}).update(facts)
                    self.say(f"  {system} is up after {facts['start_s']:.0f} s")
            yield running

    @contextlib.contextmanager
    def _attempt(self, running: dict[str, Any], system: str) -> Iterator[None]:
        """Take a system that fails out of the running ones."""
        try:
            yield
        except Failed as failure:
            self.failures.append(str(failure))
            self.say(f"  {failure}")
            running.pop(system).process.stop()

    def _note_idle(self, running: dict[str, Any]) -> None:
        _settle(running, "")
        before = {system: one.process.cpu_s() for system, one in running.items()}
        time.sleep(IDLE_LOOK_S)
        for system, one in running.items():
            facts = self.facts.setdefault(system, {})
            idle = (one.process.cpu_s() - before[system]) / IDLE_LOOK_S
            facts["idle_cores"] = round(max(idle, facts.get("idle_cores", 0.0)), 3)
            environment = one.process.busiest_environment()
            facts["omp_num_threads"] = environment.get("OMP_NUM_THREADS")


def _settle(running: dict[str, Any], system: str) -> None:
    """Wait until the other systems are idle: vLLM spins for a second after its last request."""
    others = [one.process for name, one in running.items() if name != system]
    deadline_s = time.monotonic() + SETTLE_LIMIT_S
    before_s = sum(process.cpu_s() for process in others)
    while time.monotonic() < deadline_s:
        time.sleep(SETTLE_LOOK_S)
        now_s = sum(process.cpu_s() for process in others)
        if now_s - before_s <= SETTLED_CORES * SETTLE_LOOK_S:
            return
        before_s = now_s


@contextlib.contextmanager
def _usage(running: dict[str, Any], system: str) -> Iterator[dict[str, float]]:
    """Note how many cores a system keeps busy meanwhile, and how many the idle ones do."""
    _settle(running, system)
    usage: dict[str, float] = {}
    began_s = time.monotonic()
    before = {name: one.process.cpu_s() for name, one in running.items()}
    yield usage
    seconds = time.monotonic() - began_s
    used = {name: running[name].process.cpu_s() - cpu_s for name, cpu_s in before.items()}
    usage["cores"] = round(used.pop(system) / seconds, 2)
    usage["idle_systems_cores"] = round(math.fsum(used.values()) / seconds, 3)


def rotated(systems: Sequence[str], repeat: int) -> list[str]:
    """Who goes when.

    Args:
        systems: those that run.
        repeat: its number, from 0.

    Returns:
        The systems, starting with another one in every repeat.
    """
    start = repeat % len(systems) if systems else 0
    return [*systems[start:], *systems[:start]]
