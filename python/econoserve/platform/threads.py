"""How many threads a scheduler process computes with.

A server is more than its model: the HTTP process, the detokenizer and often the client share the
cores. OpenMP threads wait for each other by spinning at the end of every operator; when one of them
has lost its core to another process, all of them stand still for that process's time slice. So one
core is left to the others. On two cores a busy neighbour costs two threads a factor of ten and one
thread nothing.
"""

import logging
import os

import torch

logger = logging.getLogger(__name__)


def default_threads(cores: int, ranks: int) -> int:
    """Threads for each rank where the user did not say.

    Args:
        cores: cores that this process may run on.
        ranks: scheduler processes on this machine.

    Returns:
        An equal share of all cores but one, at least 1.
    """
    return max(1, (cores - 1) // ranks)


def apply(ranks: int) -> None:
    """Set torch's threads in this process, unless ``OMP_NUM_THREADS`` is set.

    Args:
        ranks: scheduler processes on this machine.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return
    cores = len(os.sched_getaffinity(0))
    threads = default_threads(cores, ranks)
    torch.set_num_threads(threads)
    logger.info(
        "%d of %d cores compute in this process; set OMP_NUM_THREADS for another number",
        threads,
        cores,
    )
