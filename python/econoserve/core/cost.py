"""How long an iteration takes, learned from those that were measured, and what TFS follows.

Owns the fit. It never reads a clock: whoever runs the policy measures, and on several ranks
broadcasts what it measured.
"""

from dataclasses import dataclass

PRIOR_VARIANCE = 1e3
"""Uncertainty of the first coefficients, in their own units squared; large: data soon prevail."""

MIN_SAMPLES = 8
"""Iterations of a kind to have seen before its fit is used."""

OUTLIER = 4.0
"""An iteration that took so many times what was expected was disturbed and says nothing."""

ODD_IN_A_ROW = 3
"""But after so many of them in a row what is expected is wrong."""


@dataclass(frozen=True, slots=True)
class IterationWork:
    """What one forward pass computed.

    Attributes:
        prefill_tokens: prompt tokens, P.
        prefill_squared: sum over the prompts of (tokens in this pass) x (their context after it).
        decoding: requests that decoded, B.
        context_tokens: their context, KV.
        sitting_out: requests that run but did not decode in it; it costs nothing.
    """

    prefill_tokens: int = 0
    prefill_squared: int = 0
    decoding: int = 0
    context_tokens: int = 0
    sitting_out: int = 0

    @property
    def mixed(self) -> bool:
        """Whether it had prompt tokens: such an iteration cannot use a decode CUDA graph."""
        return self.prefill_tokens > 0


SCALES = (1.0, 1e3, 1e6, 1e2, 1e5)
"""Typical sizes of the features, so that one prior suits all coefficients."""


class _Regime:
    """Recursive least squares with forgetting over the features 1, P, sum L^2, B, KV.

    In plain numbers: five are too few for arrays to be faster, and the sums come out the same on
    every machine, which those of a BLAS do not.
    """

    def __init__(self, coefficients_s: tuple[float, ...], forgetting: float) -> None:
        self.weights = [c * scale for c, scale in zip(coefficients_s, SCALES, strict=True)]
        size = len(SCALES)
        self.covariance = [
            [PRIOR_VARIANCE if row == column else 0.0 for column in range(size)]
            for row in range(size)
        ]
        self.forgetting = forgetting
        self.samples = 0
        self._first: list[tuple[list[float], float]] = []

    @property
    def coefficients_s(self) -> list[float]:
        return [weight / scale for weight, scale in zip(self.weights, SCALES, strict=True)]

    def take(self, work: IterationWork, elapsed_s: float) -> None:
        """Learn from an iteration; from the first ones together, without those that were slow."""
        features = [number / scale for number, scale in zip(_numbers(work), SCALES, strict=True)]
        self.samples += 1
        if self.samples > MIN_SAMPLES:
            self._observe(features, elapsed_s)
            return
        self._first.append((features, elapsed_s))
        if self.samples == MIN_SAMPLES:
            usual_s = sorted(elapsed_s for _, elapsed_s in self._first)[MIN_SAMPLES // 2]
            for features, elapsed_s in self._first:
                if elapsed_s <= OUTLIER * usual_s:
                    self._observe(features, elapsed_s)
            self._first.clear()

    def _observe(self, scaled: list[float], elapsed_s: float) -> None:
        direction = [_product(row, scaled) for row in self.covariance]
        whole = self.forgetting + _product(scaled, direction)
        gain = [part / whole for part in direction]
        error_s = elapsed_s - _product(scaled, self.weights)
        self.weights = [w + g * error_s for w, g in zip(self.weights, gain, strict=True)]
        self.covariance = [
            [old - g * d for old, d in zip(row, direction, strict=True)]
            for row, g in zip(self.covariance, gain, strict=True)
        ]
        # Forgetting must not let the uncertainty of features that never vary grow without end.
        trace = sum(row[place] for place, row in enumerate(self.covariance))
        if trace < PRIOR_VARIANCE * len(SCALES):
            self.covariance = [[old / self.forgetting for old in row] for row in self.covariance]


def _product(left: list[float], right: list[float]) -> float:
    a, b, c, d, e = left
    v, w, x, y, z = right
    return a * v + b * w + c * x + d * y + e * z


class CostModel:
    """T = c0 + c1 * P + c2 * sum(L^2) + c3 * B + c4 * KV, one set of coefficients for iterations
    that only decode (they may use CUDA graphs), one for mixed ones.

    Args:
        coefficients_s: c0 to c4 in seconds, believed until enough was measured. The default is a
            mid-size model on one GPU; ours, not the paper's.
        forgetting: weight of an iteration that is one older, in (0, 1].

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        coefficients_s: tuple[float, float, float, float, float] = (0.01, 5e-5, 2e-9, 5e-5, 1e-8),
        forgetting: float = 0.998,
    ) -> None:
        if not 0.0 < forgetting <= 1.0:
            raise ValueError(f"forgetting={forgetting}: give a number in (0, 1]")
        if min(coefficients_s) < 0 or len(coefficients_s) != len(SCALES):
            raise ValueError(f"coefficients_s={coefficients_s}: give five numbers, 0 or more")
        self._prior = coefficients_s
        self._decode = _Regime(coefficients_s, forgetting)
        self._mixed = _Regime(coefficients_s, forgetting)
        self._odd = 0
        self._current: dict[bool, tuple[float, ...]] = {}

    def observe(self, work: IterationWork, elapsed_s: float) -> None:
        """Learn from an iteration.

        Args:
            work: what it computed.
            elapsed_s: how long it took; 0 or less is ignored.
        """
        if elapsed_s > 0:
            regime, other = self._regimes(work.mixed)
            odd = regime.samples >= MIN_SAMPLES and elapsed_s > OUTLIER * self.seconds(work)
            self._odd = self._odd + 1 if odd else 0
            if 0 < self._odd <= ODD_IN_A_ROW:
                return
            regime.take(work, elapsed_s)
            self._current.pop(work.mixed, None)
            if other.samples < MIN_SAMPLES:
                # This one may stand in for it.
                self._current.pop(not work.mixed, None)

    def _regimes(self, mixed: bool) -> tuple[_Regime, _Regime]:
        """The one for such iterations, and the other."""
        return (self._mixed, self._decode) if mixed else (self._decode, self._mixed)

    def adopt(self, other: "CostModel") -> None:
        """Know what another model has learned.

        Args:
            other: the model; the two share it from then on.
        """
        self._decode, self._mixed = other._decode, other._mixed
        self._current.clear()

    def coefficients_s(self, mixed: bool) -> tuple[float, ...]:
        """The coefficients in use.

        Args:
            mixed: of iterations with prompt tokens, else of those that only decode.

        Returns:
            c0 to c4 in seconds, none negative; a regime without enough samples takes the other's
            where that has some.
        """
        if mixed not in self._current:
            fitted = next((one for one in self._regimes(mixed) if one.samples >= MIN_SAMPLES), None)
            coefficients = self._prior if fitted is None else fitted.coefficients_s
            self._current[mixed] = tuple([max(float(value), 0.0) for value in coefficients])
        return self._current[mixed]

    def seconds(self, work: IterationWork) -> float:
        """Predict how long an iteration takes.

        Args:
            work: what it is to compute.

        Returns:
            Seconds.
        """
        fixed_s, token_s, square_s, request_s, context_s = self.coefficients_s(work.mixed)
        return (
            fixed_s
            + token_s * work.prefill_tokens
            + square_s * work.prefill_squared
            + request_s * work.decoding
            + context_s * work.context_tokens
        )

    def base_s(self, mixed: bool, decoding: int, context_tokens: int) -> float:
        """Time of an iteration without what its prompts add by themselves.

        Args:
            mixed: of one that has prompts, too.
            decoding: requests that decode.
            context_tokens: their context.

        Returns:
            Seconds.
        """
        fixed_s, _, _, per_request_s, per_context_s = self.coefficients_s(mixed)
        return fixed_s + per_request_s * decoding + per_context_s * context_tokens

    def prefill_s(self, tokens: int) -> float:
        """Time to compute a prompt beside other work, without the iteration's fixed part.

        Args:
            tokens: its length.

        Returns:
            Seconds.
        """
        _, per_token, per_square, _, _ = self.coefficients_s(mixed=True)
        return per_token * tokens + per_square * tokens * tokens


@dataclass(frozen=True, slots=True)
class TfsConfig:
    """How the TFS is chosen; the constants are ours, not the paper's.

    Attributes:
        pinned_tokens: the TFS, if it is to be a constant.
        limits_tokens: least and greatest TFS otherwise.
        saturation: share of the tokens per second of ever larger passes that is enough, in (0, 1).
        tpot_burst: an iteration takes no longer than this many times the tightest TPOT objective,
            at least 1. TPOT is a mean over a response, so single iterations may take longer, and
            many small passes take more time than few large ones.

    Raises:
        ValueError: a value is out of range.
    """

    pinned_tokens: int | None = None
    limits_tokens: tuple[int, int] = (128, 8192)
    saturation: float = 0.95
    tpot_burst: float = 8.0

    def __post_init__(self) -> None:
        low, high = self.limits_tokens
        if not 1 <= low <= high:
            raise ValueError(f"limits_tokens={self.limits_tokens}: give 1 <= least <= greatest")
        if not 0.0 < self.saturation < 1.0:
            raise ValueError(f"saturation={self.saturation}: give a share between 0 and 1")
        if not self.tpot_burst >= 1:
            raise ValueError(f"tpot_burst={self.tpot_burst}: give 1 or more")
        if self.pinned_tokens is not None and self.pinned_tokens < 1:
            raise ValueError(f"pinned_tokens={self.pinned_tokens}: give 1 or more, or None")

    def tokens(self, cost: CostModel, decoding: int, context_tokens: int, tpot_s: float) -> int:
        """TFS: the tokens of the next forward pass that use the device well and keep TPOT.

        The largest P whose iteration takes no longer than ``tpot_burst`` times ``tpot_s``, but not
        beyond the point where tokens per second reach ``saturation`` of what ever larger passes
        would give. Which prompts will be in the pass is not known yet, so the term of their
        context, c2, is left out; and never less than the least TFS, whatever the objective.

        Args:
            cost: how long iterations take.
            decoding: requests that decode in it.
            context_tokens: their context.
            tpot_s: the tightest TPOT objective among them; infinity without one.

        Returns:
            Tokens, decode and prompt tokens together.
        """
        if self.pinned_tokens is not None:
            return self.pinned_tokens
        per_token_s = cost.coefficients_s(mixed=True)[1]
        low, high = self.limits_tokens
        fixed_s = cost.base_s(True, decoding, context_tokens)
        limit_s = self.tpot_burst * tpot_s
        if per_token_s > 0:
            saturated = (self.saturation * fixed_s / per_token_s - decoding) / (1 - self.saturation)
            affordable = (limit_s - fixed_s) / per_token_s
            prompt_tokens = max(min(saturated, affordable, high), 0)
        else:
            prompt_tokens = high if fixed_s < limit_s else 0
        return int(min(max(decoding + prompt_tokens, low), high))


def _numbers(work: IterationWork) -> tuple[float, ...]:
    return 1.0, work.prefill_tokens, work.prefill_squared, work.decoding, work.context_tokens
