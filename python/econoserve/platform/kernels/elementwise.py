"""The small operators between the matrix multiplications, one pass over memory each.

In plain torch an RMS norm is eight operators and a rotary embedding fourteen, of about 3 us each at
batch 1. Everything is computed in float32 and rounded once.
"""

import functools

import numpy as np
from numba import carray, cfunc

from econoserve.platform.kernels import SOURCES
from econoserve.platform.kernels.launch import WORDS, Kernel
from econoserve.platform.kernels.lowlevel import exp, load, pointer, store, take_next

_FLOATS = {"contract", "reassoc", "nsz", "arcp"}
_ELEMENTS_PER_ITEM = 16_384
"""Work for one thread to take at a time: some microseconds."""

_TAKEN, _ITEMS, _ROWS, _WIDTH = range(4)


def _run(kernel: Kernel, rows: int, width: int, *arguments: int, real: float = 0.0) -> None:
    words = np.zeros(WORDS, np.int64)
    items = max(1, min(rows, rows * width // _ELEMENTS_PER_ITEM))
    words[1 : 4 + len(arguments)] = (items, rows, width, *arguments)
    words.view(np.float64)[-1] = real
    kernel.run(words, items)


def rms_norm(
    element: str,
    rows: int,
    width: int,
    source: int,
    residual: int,
    weight: int,
    output: int,
    epsilon: float,
) -> None:
    """``output = x / sqrt(mean(x**2) + epsilon) * weight`` with ``x = source + residual``.

    Args:
        element: ``"float32"``, or ``"uint16"`` for bfloat16.
        rows: number of vectors.
        width: elements of a vector.
        source: address of contiguous [rows, width].
        residual: address of the same shape, replaced by the sum; 0 for none.
        weight: address of [width].
        output: address of [rows, width], written; may be ``source``.
        epsilon: added to the mean of squares.
    """
    _run(_rms_norm(element), rows, width, source, residual, weight, output, real=epsilon)


@functools.cache
def _rms_norm(element: str) -> Kernel:
    element_type = np.dtype(element).type
    sources = SOURCES

    @cfunc("void(voidptr)", cache=True, fastmath=_FLOATS, error_model="numpy")
    def rms_norm_rows(arguments):
        _ = sources
        words = carray(arguments, WORDS, np.int64)
        epsilon = np.float32(carray(arguments, WORDS, np.float64)[WORDS - 1])
        rows, width = words[_ROWS], words[_WIDTH]
        source = carray(pointer(words[4]), (rows, width), element_type)
        has_residual = words[5] != 0
        residual = carray(pointer(words[5]), (rows, width), element_type)
        weight = carray(pointer(words[6]), width, element_type)
        output = carray(pointer(words[7]), (rows, width), element_type)
        x = np.empty(width, np.float32)
        while True:
            item = take_next(words, _TAKEN)
            if item >= words[_ITEMS]:
                break
            for row in range(rows * item // words[_ITEMS], rows * (item + 1) // words[_ITEMS]):
                for i in range(width):
                    x[i] = load(source[row, i])
                if has_residual:
                    into = residual[row]
                    for i in range(width):
                        x[i] += load(into[i])
                    for i in range(width):
                        store(into, i, x[i])
                squares = np.float32(0)
                for i in range(width):
                    squares += x[i] * x[i]
                factor = np.float32(1) / np.sqrt(squares / np.float32(width) + epsilon)
                out = output[row]
                for i in range(width):
                    store(out, i, x[i] * factor * load(weight[i]))

    return Kernel(rms_norm_rows)


def silu_and_mul(element: str, rows: int, width: int, source: int, output: int) -> None:
    """``output = silu(a) * b`` where each row of the source is ``a`` and ``b`` side by side.

    Args:
        element: ``"float32"``, or ``"uint16"`` for bfloat16.
        rows: number of vectors.
        width: elements of an output vector.
        source: address of contiguous [rows, 2 * width].
        output: address of [rows, width], written.
    """
    _run(_silu_and_mul(element), rows, width, source, output)


@functools.cache
def _silu_and_mul(element: str) -> Kernel:
    element_type = np.dtype(element).type
    sources = SOURCES

    @cfunc("void(voidptr)", cache=True, fastmath=_FLOATS, error_model="numpy")
    def silu_and_mul_rows(arguments):
        _ = sources
        words = carray(arguments, WORDS, np.int64)
        rows, width = words[_ROWS], words[_WIDTH]
        source = carray(pointer(words[4]), (rows, 2, width), element_type)
        output = carray(pointer(words[5]), (rows, width), element_type)
        while True:
            item = take_next(words, _TAKEN)
            if item >= words[_ITEMS]:
                break
            for row in range(rows * item // words[_ITEMS], rows * (item + 1) // words[_ITEMS]):
                out = output[row]
                gate = source[row, 0]
                up = source[row, 1]
                for i in range(width):
                    x = load(gate[i])
                    store(out, i, x / (np.float32(1) + exp(-x)) * load(up[i]))

    return Kernel(silu_and_mul_rows)


def rotate(
    element: str,
    interleaved: bool,
    tokens: int,
    positions: int,
    table: int,
    table_rows: int,
    rotary_dim: int,
    head_dim: int,
    vectors: tuple[tuple[int, int, int], ...],
) -> None:
    """Rotary position embedding in place.

    Args:
        element: ``"float32"``, or ``"uint16"`` for bfloat16; of vectors and table.
        interleaved: pairs are neighbours (GPT-J); else halves of the head (NeoX).
        tokens: number of tokens.
        positions: address of int64 [tokens].
        table: address of [table_rows, rotary_dim]: cosines, then sines, by position.
        table_rows: positions in the table.
        rotary_dim: leading elements of a head that are rotated.
        head_dim: elements of a head.
        vectors: (address, elements from token to token, heads) of queries and of keys.
    """
    for address, stride, heads in vectors:
        _run(
            _rotate(element, interleaved),
            tokens,
            heads * head_dim,
            address,
            stride,
            positions,
            table,
            table_rows,
            rotary_dim,
            head_dim,
        )


@functools.cache
def _rotate(element: str, interleaved: bool) -> Kernel:
    element_type = np.dtype(element).type
    sources = SOURCES

    @cfunc("void(voidptr)", cache=True, fastmath=_FLOATS, error_model="numpy")
    def rotate_rows(arguments):
        _ = sources
        words = carray(arguments, WORDS, np.int64)
        tokens, width = words[_ROWS], words[_WIDTH]
        stride = words[5]
        rotary_dim, head_dim = words[9], words[10]
        half = rotary_dim // 2
        vectors = carray(pointer(words[4]), tokens * stride, element_type)
        positions = carray(pointer(words[6]), tokens, np.int64)
        table = carray(pointer(words[7]), (words[8], 2, half), element_type)
        while True:
            item = take_next(words, _TAKEN)
            if item >= words[_ITEMS]:
                break
            first = tokens * item // words[_ITEMS]
            last = tokens * (item + 1) // words[_ITEMS]
            for token in range(first, last):
                cosines = table[positions[token], 0]
                sines = table[positions[token], 1]
                for at in range(token * stride, token * stride + width, head_dim):
                    head = vectors[at : at + rotary_dim]
                    if interleaved:
                        for i in range(half):
                            a = load(head[2 * i])
                            b = load(head[2 * i + 1])
                            c = load(cosines[i])
                            s = load(sines[i])
                            store(head, 2 * i, a * c - b * s)
                            store(head, 2 * i + 1, b * c + a * s)
                    else:
                        low = head[:half]
                        high = head[half:]
                        for i in range(half):
                            a = load(low[i])
                            b = load(high[i])
                            c = load(cosines[i])
                            s = load(sines[i])
                            store(low, i, a * c - b * s)
                            store(high, i, b * c + a * s)

    return Kernel(rotate_rows)
