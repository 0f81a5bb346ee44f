"""What Numba lacks for these kernels: bfloat16, a vectorisable exp, prefetch, atomic counters.

A kernel is written once for float32 and bfloat16: :func:`load` and :func:`store` choose the
conversion from the array's element type when Numba compiles it. bfloat16 is held as ``uint16``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array

_INT32 = ir.IntType(32)


@intrinsic
def pointer(typing_context, address):
    """The memory at an integer address, for ``numba.carray``."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def _float_from_bits(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits_of_float(typing_context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _INT32)

    return types.uint32(types.float32), generate


@intrinsic
def take_next(typing_context, counters, index):
    """Add one to ``counters[index]``, seen by all threads; returns the value before."""

    def generate(context, builder, signature, arguments):
        array = make_array(signature.args[0])(context, builder, arguments[0])
        address = cgutils.get_item_pointer(
            context, builder, signature.args[0], array, [arguments[1]], wraparound=False
        )
        return builder.atomic_rmw("add", address, ir.IntType(64)(1), "monotonic")

    return types.int64(counters, types.int64), generate


@intrinsic
def prefetch(typing_context, array, first, second, third):
    """Ask for the cache line of ``array[first, second, third]`` before it is needed."""

    def generate(context, builder, signature, arguments):
        view = make_array(signature.args[0])(context, builder, arguments[0])
        address = cgutils.get_item_pointer(
            context, builder, signature.args[0], view, list(arguments[1:]), wraparound=False
        )
        any_pointer = ir.IntType(8).as_pointer()
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [any_pointer] + [_INT32] * 3),
            "llvm.prefetch.p0",
        )
        read, keep_in_all_caches, data = _INT32(0), _INT32(3), _INT32(1)
        builder.call(
            function,
            [builder.bitcast(address, any_pointer), read, keep_in_all_caches, data],
        )
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, types.int64), generate


def load(value: Any) -> np.float32:
    """An element as float32; ``uint16`` is taken as bfloat16. Only inside kernels."""
    raise NotImplementedError("load is only callable from a compiled kernel")


@overload(load, inline="always")
def _load(value) -> Callable:
    if value == types.uint16:
        return lambda value: _float_from_bits(np.uint32(value) << np.uint32(16))
    return lambda value: value


def store(array: Any, index: int, value: np.float32) -> None:
    """Write a float32 into a flat array, rounded to nearest even for bfloat16. Only in kernels."""
    raise NotImplementedError("store is only callable from a compiled kernel")


@overload(store, inline="always")
def _store(array, index, value) -> Callable:
    if array.dtype == types.uint16:

        def store_bfloat16(array, index, value):
            bits = _bits_of_float(value)
            round_up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            array[index] = np.uint16((bits + round_up) >> np.uint32(16))

        return store_bfloat16

    def store_float32(array, index, value):
        array[index] = value

    return store_float32


@njit(inline="always", fastmath=True)
def exp(x):
    """``e**x`` for float32, within 2 units in the last place; 1e-38 below -87.

    2**n times a polynomial for 2**f with f in [-0.5, 0.5]; the coefficients are the Taylor series'
    of 2**f. Without a branch or a call, so that LLVM computes 8 or 16 at a time.
    """
    y = min(max(x, np.float32(-87.3)), np.float32(88.0)) * np.float32(1.4426950408889634)
    whole = np.floor(y + np.float32(0.5))
    f = y - whole
    p = np.float32(1.540353039338161e-4)
    p = p * f + np.float32(1.333355814642844e-3)
    p = p * f + np.float32(9.618129107628477e-3)
    p = p * f + np.float32(5.550410866482158e-2)
    p = p * f + np.float32(2.402265069591007e-1)
    p = p * f + np.float32(6.931471805599453e-1)
    p = p * f + np.float32(1.0)
    exponent = np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23)
    return p * _float_from_bits(exponent)
