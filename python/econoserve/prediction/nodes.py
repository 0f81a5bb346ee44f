"""Bounded memory of what was experienced under many keys: a histogram of lengths for each.

Owns the histograms, their age, their eviction, and who gave to them. What a key stands for and how
histograms are combined is not its business.
"""

from collections import OrderedDict

import numpy as np

from econoserve.prediction.grid import BUCKETS, PAD, WIDTH, cell
from econoserve.prediction.predictor import State
from econoserve.prediction.shares import ALONE, SHARE, Shares

AGE = 30_000
"""Observations of anybody after which an experience that nobody renewed counts half."""

FRESH = 1000
"""Observations for which that ageing is not worth the time to compute it."""


class Node:
    """What is known under one key.

    Attributes:
        row: of its histogram.
        mass: weight of what it saw, decayed.
        touched: number of the observation that it saw last.
        user: who gave all of it.
        shares: who gave how much, where several did; ``None`` before.
    """

    __slots__ = ("mass", "row", "shares", "touched", "user")

    def __init__(self, row: int, mass: float, touched: int, user: int) -> None:
        self.row = row
        self.mass = mass
        self.touched = touched
        self.user = user
        self.shares: Shares | None = None

    def trust(self, user: int) -> float:
        """See ``Shares.trust``."""
        if self.shares is not None:
            return self.shares.trust(user)
        return 1.0 if self.user == user else SHARE


class Nodes:
    """Histograms by key; the key that was observed least recently gives way.

    Args:
        limit: most keys, at least 64.
    """

    def __init__(self, limit: int) -> None:
        if limit < 64:
            raise ValueError(f"limit={limit}: give 64 nodes or more")
        self.limit = limit
        self.clock = 0
        self._nodes: OrderedDict[int, Node] = OrderedDict()
        # What was seen once has a histogram with a single one in it, and they all share those.
        # All at once: memory is taken page by page as rows are used, and nothing is ever copied.
        size = BUCKETS + limit
        self._counts = np.zeros((size, WIDTH), np.float32)
        self._counts[np.arange(BUCKETS), PAD + np.arange(BUCKETS)] = 1.0
        self._free = list(range(size - 1, BUCKETS - 1, -1))
        # Bound once: it is called for each prefix of each request.
        self.get = self._nodes.get

    def __len__(self) -> int:
        return len(self._nodes)

    def histograms(self, rows: list[int]) -> np.ndarray:
        """Padded histograms; each sums to its node's mass.

        Args:
            rows: of nodes, at least one.

        Returns:
            A copy, a row for each.
        """
        return self._counts[rows]

    def observe(
        self,
        keys: list[tuple[int, float]],
        user: int,
        tokens: int,
        tail: np.ndarray | None = None,
    ) -> None:
        """Add a length under several keys.

        Args:
            keys: each once, and how many observations each remembers; the one seen most often
                first.
            user: who sent the request.
            tokens: the length.
            tail: what the response might have become, if it was cut.
        """
        self.clock += 1
        clock, nodes, at = self.clock, self._nodes, cell(tokens)
        rows, weights, kept = [], [], []
        # Backwards, so that what is most general is evicted last.
        for key, window in reversed(keys):
            node = nodes.get(key)
            if node is None:
                self._create(key, user, at, tail)
                continue
            nodes.move_to_end(key)
            idle = clock - node.touched
            keep = 1.0 if idle < FRESH else 0.5 ** (idle / AGE)
            weight = 1.0
            if node.shares is not None:
                weight = node.shares.weight(user)
            elif node.user != user:
                keep *= min(1.0, ALONE / (node.mass * keep + 1e-9))
                node.shares = Shares(node.user, node.mass * keep)
                weight = node.shares.weight(user)
            keep *= 1.0 - weight / window
            node.touched = clock
            node.mass = node.mass * keep + weight
            if node.row < BUCKETS:
                node.row = self._own_row(node.row)
            rows.append(node.row)
            weights.append(weight)
            kept.append(keep)
        if rows:
            counts = self._counts[rows]
            counts *= np.array(kept, np.float32)[:, None]
            if tail is None:
                counts[:, at] += weights
            else:
                counts += np.array(weights, np.float32)[:, None] * tail
            self._counts[rows] = counts

    def _create(self, key: int, user: int, at: int, tail: np.ndarray | None) -> None:
        if len(self._nodes) >= self.limit:
            _, old = self._nodes.popitem(last=False)
            if old.row >= BUCKETS:
                self._free.append(old.row)
        row = at - PAD
        if tail is not None:
            row = self._own_row(row)
            self._counts[row] = tail
        self._nodes[key] = Node(row, 1.0, self.clock, user)

    def _own_row(self, source: int) -> int:
        row = self._free.pop()
        self._counts[row] = self._counts[source]
        return row

    def state(self) -> State:
        """All nodes.

        Returns:
            Arrays, oldest node first.
        """
        nodes = list(self._nodes.values())
        shared = [
            (number, user, given)
            for number, node in enumerate(nodes)
            if node.shares is not None
            for user, given in node.shares.items()
        ]
        own = [node.row for node in nodes if node.row >= BUCKETS]
        return {
            "clock": self.clock,
            "keys": np.array(list(self._nodes), np.uint64),
            "seen": np.array([min(node.row, BUCKETS) for node in nodes], np.int16),
            "counts": self._counts[own],
            "mass": np.array([node.mass for node in nodes], float),
            "touched": np.array([node.touched for node in nodes], np.int64),
            "users": np.array([node.user for node in nodes], np.uint64),
            "shared": np.array([number for number, _, _ in shared], np.int64),
            "givers": np.array([user for _, user, _ in shared], np.uint64),
            "given": np.array([given for _, _, given in shared], float),
        }

    def restore(self, state: State) -> None:
        """Take over another one's nodes, the newest ones if not all fit.

        Args:
            state: from ``state``.

        Raises:
            ValueError, KeyError, TypeError, IndexError: it is not such a state.
        """
        counts = np.asarray(state["counts"], np.float32)
        if counts.ndim != 2 or counts.shape[1] != WIDTH:
            raise ValueError(f"histograms of shape {counts.shape}: give {WIDTH} columns")
        self.__init__(self.limit)
        self.clock = int(state["clock"])
        columns = [state[name].tolist() for name in ("keys", "seen", "mass", "touched", "users")]
        lengths = [len(column) for column in columns]
        if len(set(lengths)) > 1:
            raise ValueError(f"columns of {lengths} nodes: give one for each")
        shares: dict[int, list[tuple[int, float]]] = {}
        for number, user, given in zip(
            *(state[name].tolist() for name in ("shared", "givers", "given")), strict=True
        ):
            shares.setdefault(number, []).append((user, given))
        source = 0
        skipped = max(len(columns[0]) - self.limit, 0)
        for number, (key, seen, mass, touched, user) in enumerate(zip(*columns, strict=True)):
            source += seen == BUCKETS
            if number < skipped:
                continue
            row = seen
            if seen == BUCKETS:
                row = self._own_row(0)
                self._counts[row] = counts[source - 1]
            node = Node(row, mass, touched, user)
            if number in shares:
                node.shares = Shares.of(shares[number])
            self._nodes[key] = node
