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
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch

logger = logging.getLogger(__name__)

WORDS = 24
"""Size of a kernel's arguments."""


@functools.cache
def _open_mp() -> Callable | None:
    """``GOMP_parallel`` of the OpenMP runtime in this process, or None without one."""
    # torch's wheels load libgomp; a torch built with Intel's or LLVM's runtime exports the same
    # entry point from there.
    for library in ("libgomp.so.1", "libiomp5.so", "libomp.so"):
        try:
            handle = ctypes.CDLL(library, mode=ctypes.DEFAULT_MODE | _no_load())
            run = handle.GOMP_parallel
        except (OSError, AttributeError):
            continue
        run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        run.restype = None
        return run
    logger.warning("no OpenMP runtime with GOMP_parallel is loaded: CPU kernels use one thread")
    return None


def _no_load() -> int:
    return getattr(os, "RTLD_NOLOAD", 0)


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
        """Run to the end, on as many threads as torch uses and the work can keep busy.

        Args:
            arguments: ``WORDS`` int64; word 0 is overwritten.
            items: pieces of work that can run at the same time.
        """
        if _observer is not None:
            _observer(self, arguments, items)
        arguments[0] = 0
        threads = min(torch.get_num_threads(), items)
        open_mp = _open_mp() if threads > 1 else None
        if open_mp is None:
            self._call(arguments.ctypes.data)
        else:
            open_mp(self._address, arguments.ctypes.data, threads, 0)
