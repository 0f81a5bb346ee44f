"""What has to be run next, most important first.

Owns the order: all settings get the runs of a stage before any gets those of the next.
"""

from collections.abc import Callable, Mapping, Sequence

from benchmark.paper.grid import (
    ABLATION,
    DISTSERVE_HARDWARE,
    EXACT,
    FIRST,
    PEERS,
    PREDICTED,
    SYSTEMS,
    VARIANTS,
    VLLM_2023,
    Cell,
    Paper,
)
from benchmark.paper.known import Known
from benchmark.paper.tasks import Task
from econoserve.sim.profile import load_profile


def best_peer(known: Known, cell: Cell) -> tuple[str, float] | None:
    """The peer with the highest capacity.

    Args:
        known: what is known.
        cell: where.

    Returns:
        The peer, of equals the first of ``PEERS``, and its rate; ``None`` while one of them is not
        known.
    """
    found = [(peer, known.capacity(cell, peer)) for peer in PEERS]
    rates = {peer: capacity.rate_rps for peer, capacity in found if capacity is not None}
    if len(rates) < len(PEERS):
        return None
    best = max(rates, key=lambda peer: rates[peer])
    return best, rates[best]


def ablated(cells: Sequence[Cell]) -> list[Cell]:
    """Where the variants are compared.

    Args:
        cells: the settings of the trial.

    Returns:
        Those of ``ABLATION``; all, if none of them is among the settings.
    """
    return [cell for cell in cells if cell.name in ABLATION] or list(cells)


def placed(cells: Sequence[Cell]) -> list[Cell]:
    """Where DistServe is compared.

    Args:
        cells: the settings of the trial.

    Returns:
        Those whose hardware has times with several GPUs.
    """
    return [cell for cell in cells if cell.hardware == DISTSERVE_HARDWARE]


def tensors(paper: Paper, cell: Cell) -> list[int]:
    """On how many GPUs with tensor parallelism ``plus`` is tried against DistServe.

    Args:
        paper: the trial.
        cell: where.

    Returns:
        Numbers of GPUs that the profile knows, other than its own, within the limit of the
        placements; 3 is left out, which divides no node evenly.
    """
    profile = load_profile(cell.hardware, cell.model)
    own = profile.memory.gpus
    return [n for n in profile.tensor_choices if n not in (own, 3) and n <= paper.scale.gpus]


def ask_capacities(known: Known) -> None:
    """Capacities of all policies, and ``plus`` at the rate that the best peer sustains."""
    cells = known.paper.cells
    for policy in (FIRST, "plus", *(peer for peer in PEERS if peer != FIRST), VLLM_2023):
        for cell in cells:
            known.capacity(cell, policy)
    for cell in cells:
        best = best_peer(known, cell)
        if best is not None and best[1]:
            known.run(cell, "plus", best[1])
            known.run(cell, "plus", best[1], EXACT)
    for cell in cells:
        known.capacity(cell, "plus", EXACT)
    for cell in cells:
        known.alone(cell)


def ask_sweep(known: Known) -> None:
    """Runs at fixed fractions of the capacity of vLLM of 2023."""
    for policy, predictor in ((VLLM_2023, PREDICTED), *SYSTEMS):
        for cell in known.paper.cells:
            known.sweep(cell, policy, predictor)


def ask_placements(known: Known) -> None:
    """DistServe's best placements, and ``plus`` on as many GPUs."""
    for cell in placed(known.paper.cells):
        known.placement(cell)
    for cell in placed(known.paper.cells):
        for tensor in tensors(known.paper, cell):
            known.capacity(cell, "plus", tensor=tensor)


def ask_ablation(known: Known) -> None:
    """Capacities of EconoServe's variants."""
    for policy in VARIANTS:
        for cell in ablated(known.paper.cells):
            known.capacity(cell, policy)
    for policy in ("plus", "full"):
        for cell in ablated(known.paper.cells):
            known.capacity(cell, policy, EXACT)


STAGES: Mapping[str, Callable[[Known], None]] = {
    "capacity": ask_capacities,
    "sweep": ask_sweep,
    "distserve": ask_placements,
    "ablation": ask_ablation,
}
"""By name, most important first."""


def needed(known: Known, stages: Sequence[str]) -> list[Task]:
    """What has to be run next.

    Args:
        known: what is known.
        stages: names of ``STAGES``.

    Returns:
        Runs that do not wait for each other, most important first; none if all is done.
    """
    known.forget_missing()
    for stage, ask in STAGES.items():
        if stage in stages:
            ask(known)
    return known.missing
