"""The requests of a setting, as its runs see them."""

from benchmark.paper.grid import Cell, Paper
from econoserve.sim.profile import load_profile
from econoserve.workload.trace import TraceRequest
from econoserve.workload.workload import WorkloadSpec, make_workload

REQUESTS = 10_000
"""Requests from which the worth of giving some up is computed."""


def requests_of(paper: Paper, cell: Cell) -> list[TraceRequest]:
    """The requests of a setting.

    Args:
        paper: the trial.
        cell: the setting.

    Returns:
        The first ones of its workload.
    """
    profile = load_profile(cell.hardware, cell.model)
    context_tokens = min(profile.context_tokens, profile.memory.capacity_tokens - 1)
    spec = WorkloadSpec(paper.trace(cell), 1.0, REQUESTS, seed=paper.seed)
    return make_workload(spec, context_tokens).requests
