"""Matrix times a few vectors: the linear layers of a small decode batch.

oneDNN's and MKL's general matrix multiplications cost tens of microseconds before they begin, and
at batch 1 that is most of a small layer. This reads every weight once and nothing else. From a few
rows on their blocking wins; :data:`MOST_ROWS` is where, by measurement.
"""

import functools

import numpy as np
from numba import carray, cfunc

from econoserve.platform.kernels import SOURCES
from econoserve.platform.kernels.launch import WORDS, Kernel
from econoserve.platform.kernels.lowlevel import load, pointer, store, take_next

MOST_ROWS = 4
"""Input vectors up to which this is faster than torch's linear layer."""

_FLOATS = {"contract", "reassoc", "nsz", "arcp"}
_WEIGHTS_PER_ITEM = 65_536
_TAKEN, _ITEMS, _ROWS, _OUTPUTS, _INPUTS, _SOURCE, _WEIGHT, _OUTPUT = range(8)


def linear(
    element: str, rows: int, inputs: int, outputs: int, source: int, weight: int, output: int
) -> None:
    """``output = source @ weight.T``, sums in float32.

    Args:
        element: ``"float32"``, or ``"uint16"`` for bfloat16.
        rows: input vectors.
        inputs: elements of an input vector.
        outputs: elements of an output vector.
        source: address of contiguous [rows, inputs].
        weight: address of contiguous [outputs, inputs].
        output: address of contiguous [rows, outputs], written.
    """
    words = np.zeros(WORDS, np.int64)
    items = max(1, min(outputs // 4, inputs * outputs // _WEIGHTS_PER_ITEM))
    words[_ITEMS : _OUTPUT + 1] = (items, rows, outputs, inputs, source, weight, output)
    _linear(element).run(words, items)


@functools.cache
def _linear(element: str) -> Kernel:
    element_type = np.dtype(element).type

    sources = SOURCES

    @cfunc("void(voidptr)", cache=True, fastmath=_FLOATS, error_model="numpy")
    def multiply(arguments):
        _ = sources
        words = carray(arguments, WORDS, np.int64)
        rows, outputs, inputs = words[_ROWS], words[_OUTPUTS], words[_INPUTS]
        source = carray(pointer(words[_SOURCE]), (rows, inputs), element_type)
        weight = carray(pointer(words[_WEIGHT]), (outputs, inputs), element_type)
        output = carray(pointer(words[_OUTPUT]), (rows, outputs), element_type)
        x = np.empty((rows, inputs), np.float32)
        for row in range(rows):
            for i in range(inputs):
                x[row, i] = load(source[row, i])
        last = outputs - 1
        quads = (outputs + 3) // 4
        while True:
            item = take_next(words, _TAKEN)
            if item >= words[_ITEMS]:
                break
            for quad in range(quads * item // words[_ITEMS], quads * (item + 1) // words[_ITEMS]):
                # Four weights per input element; at the end of the matrix the last row repeats.
                a = 4 * quad
                b = min(a + 1, last)
                c = min(a + 2, last)
                d = min(a + 3, last)
                for row in range(rows):
                    sum_a = np.float32(0)
                    sum_b = np.float32(0)
                    sum_c = np.float32(0)
                    sum_d = np.float32(0)
                    for i in range(inputs):
                        value = x[row, i]
                        sum_a += value * load(weight[a, i])
                        sum_b += value * load(weight[b, i])
                        sum_c += value * load(weight[c, i])
                        sum_d += value * load(weight[d, i])
                    out = output[row]
                    store(out, a, sum_a)
                    store(out, b, sum_b)
                    store(out, c, sum_c)
                    store(out, d, sum_d)

    return Kernel(multiply)
