"""Predictors by name.

Owns the list of them. A new one needs a line here.
"""

from collections.abc import Callable

from econoserve.prediction.calibration import Calibrated, Graded
from econoserve.prediction.guard import Guarded
from econoserve.prediction.hint import Hint
from econoserve.prediction.max_tokens import MaxTokens
from econoserve.prediction.oracle import NoisyOracle, Oracle, Truth
from econoserve.prediction.predictor import Predictor
from econoserve.prediction.prefix_tree import PrefixTree
from econoserve.prediction.quantile import GlobalQuantiles
from econoserve.prediction.text import Text

DEFAULT = "prefix-tree"

PREDICTORS: dict[str, Callable[[float, int], Graded]] = {
    "prefix-tree": PrefixTree,
    "text": Text,
    "quantile": GlobalQuantiles,
    "max-tokens": lambda level, prior_tokens: MaxTokens(level),
    "hint": Hint,
}
"""What a server offers: builders that take ``level`` and ``prior_tokens``."""

REPLAY_PREDICTORS = ("oracle", "noisy-oracle")
"""What only a replay of a trace may use: they are told the lengths."""


def make_predictor(name: str, level: float, prior_tokens: int = 256) -> Guarded:
    """A predictor for a server, calibrated and guarded.

    Args:
        name: key of ``PREDICTORS``.
        level: probability that a claim should cover, in (0, 1].
        prior_tokens: mean RL assumed until responses have ended, at least 1.

    Returns:
        The predictor; ``fallbacks`` counts its failures, ``coverage(0.9)`` says what its quantile
        covers.

    Raises:
        ValueError: no server offers it, or a value is out of range.
    """
    if name.partition("(")[0] in REPLAY_PREDICTORS:
        raise ValueError(
            f"predictor {name!r} is told the true lengths, so only the replay of a trace may use "
            f"it: choose one of {', '.join(PREDICTORS)}"
        )
    if name not in PREDICTORS:
        raise ValueError(f"predictor {name!r} is not known: choose one of {', '.join(PREDICTORS)}")
    inner = Calibrated(PREDICTORS[name](level, prior_tokens))
    return Guarded(inner, GlobalQuantiles(level, prior_tokens))


def make_replay_predictor(
    name: str, level: float, truth: Truth, prior_tokens: int = 256
) -> Predictor:
    """A predictor for the replay of a trace, whose lengths are known.

    Args:
        name: key of ``PREDICTORS``, ``oracle``, or ``noisy-oracle(SIGMA)``.
        level: probability that a claim should cover, in (0, 1].
        truth: the true lengths.
        prior_tokens: mean RL assumed until responses have ended, at least 1.

    Returns:
        The predictor.

    Raises:
        ValueError: there is no such predictor, or a value is out of range.
    """
    if name == "oracle":
        return Oracle(level, truth)
    if name == "noisy-oracle":
        raise ValueError("predictor 'noisy-oracle': give its error, too, as in noisy-oracle(0.3)")
    if name.startswith("noisy-oracle(") and name.endswith(")"):
        try:
            sigma = float(name[len("noisy-oracle(") : -1])
        except ValueError:
            raise ValueError(f"predictor {name!r}: give noisy-oracle(0.3), say") from None
        return NoisyOracle(level, truth, sigma)
    if name not in PREDICTORS:
        known = ", ".join((*PREDICTORS, "oracle", "noisy-oracle(SIGMA)"))
        raise ValueError(f"predictor {name!r} is not known: choose one of {known}")
    return make_predictor(name, level, prior_tokens)
