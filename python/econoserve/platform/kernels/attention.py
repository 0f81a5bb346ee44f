"""Causal attention over a token-level KV pool, for decode, extend and mixed batches alike.

A batch is a list of requests with one or more query tokens each, the last tokens of their context.
The work is cut into items of at most :data:`TILE_QUERIES` query tokens of one request. An item with
few query rows reads every key and value once, where it lies (decode is bound by memory). An item
with many gathers :data:`TILE_KEYS` keys and values at a time, keys transposed, so that the
multiplications run over contiguous floats (extend is bound by compute); its softmax is the usual
online one. Sums are float32, whatever the pool holds.
"""

import functools

import numpy as np
from numba import carray, cfunc, njit

from econoserve.platform.kernels import SOURCES
from econoserve.platform.kernels.batch import TILE_QUERIES, Batch, Pool, Shape
from econoserve.platform.kernels.launch import WORDS, Kernel
from econoserve.platform.kernels.lowlevel import exp, load, pointer, prefetch, store, take_next

TILE_KEYS = 64
_FEW_ROWS = 4
"""Query rows (query tokens times heads per KV head) up to which keys are not gathered first."""
_AHEAD = 8
"""Tokens between the one that is read and the one that is prefetched."""
_LINE_ELEMENTS = 16
"""Elements per prefetch: a cache line of float32."""

# NaN and infinities must stay what they are, so this is not all of fastmath.
_FLOATS = {"contract", "reassoc", "nsz", "arcp"}
_LEAST = np.float32(-1e30)

(
    _TAKEN,
    _ITEMS,
    _QUERY,
    _QUERY_STRIDE,
    _OUTPUT,
    _KEYS,
    _VALUES,
    _SLOTS,
    _TABLE,
    _TABLE_STRIDE,
    _TABLE_ROWS,
    _REQUESTS,
    _ROWS,
    _LENGTHS,
    _OFFSETS,
    _ITEM_REQUEST,
    _ITEM_FIRST,
    _KV_HEADS,
    _HEAD_PARTS,
    _SCALE,
) = range(20)


def attend(
    shape: Shape,
    pool: Pool,
    batch: Batch,
    query: int,
    query_stride: int,
    output: int,
    scale: float,
    parts: int,
) -> None:
    """Compute attention for every query token of a batch.

    Args:
        shape: element types and head sizes.
        pool: one layer's KV cache; the batch's own tokens must be in it.
        batch: the requests.
        query: address of [query tokens, query heads, head_dim], one token contiguous.
        query_stride: elements from one query token to the next.
        output: address of contiguous [query tokens, query heads, head_dim]; written.
        scale: factor for the products of queries and keys.
        parts: 1, or a divisor of the KV heads to share the heads of one item among threads.
    """
    words = np.zeros(WORDS, np.int64)
    items = len(batch.item_request) * parts
    words[_ITEMS : _HEAD_PARTS + 1] = (
        items,
        query,
        query_stride,
        output,
        pool.keys,
        pool.values,
        pool.slots,
        pool.table,
        pool.table_stride,
        pool.table_rows,
        len(batch.rows),
        batch.rows.ctypes.data,
        batch.lengths.ctypes.data,
        batch.offsets.ctypes.data,
        batch.item_request.ctypes.data,
        batch.item_first.ctypes.data,
        pool.kv_heads,
        parts,
    )
    words.view(np.float64)[_SCALE] = scale
    kernel(shape).run(words, items)


# Every array is indexed by loop variables in its last dimension: Numba then knows that the
# index is not negative, and LLVM vectorises the loop.


@njit(fastmath=_FLOATS, error_model="numpy", inline="always")
def _fetch(pool, slot, head, heads, head_dim):
    for h in range(head, head + heads):
        for e in range(0, head_dim, _LINE_ELEMENTS):
            prefetch(pool, slot, h, e)


@njit(fastmath=_FLOATS, error_model="numpy", inline="always")
def _attend_row(
    query, output, keys, values, slots, length, head, heads, scale, head_dim, group
):  # fmt: skip
    """One query token against the tokens in `slots`, for `heads` KV heads from `head` on."""
    rows = heads * group
    q = np.empty((rows, head_dim), np.float32)
    total = np.zeros((rows, head_dim), np.float32)
    weight = np.empty((rows, length + 3), np.float32)
    for row in range(rows):
        for e in range(head_dim):
            q[row, e] = load(query[head * group + row, e]) * scale
    last = length - 1
    # Four tokens at a time: a query element is loaded once for four products.
    for t in range(0, length, 4):
        a = np.int64(slots[t])
        b = np.int64(slots[min(t + 1, last)])
        c = np.int64(slots[min(t + 2, last)])
        d = np.int64(slots[min(t + 3, last)])
        for u in range(t + _AHEAD, t + _AHEAD + 4):
            _fetch(keys, np.int64(slots[min(u, last)]), head, heads, head_dim)
        for h in range(heads):
            for g in range(group):
                row = h * group + g
                sum_a = np.float32(0)
                sum_b = np.float32(0)
                sum_c = np.float32(0)
                sum_d = np.float32(0)
                for e in range(head_dim):
                    x = q[row, e]
                    sum_a += x * load(keys[a, head + h, e])
                    sum_b += x * load(keys[b, head + h, e])
                    sum_c += x * load(keys[c, head + h, e])
                    sum_d += x * load(keys[d, head + h, e])
                weight[row, t] = sum_a
                weight[row, t + 1] = sum_b
                weight[row, t + 2] = sum_c
                weight[row, t + 3] = sum_d
    for row in range(rows):
        top = _LEAST
        for t in range(length):
            top = max(top, weight[row, t])
        norm = np.float32(0)
        for t in range(length):
            x = exp(weight[row, t] - top)
            weight[row, t] = x
            norm += x
        norm = np.float32(1) / norm
        for t in range(length):
            weight[row, t] *= norm
        for t in range(length, length + 3):
            weight[row, t] = np.float32(0)
    for t in range(0, length, 4):
        a = np.int64(slots[t])
        b = np.int64(slots[min(t + 1, last)])
        c = np.int64(slots[min(t + 2, last)])
        d = np.int64(slots[min(t + 3, last)])
        for u in range(t + _AHEAD, t + _AHEAD + 4):
            _fetch(values, np.int64(slots[min(u, last)]), head, heads, head_dim)
        for h in range(heads):
            for g in range(group):
                row = h * group + g
                weight_a = weight[row, t]
                weight_b = weight[row, t + 1]
                weight_c = weight[row, t + 2]
                weight_d = weight[row, t + 3]
                for e in range(head_dim):
                    total[row, e] += (
                        weight_a * load(values[a, head + h, e])
                        + weight_b * load(values[b, head + h, e])
                        + weight_c * load(values[c, head + h, e])
                        + weight_d * load(values[d, head + h, e])
                    )
    for row in range(rows):
        for e in range(head_dim):
            store(output, (head * group + row) * head_dim + e, total[row, e])


@njit(fastmath=_FLOATS, error_model="numpy", inline="always")
def _attend_tile(
    query, output, keys, values, slots, before, count, head, scale, head_dim, group
):  # fmt: skip
    """`count` query tokens that follow `before` tokens, for one KV head."""
    rows = count * group
    padded = (rows + 3) // 4 * 4
    q = np.zeros((padded, head_dim), np.float32)
    total = np.zeros((padded, head_dim), np.float32)
    weight = np.empty((4, TILE_KEYS), np.float32)
    top = np.full(padded, _LEAST, np.float32)
    norm = np.zeros(padded, np.float32)
    key_tile = np.zeros((head_dim, TILE_KEYS), np.float32)
    value_tile = np.zeros((TILE_KEYS, head_dim), np.float32)
    for row in range(rows):
        for e in range(head_dim):
            q[row, e] = load(query[row // group, head * group + row % group, e]) * scale
    length = before + count
    for first in range(0, length, TILE_KEYS):
        tokens = min(TILE_KEYS, length - first)
        for t in range(tokens):
            slot = np.int64(slots[first + t])
            for e in range(head_dim):
                key_tile[e, t] = load(keys[slot, head, e])
            for e in range(head_dim):
                value_tile[t, e] = load(values[slot, head, e])
        # Columns past the last token of the context are left over from the tile before or
        # zero; their weights are zero.
        for block in range(0, padded, 4):
            if before + min(block + 3, rows - 1) // group < first:
                continue
            # Four rows at a time: a key or value is loaded once for four products.
            for t in range(TILE_KEYS):
                weight[0, t] = np.float32(0)
                weight[1, t] = np.float32(0)
                weight[2, t] = np.float32(0)
                weight[3, t] = np.float32(0)
            for e in range(0, head_dim, 2):
                a0, a1 = q[block, e], q[block, e + 1]
                b0, b1 = q[block + 1, e], q[block + 1, e + 1]
                c0, c1 = q[block + 2, e], q[block + 2, e + 1]
                d0, d1 = q[block + 3, e], q[block + 3, e + 1]
                for t in range(TILE_KEYS):
                    x = key_tile[e, t]
                    y = key_tile[e + 1, t]
                    weight[0, t] += a0 * x + a1 * y
                    weight[1, t] += b0 * x + b1 * y
                    weight[2, t] += c0 * x + c1 * y
                    weight[3, t] += d0 * x + d1 * y
            most = 0
            for i in range(4):
                row = block + i
                seen = min(before + row // group + 1 - first, tokens)
                if row >= rows or seen < 0:
                    seen = 0
                most = max(most, seen)
                w = weight[i]
                highest = top[row]
                for t in range(seen):
                    highest = max(highest, w[t])
                shrink = exp(top[row] - highest)
                top[row] = highest
                for t in range(TILE_KEYS):
                    w[t] = exp(w[t] - highest)
                for t in range(seen, TILE_KEYS):
                    w[t] = np.float32(0)
                sum_of_weights = np.float32(0)
                for t in range(TILE_KEYS):
                    sum_of_weights += w[t]
                norm[row] = norm[row] * shrink + sum_of_weights
                for e in range(head_dim):
                    total[row, e] *= shrink
            for t in range(0, most, 2):
                a0, a1 = weight[0, t], weight[0, t + 1]
                b0, b1 = weight[1, t], weight[1, t + 1]
                c0, c1 = weight[2, t], weight[2, t + 1]
                d0, d1 = weight[3, t], weight[3, t + 1]
                for e in range(head_dim):
                    x = value_tile[t, e]
                    y = value_tile[t + 1, e]
                    total[block, e] += a0 * x + a1 * y
                    total[block + 1, e] += b0 * x + b1 * y
                    total[block + 2, e] += c0 * x + c1 * y
                    total[block + 3, e] += d0 * x + d1 * y
    heads = output.shape[0] // count // head_dim
    for row in range(rows):
        at = (row // group * heads + head * group + row % group) * head_dim
        factor = np.float32(1) / norm[row]
        for e in range(head_dim):
            store(output, at + e, total[row, e] * factor)


@functools.cache
def kernel(shape: Shape) -> Kernel:
    """The kernel for a shape, compiled on first use or read from Numba's cache on disk.

    Args:
        shape: what to compile for.

    Returns:
        The kernel; its arguments are as :func:`attend` writes them.
    """
    head_dim, group = shape.head_dim, shape.group
    query_type = np.dtype(shape.query).type
    pool_type = np.dtype(shape.pool).type

    sources = SOURCES

    @cfunc("void(voidptr)", cache=True, fastmath=_FLOATS, error_model="numpy")
    def team_member(arguments):
        _ = sources
        words = carray(arguments, WORDS, np.int64)
        kv_heads = words[_KV_HEADS]
        heads = kv_heads * group
        q_stride = words[_QUERY_STRIDE]
        requests = words[_REQUESTS]
        parts = words[_HEAD_PARTS]
        items = words[_ITEMS]
        scale = np.float32(carray(arguments, WORDS, np.float64)[_SCALE])
        rows = carray(pointer(words[_ROWS]), requests, np.int64)
        lengths = carray(pointer(words[_LENGTHS]), requests, np.int64)
        offsets = carray(pointer(words[_OFFSETS]), requests + 1, np.int64)
        item_request = carray(pointer(words[_ITEM_REQUEST]), items // parts, np.int64)
        item_first = carray(pointer(words[_ITEM_FIRST]), items // parts, np.int64)
        pool_shape = (words[_SLOTS], kv_heads, head_dim)
        keys = carray(pointer(words[_KEYS]), pool_shape, pool_type)
        values = carray(pointer(words[_VALUES]), pool_shape, pool_type)
        queries = carray(pointer(words[_QUERY]), offsets[requests] * q_stride, query_type)
        outputs = carray(pointer(words[_OUTPUT]), (offsets[requests], heads * head_dim), query_type)
        table = carray(pointer(words[_TABLE]), (words[_TABLE_ROWS], words[_TABLE_STRIDE]), np.int32)
        part_heads = kv_heads // parts
        while True:
            taken = take_next(words, _TAKEN)
            if taken >= items:
                break
            item = taken // parts
            head = taken % parts * part_heads
            request = item_request[item]
            first = item_first[item]
            total = offsets[request + 1] - offsets[request]
            count = min(total - first, TILE_QUERIES)
            before = lengths[request] - total + first
            slots = table[rows[request]]
            token = offsets[request] + first
            if count == 1 or count * group <= _FEW_ROWS:
                for i in range(count):
                    at = (token + i) * q_stride
                    query = queries[at : at + heads * head_dim].reshape((heads, head_dim))
                    _attend_row(
                        query, outputs[token + i], keys, values, slots, before + i + 1, head,
                        part_heads, scale, head_dim, group,
                    )  # fmt: skip
                continue
            tile = np.empty((count, heads, head_dim), query_type)
            for i in range(count):
                at = (token + i) * q_stride
                tile[i] = queries[at : at + heads * head_dim].reshape((heads, head_dim))
            output = outputs[token : token + count].reshape(count * heads * head_dim)
            for h in range(head, head + part_heads):
                _attend_tile(
                    tile, output, keys, values, slots, before, count, h, scale, head_dim, group
                )  # fmt: skip

    return Kernel(team_member)
