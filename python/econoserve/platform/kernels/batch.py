"""What an attention kernel works on: a batch cut into work items, a KV pool, element types."""

from dataclasses import dataclass

import numpy as np

TILE_QUERIES = 32
"""Most query tokens of one work item."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass attends to; the same for all layers.

    Attributes:
        rows: row of each request in the table of slots; int64, shape [requests].
        lengths: tokens of each request's context, its query tokens included; int64, [requests].
        offsets: index of each request's first query token, and their total at the end; int64,
            [requests + 1].
        item_request: request of each work item; int64, [items].
        item_first: first query token of each work item within its request; int64, [items].
        least_items: work items that there are at any time; fewer than ``items`` only in a batch
            that takes the contents of others.
    """

    rows: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    item_request: np.ndarray
    item_first: np.ndarray
    least_items: int

    @classmethod
    def of(cls, rows: np.ndarray, lengths: np.ndarray, queries: np.ndarray | None) -> "Batch":
        """Cut a batch into work items.

        Args:
            rows: as the attribute.
            lengths: as the attribute.
            queries: query tokens of each request, int64, [requests]; None means one each.

        Returns:
            The batch.
        """
        count = len(rows)
        if queries is None:
            requests = np.arange(count + 1, dtype=np.int64)
            return cls(rows, lengths, requests, requests[:count], np.zeros(count, np.int64), count)
        offsets = np.zeros(count + 1, np.int64)
        np.cumsum(queries, out=offsets[1:])
        tiles = -(-queries // TILE_QUERIES)
        item_request = np.repeat(np.arange(count, dtype=np.int64), tiles)
        first_item = np.repeat(np.cumsum(tiles) - tiles, tiles)
        item_first = (np.arange(len(item_request)) - first_item) * TILE_QUERIES
        return cls(rows, lengths, offsets, item_request, item_first, len(item_request))

    @classmethod
    def with_room(cls, tokens: int) -> "Batch":
        """A batch for the contents of others, always at the same addresses.

        Args:
            tokens: query tokens that it has room for, however they are spread over requests.

        Returns:
            A batch of requests without query tokens, of which the last stays that.
        """
        requests, items = (np.zeros(count, np.int64) for count in (tokens + 1, tokens))
        return cls(
            requests,
            requests.copy(),
            np.zeros(tokens + 2, np.int64),
            items,
            items.copy(),
            tokens // TILE_QUERIES,
        )

    def take(self, other: "Batch") -> None:
        """Become another batch; what there is room for beyond it has no query tokens.

        Args:
            other: has no more query tokens than there is room for.
        """
        requests, items = len(other.rows), len(other.item_request)
        self.rows[:requests], self.rows[requests:] = other.rows, 0
        self.lengths[:requests], self.lengths[requests:] = other.lengths, 0
        self.offsets[: requests + 1] = other.offsets
        self.offsets[requests + 1 :] = other.offsets[-1]
        self.item_request[:items] = other.item_request
        self.item_request[items:] = len(self.rows) - 1
        self.item_first[:items], self.item_first[items:] = other.item_first, 0


@dataclass(frozen=True, slots=True)
class Shape:
    """What a kernel is compiled for.

    Attributes:
        head_dim: elements of one head.
        group: query heads per KV head.
        query: element type of queries and outputs, ``"float32"`` or ``"uint16"`` for bfloat16.
        pool: element type of the KV pool, likewise.
    """

    head_dim: int
    group: int
    query: str
    pool: str


@dataclass(frozen=True, slots=True)
class Pool:
    """The KV cache of one layer and where each request's tokens lie in it.

    Attributes:
        keys: address of [slots, kv_heads, head_dim].
        values: address of an array of the same shape.
        slots: slots in the pool.
        kv_heads: heads of keys and values.
        table: address of int32 [table_rows, table_stride], the slot of each token of each row.
        table_stride: entries per row.
        table_rows: rows.
    """

    keys: int
    values: int
    slots: int
    kv_heads: int
    table: int
    table_stride: int
    table_rows: int
