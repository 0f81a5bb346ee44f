"""What is known of a trial so far, and what has to be run to know more.

Owns the questions: capacities, runs at a rate, placements. Each is answered from the store, or
notes the runs that it waits for. Those who run and those who report ask the same questions.
"""

from dataclasses import dataclass
from typing import Any

from benchmark.paper.claims import latency_s
from benchmark.paper.grid import (
    EXACT,
    FIRST,
    FRACTIONS,
    FURTHER,
    PREDICTED,
    VARIANTS,
    VLLM_2023,
    Cell,
    Paper,
)
from benchmark.paper.search import highest
from benchmark.paper.store import Line, Store
from benchmark.paper.tasks import Placing, Rate, Task
from econoserve.sim.placement_search import Limits

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Capacity:
    """The highest rate at which enough requests meet their SLO.

    Attributes:
        index: number of the rate in the paper's grid; ``None`` if none attains.
        rate_rps: the rate; 0 if none attains.
        figures: of the run at it.
    """

    index: int | None
    rate_rps: float
    figures: Figures


class Known:
    """Answers, as far as the store has them.

    Args:
        paper: the trial.
        store: of its runs.

    Attributes:
        paper: the trial.
    """

    def __init__(self, paper: Paper, store: Store) -> None:
        self.paper = paper
        self._store = store
        self._missing: dict[str, Task] = {}
        # The store only grows, so that answers stay; and tasks are described once.
        self._capacities: dict[tuple[Cell, str, str, int | None], Capacity] = {}
        self._rates: dict[tuple[Any, ...], Rate] = {}

    def forget_missing(self) -> None:
        """Begin to note anew what has to be done."""
        self._missing.clear()

    @property
    def missing(self) -> list[Task]:
        """What has to be done for questions that were not answered, in their order."""
        return list(self._missing.values())

    def capacity(
        self, cell: Cell, policy: str, predictor: str = PREDICTED, tensor: int | None = None
    ) -> Capacity | None:
        """The capacity of a policy.

        Args:
            cell: where.
            policy: whose.
            predictor: of the lengths.
            tensor: GPUs that share each layer, if not the profile's.

        Returns:
            The capacity; ``None`` while it is not known.
        """
        asked = (cell, policy, predictor, tensor)
        if asked not in self._capacities:
            found = self._search(*asked)
            if found is None:
                return None
            self._capacities[asked] = found
        return self._capacities[asked]

    def _search(
        self, cell: Cell, policy: str, predictor: str, tensor: int | None
    ) -> Capacity | None:
        start = self._start(cell, policy, predictor, tensor)
        if start is None:
            return None
        search = highest(start)
        index = next(search)
        found: dict[int, Figures] = {}
        while True:
            rate_rps = self.paper.rate_rps(index)
            line = self._ask(self._rate(False, cell, policy, rate_rps, predictor, tensor))
            if line is None:
                return None
            if line.attained:
                found[index] = line.figures
            try:
                index = search.send(line.attained)
            except StopIteration as end:
                best: int | None = end.value
                break
        if best is None:
            return Capacity(None, 0.0, {})
        return Capacity(best, self.paper.rate_rps(best), found[best])

    def run(
        self, cell: Cell, policy: str, rate_rps: float, predictor: str = PREDICTED
    ) -> Figures | None:
        """The figures of a run to its end.

        Args:
            cell: where.
            policy: whose.
            rate_rps: at which rate.
            predictor: of the lengths.

        Returns:
            Its figures; ``None`` while they are not known.
        """
        line = self._ask(self._rate(True, cell, policy, rate_rps, predictor))
        return line.figures if line else None

    def alone(self, cell: Cell) -> Figures | None:
        """A short run at a tenth of the capacity, where requests hardly meet each other.

        Args:
            cell: where.

        Returns:
            Its figures; ``None`` while they are not known.
        """
        found = self.capacity(cell, FIRST)
        if found is None:
            return None
        rate_rps = float(f"{(found.rate_rps or cell.guess_rps) / 10:.5g}")
        requests = self.paper.scale.alone_requests
        line = self._ask(self._rate(True, cell, FIRST, rate_rps, PREDICTED, None, requests))
        return line.figures if line else None

    def base_rps(self, cell: Cell) -> float | None:
        """The rate of which the sweep's are fractions.

        Args:
            cell: where.

        Returns:
            The capacity of vLLM of 2023, or where it has none that of today's; ``None`` while it
            is not known.
        """
        for policy in (VLLM_2023, FIRST):
            found = self.capacity(cell, policy)
            if found is None:
                return None
            if found.rate_rps:
                return found.rate_rps
        return cell.guess_rps

    def sweep(self, cell: Cell, policy: str, predictor: str = PREDICTED) -> dict[float, Figures]:
        """Runs at fixed fractions of the capacity of vLLM of 2023.

        Args:
            cell: where.
            policy: whose.
            predictor: of the lengths.

        Returns:
            Figures by fraction, as far as they are known. There are further fractions while the
            latency is below vLLM's at its highest.
        """
        base_rps = self.base_rps(cell)
        if base_rps is None:
            return {}

        def at(fraction: float) -> Figures | None:
            return self.run(cell, policy, float(f"{fraction * base_rps:.5g}"), predictor)

        found = {fraction: figures for fraction in FRACTIONS if (figures := at(fraction))}
        if policy == VLLM_2023 or len(found) < len(FRACTIONS):
            return found
        theirs = self.sweep(cell, VLLM_2023)
        if FRACTIONS[-1] not in theirs:
            return found
        limit_s = latency_s(theirs[FRACTIONS[-1]])
        last = found[FRACTIONS[-1]]
        for fraction in FURTHER:
            if latency_s(last) > limit_s:
                break
            figures = at(fraction)
            if figures is None:
                break
            found[fraction] = last = figures
        return found

    def placement(self, cell: Cell) -> Figures | None:
        """DistServe's best placement.

        Args:
            cell: where.

        Returns:
            Its figures, with ``placement``, ``gpus`` and ``rate_rps``; ``None`` while they are not
            known.
        """
        scale = self.paper.scale
        spec = self.paper.spec(cell, FIRST, cell.guess_rps, requests=scale.requests)
        limits = Limits(scale.gpus, scale.gpus, scale.evaluate)
        line = self._ask(Placing(spec, limits, scale.min_duration_s, scale.step - 1))
        return line.figures if line else None

    def _start(self, cell: Cell, policy: str, predictor: str, tensor: int | None) -> int | None:
        """Index of the rate that a search begins at: a neighbour's capacity."""
        neighbours = []
        if tensor is not None:
            neighbours = [(policy, predictor)]
        elif predictor == EXACT:
            neighbours = [(policy, PREDICTED)]
        elif policy in VARIANTS and policy != "plus":
            neighbours = [("plus", PREDICTED)]
        elif policy != FIRST:
            neighbours = [(FIRST, PREDICTED)]
        for neighbour in neighbours:
            found = self.capacity(cell, *neighbour)
            if found is None:
                return None
            if found.index is not None:
                return found.index
        return self.paper.index_near(cell.guess_rps)

    def _rate(self, whole: bool, *run: Any) -> Rate:
        """A run; its settings are those of ``Paper.spec``."""
        asked = (whole, *run)
        if asked not in self._rates:
            self._rates[asked] = Rate(self.paper.spec(*run), whole)
        return self._rates[asked]

    def _ask(self, task: Task) -> Line | None:
        line = self._store.get(task.key)
        if task.done(line):
            return line
        # A whole run answers where one that may end early would do, too.
        if task.key not in self._missing or (isinstance(task, Rate) and task.whole):
            self._missing[task.key] = task
        return None
