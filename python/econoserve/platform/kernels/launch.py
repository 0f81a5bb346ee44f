"""Runs kernels, on one thread or on all of torch's OpenMP threads.

Numba's own thread pools would be a second set of threads beside torch's, and the two would take the
cores from each other between any two operators. So a kernel is a plain C function of one pointer,
and more than one thread comes from ``GOMP_parallel`` of the OpenMP runtime that torch has loaded:
the same threads that ran the operator before.

A kernel's arguments are 64-bit words: addresses, sizes, and the bits of doubles. Word 0 counts the
work that is taken; each thread takes the next item until none is left.
"""

import contextlib
import ctypes
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

logger = logging.getLogger(__name__)

WORDS = 24
"""Size of a kernel's arguments."""


@functools.cache
def _open_mp() -> Callable | None:
    """``GOMP_parallel`` of the OpenMP runtime that torch uses, or None if it has none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        run = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        logger.warning("torch's OpenMP runtime has no GOMP_parallel: CPU kernels use one thread")
        return None
    run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    run.restype = None
    return run


_observer: "Callable[[Kernel, np.ndarray, int], None] | None" = None


@contextlib.contextmanager
def observed(observer: "Callable[[Kernel, np.ndarray, int], None]") -> Iterator[None]:
    """Tell of every kernel that runs in the block, before it runs.

    Args:
        observer: is called with the arguments of ``Kernel.run``.
    """
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


class Kernel:
    """A compiled kernel.

    Args:
        compiled: result of ``numba.cfunc("void(voidptr)")``.
    """

    __slots__ = ("_address", "_call", "_keep")

    def __init__(self, compiled: object) -> None:
        self._keep = compiled
        self._address = compiled.address
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)

    def run(self, arguments: np.ndarray, items: int) -> None:
        """Run to the end, on torch's threads if there is more than one piece of work.

        Args:
            arguments: ``WORDS`` int64; word 0 is overwritten.
            items: pieces of work that can run at the same time.
        """
        if _observer is not None:
            _observer(self, arguments, items)
        arguments[0] = 0
        # Always torch's whole team: libgomp ends threads that a smaller team has no use for, and
        # makes them anew for the next operator.
        threads = torch.get_num_threads() if items > 1 else 1
        open_mp = _open_mp() if threads > 1 else None
        if open_mp is None:
            self._call(arguments.ctypes.data)
        else:
            open_mp(self._address, arguments.ctypes.data, threads, 0)
