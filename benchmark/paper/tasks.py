"""What can be run: a run at one rate, or a search for a placement.

Owns how a task is described in the store, and what doing it means.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

from benchmark.paper.grid import ATTAIN, DISTSERVE_RUNNING
from benchmark.paper.store import Line, key_of
from econoserve.sim.capacity import allowed_misses, measure
from econoserve.sim.placement import Parallelism, Phase, Placement
from econoserve.sim.placement_search import Limits, best_placement
from econoserve.sim.run import DISTSERVE, RunSpec, simulate

ALONE = Phase(Parallelism(1, 1), 1)


@dataclass(frozen=True)
class Rate:
    """A run at one rate.

    Attributes:
        spec: what to run.
        whole: whether it is run to its end even if too many requests miss their SLO.
    """

    spec: RunSpec
    whole: bool

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What describes it in the store: a whole run answers where a shorter one would do."""
        return _plain({"run": asdict(self.spec), "attain": ATTAIN})

    @cached_property
    def key(self) -> str:
        """By what its line is found."""
        return key_of(self.settings)

    def done(self, line: Line | None) -> bool:
        """Whether a line of the store is an answer.

        Args:
            line: with these settings, if there is one.

        Returns:
            Whether nothing is left to do.
        """
        return line is not None and (bool(line.figures) or not self.whole)

    def do(self) -> Line:
        """Run it.

        Returns:
            What came of it.

        Raises:
            ValueError, SimulationError, OSError: as ``simulate`` does.
        """
        begin_s = time.perf_counter()
        if self.whole:
            result = simulate(self.spec)
            missed = sum(not record.met for record in result.records)
            attained = missed <= allowed_misses(len(result.records), ATTAIN)
            figures = result.figures
        else:
            trial = measure(self.spec, ATTAIN)
            attained, figures = trial.attained, trial.figures
        return Line(attained, figures, time.perf_counter() - begin_s)

    def __str__(self) -> str:
        return f"{self.spec.policy} at {self.spec.workload.rate_rps:g}/s"


@dataclass(frozen=True)
class Placing:
    """A search for DistServe's best placement.

    Attributes:
        spec: a run with the cell's workload, and a guess of the rate.
        limits: what is searched.
        min_duration_s: least time of arrivals in a run.
        tolerance: how close the search comes.
    """

    spec: RunSpec
    limits: Limits
    min_duration_s: float
    tolerance: float

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What describes it in the store."""
        search = {
            "run": asdict(self.spec),
            "limits": asdict(self.limits),
            "min_duration_s": self.min_duration_s,
            "tolerance": self.tolerance,
        }
        return _plain({"placement": search, "attain": ATTAIN})

    @cached_property
    def key(self) -> str:
        """By what its line is found."""
        return key_of(self.settings)

    def done(self, line: Line | None) -> bool:
        """See ``Rate.done``."""
        return line is not None

    def do(self) -> Line:
        """Search.

        Returns:
            The figures of the best placement at its highest rate, with its name and that rate.

        Raises:
            ValueError, SimulationError, OSError: as ``best_placement`` does.
        """
        begin_s = time.perf_counter()
        spec = replace(
            self.spec,
            policy=DISTSERVE,
            constants={},
            placement=Placement(ALONE, ALONE),
            max_running=DISTSERVE_RUNNING,
        )
        found = best_placement(
            spec,
            ATTAIN,
            limits=self.limits,
            min_duration_s=self.min_duration_s,
            tolerance=self.tolerance,
        )
        figures = {
            **found.figures,
            "rate_rps": found.rate_rps,
            "placement": str(found.placement) if found.placement else None,
            "gpus": found.placement.gpus if found.placement else 0,
        }
        return Line(found.placement is not None, figures, time.perf_counter() - begin_s)

    def __str__(self) -> str:
        return f"{DISTSERVE}'s placement"


Task = Rate | Placing


def do(task: Task) -> Line:
    """Do a task, in a process of its own.

    Args:
        task: what to do.

    Returns:
        What came of it.
    """
    return task.do()


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.value if isinstance(value, Enum) else value
