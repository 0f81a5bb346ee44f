"""Predicts a response's length from those of requests that looked alike.

Owns what was experienced with all requests, with such limits, with prompts of such a length, with a
user, and under each hashed prefix of prompts; and how they are combined. Requests that share a
system prompt, a template or a conversation share its experience; the more specific one is mixed
into the more general one as far as it has proved worth it.
"""

import math
from operator import itemgetter

import numpy as np

from econoserve.core.lengths import LengthPrediction
from econoserve.prediction import grid
from econoserve.prediction.mixing import Mixing
from econoserve.prediction.nodes import AGE, FRESH, Node, Nodes
from econoserve.prediction.predictor import State
from econoserve.prediction.request import RequestFeatures, mixed

NODES = 65_536
"""Keys remembered. With histograms of 512 bytes at most 32 MB, and some 200 bytes each."""

PREFIXES = 3
"""Most prefixes whose experience is read for one prediction."""

DISTINCT = 1.3
"""A shorter prefix is read, too, if it saw so many times as much."""

ALIKE = 0.97
"""A form that saw this share of everything is not read."""

GROWTH = 2
"""Prefixes that an observation adds below the known ones."""

LONGEST = 3
"""And so many of the prompt's longest: for the next turn of a conversation."""

WINDOW = 1000.0
"""Observations after which an experience has forgotten most of what it knew."""

RECENTLY = 50.0
"""The same for what a user does at the moment."""

ALL, FORM, LENGTH, USER, RECENT, PART, MOST = range(7)
"""Kinds of experience; of prefixes those of a part of the prompt, and of most of it."""

ORDERED = {ALL: -4e18, FORM: -3e18, LENGTH: -2e18, RECENT: 0.0}
"""Places of those that are not ordered by how much they saw; 0: that of the one before."""

SETTLED = 2000
"""Observations after which only every fourth is used to judge what to believe: it takes time."""


# Fingerprints are random enough; a salt keeps the kinds apart.
_SALT = [mixed(kind, 1) for kind in range(MOST + 1)]
_ROOT = _SALT[ALL]
_BITS = (1 << 64) - 1
_Contexts = list[tuple[int, int, float]]


class PrefixTree:
    """The predictor ``prefix-tree``.

    Args:
        level: probability that a claim should cover, in (0, 1].
        prior_tokens: mean RL assumed until responses have ended, at least 1.
        nodes: most keys to remember.
    """

    def __init__(self, level: float, prior_tokens: int = 256, nodes: int = NODES) -> None:
        if not 0.0 < level <= 1.0:
            raise ValueError(f"level={level}: give a probability in (0, 1]")
        if prior_tokens < 1:
            raise ValueError(f"prior_tokens={prior_tokens}: give 1 token or more")
        self.level = level
        self._prior = grid.prior(prior_tokens)
        self._nodes = Nodes(nodes)
        self._mixing = Mixing(MOST + 1)

    def __len__(self) -> int:
        return len(self._nodes)

    def predict(self, features: RequestFeatures) -> LengthPrediction:
        """See ``Predictor.predict``."""
        return self.predict_at(features, grid.LEVELS)

    def predict_at(self, features: RequestFeatures, levels: np.ndarray) -> LengthPrediction:
        """See ``Graded.predict_at``."""
        return grid.prediction(self.density(features), levels, self.level, features.cap_tokens)

    def density(self, features: RequestFeatures) -> np.ndarray:
        """What it predicts, as a histogram.

        Args:
            features: the request.

        Returns:
            A padded histogram that sums to about 1.
        """
        chain = self._chain(features, self._contexts(features))
        if not chain:
            return self._prior
        raws, narrows, wides, rows = [], [], [], []
        weights_of, rest = self._mixing.weights, 1.0
        for _, number, node, trust in reversed(chain):
            general, raw, narrow, wide = weights_of[number]
            scale = rest * trust / node.mass
            raws.append(scale * raw)
            narrows.append(scale * narrow)
            wides.append(scale * wide)
            rows.append(node.row)
            rest *= 1.0 - trust * (1.0 - general)
        factors = np.array((raws, narrows, wides), np.float32)
        raw, narrow, wide = factors @ self._nodes.histograms(rows)
        raw += rest * self._prior
        return grid.spread(raw, narrow, wide)

    def observe(self, features: RequestFeatures, output_tokens: int, ended: bool) -> None:
        """See ``Predictor.observe``."""
        tail, contexts = None, self._contexts(features)
        if not ended:
            tail = grid.beyond(self.density(features), output_tokens)
        elif self._nodes.clock < SETTLED or self._nodes.clock % 4 == 0:
            self._judge(features, contexts, output_tokens)
        keys = self._keys(features, contexts)
        self._nodes.observe(keys, features.user, output_tokens, tail)

    def state(self) -> State:
        """See ``Predictor.state``."""
        return {
            **{f"nodes_{name}": value for name, value in self._nodes.state().items()},
            **{f"mixing_{name}": value for name, value in self._mixing.state().items()},
        }

    def restore(self, state: State) -> None:
        """See ``Predictor.restore``."""
        for name, part in (("nodes_", self._nodes), ("mixing_", self._mixing)):
            own = {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}
            part.restore(own)

    def _judge(self, features: RequestFeatures, contexts: _Contexts, output_tokens: int) -> None:
        """Learn how far each experience was worth believing."""
        chain = self._chain(features, contexts)
        if not chain:
            return
        at = grid.cell(output_tokens)
        histograms = self._nodes.histograms([node.row for _, _, node, _ in chain])
        windows = histograms[:, at - grid.PAD : at + grid.PAD + 1] @ grid.KERNEL_COLUMNS
        general = float(self._prior[at])
        learn, weights_of = self._mixing.learn, self._mixing.weights
        voice = self.voice(features.user)
        for (_, number, node, trust), parts in zip(chain, windows.tolist(), strict=True):
            weights, scale = weights_of[number], 1.0 / node.mass
            first = weights[0] * general
            second = weights[1] * parts[0] * scale
            third = weights[2] * parts[1] * scale
            fourth = weights[3] * parts[2] * scale
            learn(number, (first, second, third, fourth), trust * voice)
            general += trust * (first + second + third + fourth - general)

    def voice(self, user: int) -> float:
        """How much a user's observation may say of what acts on all predictions.

        Args:
            user: who sent the request.

        Returns:
            From 0 to 1.
        """
        root = self._nodes.get(_ROOT)
        return 1.0 if root is None or root.shares is None else root.shares.voice(user)

    def _contexts(self, features: RequestFeatures) -> _Contexts:
        """Kinds, keys and memories of all that is no prefix, general first."""
        user = features.user
        form = (features.model * 3 + features.constraint * 5 + features.limit_tokens) & _BITS
        length = (form * 131 + features.prompt_tokens.bit_length()) & _BITS
        contexts = [
            (ALL, _ROOT, WINDOW),
            (FORM, form ^ _SALT[FORM], WINDOW),
            (LENGTH, length ^ _SALT[LENGTH], WINDOW),
        ]
        root = self._nodes.get(_ROOT)
        # Who gives no name is a user, too, once there are others.
        if user or (root is not None and root.shares is not None):
            contexts.append((USER, user ^ _SALT[USER], WINDOW))
            contexts.append((RECENT, user ^ _SALT[RECENT], RECENTLY))
        return contexts

    def _chain(
        self, features: RequestFeatures, contexts: _Contexts
    ) -> list[tuple[float, int, Node, float]]:
        """Experiences to combine, the general first: (order, class, node, trust)."""
        get, user, clock = self._nodes.get, features.user, self._nodes.clock
        found: list[tuple[int, Node]] = []
        said = math.inf
        for kind, key, _ in contexts:
            node = get(key)
            # Where all requests are of one form, it says again what all of them say.
            if node is not None and (kind != FORM or node.mass < ALIKE * said):
                found.append((kind, node))
                said = node.mass
        hashes = features.prefix_hashes
        most, enough = len(hashes) - LONGEST, 0.0
        left = PREFIXES
        for depth in range(len(hashes) - 1, -1, -1):
            node = get(hashes[depth])
            if node is not None and node.mass >= enough:
                found.append((MOST if depth >= most else PART, node))
                enough = node.mass * DISTINCT
                left -= 1
                if not left:
                    break
        chain = []
        class_of = self._mixing.class_of
        order = 0.0
        for kind, node in found:
            mass, idle = node.mass, clock - node.touched
            # What a user does now is a matter of the user; form and length are nobody's.
            order = (ORDERED[kind] or order) if kind in ORDERED else -mass
            if idle >= FRESH:
                mass *= 0.5 ** (idle / AGE)
            trust = 1.0
            if kind != ALL and (node.shares is not None or node.user != user):
                trust = node.trust(user)
            chain.append((order, class_of(kind, mass), node, trust))
        chain.sort(key=_by_order)
        return chain

    def _keys(self, features: RequestFeatures, contexts: _Contexts) -> list[tuple[int, float]]:
        """Keys under which a request is remembered, general first, and for how long."""
        keys = [(key, window) for _, key, window in contexts]
        hashes, grown, get = features.prefix_hashes, 0, self._nodes.get
        longest = len(hashes) - LONGEST
        for depth, key in enumerate(hashes):
            if get(key) is None:
                grown += 1
                if grown > GROWTH and depth < longest:
                    continue
            keys.append((key, WINDOW))
        return keys


_by_order = itemgetter(0)
