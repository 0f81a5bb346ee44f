"""How far to believe an experience, learned from how well it foretold.

Owns the weights of sequential interpolation: what is known in general is mixed with what a more
specific experience says, and each kind of experience, by its size, has weights of its own. They are
the maximum-likelihood weights of a mixture, followed online (expectation maximisation, one
observation at a time).
"""

import numpy as np

from econoserve.prediction.predictor import State

SIZES = 11
"""Classes of experiences by their mass: below 1.5, 3, 6, ..."""

LEAST = 0.003
"""No weight falls below this, so that each can recover."""

SLOWEST = 0.01
"""The step of the weights once much was seen."""

PATIENCE = 40.0
"""Observations that the first weights count for."""


class Mixing:
    """Weights of the general, and of the specific: as it is, smoothed narrowly, smoothed widely.

    They are in ``weights``, by class.

    Args:
        kinds: how many kinds of experience there are.
    """

    def __init__(self, kinds: int) -> None:
        # Lists: single numbers are read and written much faster than in an array.
        self.weights = [_first(size) for _ in range(kinds) for size in range(SIZES)]
        self._uses = [0.0] * (kinds * SIZES)

    def class_of(self, kind: int, mass: float) -> int:
        """The class of an experience.

        Args:
            kind: below ``kinds``.
            mass: its weight.

        Returns:
            Its place in ``weights``.
        """
        return kind * SIZES + min(int(mass / 1.5).bit_length(), SIZES - 1)

    def learn(self, number: int, parts: tuple[float, ...], weight: float) -> None:
        """Move the weights towards those parts that foretold an observation.

        Args:
            number: the class.
            parts: of the likelihood, by weight: general, raw, narrow, wide.
            weight: how much the observation counts, up to 1.
        """
        first, second, third, fourth = parts
        total = first + second + third + fourth
        if total <= 0.0:
            return
        uses = self._uses[number] = self._uses[number] + weight
        step = weight * max(1.0 / (uses + PATIENCE), SLOWEST)
        scale, keep = step / total, 1.0 - step
        weights = self.weights[number]
        general = weights[0] * keep + scale * first
        raw = weights[1] * keep + scale * second
        narrow = weights[2] * keep + scale * third
        wide = weights[3] * keep + scale * fourth
        if general < LEAST or raw < LEAST or narrow < LEAST or wide < LEAST:
            general, raw = max(general, LEAST), max(raw, LEAST)
            narrow, wide = max(narrow, LEAST), max(wide, LEAST)
            rest = general + raw + narrow + wide
            general, raw, narrow, wide = general / rest, raw / rest, narrow / rest, wide / rest
        self.weights[number] = (general, raw, narrow, wide)
        # A size that nobody has met yet begins half-way to what is known of the one below.
        above = number + 1
        if above % SIZES and not self._uses[above]:
            pairs = zip(self.weights[number], _first(above % SIZES), strict=True)
            self.weights[above] = tuple([(known + assumed) / 2 for known, assumed in pairs])

    def state(self) -> State:
        """The weights.

        Returns:
            Arrays.
        """
        return {"weights": np.array(self.weights), "uses": np.array(self._uses)}

    def restore(self, state: State) -> None:
        """Take over weights.

        Args:
            state: from ``state``.

        Raises:
            ValueError, KeyError: it is not such a state.
        """
        weights, uses = state["weights"], state["uses"]
        if weights.shape != (len(self.weights), 4) or uses.shape != (len(self._uses),):
            raise ValueError(f"weights of shape {weights.shape}: give {len(self.weights)} classes")
        self.weights = [tuple(row) for row in weights.tolist()]
        self._uses = uses.tolist()


def _first(size: int) -> tuple[float, ...]:
    mass = float(2**size)
    own = mass / (mass + 4.0)
    raw = own * mass / (mass + 30.0)
    return (1.0 - own, raw, (own - raw) / 2, (own - raw) / 2)
