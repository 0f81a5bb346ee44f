"""What the scheduler process tells Prometheus, and when.

Owns the rhythm: histograms as things happen, gauges and counters a few times a second.
"""

from dataclasses import asdict

from econoserve.core.types import Launch
from econoserve.runtime.metrics import Metrics
from econoserve.runtime.requests import Counters, Record

PERIOD_S = 0.25
"""Time between two updates of the gauges and counters."""


class MetricsFeed:
    """Feeds the metrics of one scheduler process.

    Args:
        metrics: receives the values.
        counters: the totals of this process.

    Attributes:
        idle: the gauges show that nothing is going on.
    """

    def __init__(self, metrics: Metrics, counters: Counters) -> None:
        self._metrics = metrics
        self._counters = counters
        self._known = asdict(counters)
        self._fallbacks = 0
        self._next_s = 0.0
        self.idle = False

    def planned(self, elapsed_s: float) -> None:
        """A plan was made.

        Args:
            elapsed_s: how long that took.
        """
        self._metrics.planned(elapsed_s)

    def launched(self, launch: Launch, tfs_tokens: int | None) -> None:
        """A forward pass began.

        Args:
            launch: the iteration.
            tfs_tokens: the target forward size; ``None`` where the policy has none.
        """
        self.idle = False
        tokens = len(launch.decoded) + sum(part.tokens for part in launch.prefilled)
        if tokens and tfs_tokens is not None:
            self._metrics.iteration(tokens, tfs_tokens)

    def due(self, now_s: float) -> bool:
        """Whether the gauges and counters should be updated.

        Args:
            now_s: the time.

        Returns:
            ``True`` a few times a second.
        """
        return now_s >= self._next_s

    def publish(self, state: dict[str, float], now_s: float) -> None:
        """Update the gauges and counters.

        Args:
            state: see ``Metrics.state``.
            now_s: the time.
        """
        self._next_s = now_s + PERIOD_S
        self._metrics.state(state)
        fallbacks = int(state["total_prediction_fallbacks"])
        self._metrics.predictions(state["prediction_coverage_90"], fallbacks - self._fallbacks)
        self._fallbacks = fallbacks
        totals = asdict(self._counters)
        new = {name: total - self._known[name] for name, total in totals.items()}
        self._known = totals
        kinds = {"recompute": "preempted", "offload": "offloaded", "park": "set_aside"}
        for kind, name in kinds.items():
            if new[name]:
                self._metrics.preempted(kind, new[name])
        if new["allocation_failures"]:
            self._metrics.allocation_failed(new["allocation_failures"])
        for reason in ("queue_full", "late", "too_large"):
            for _ in range(new[f"refused_{reason}"]):
                self._metrics.rejected(reason)
        for _ in range(new["planning_errors"]):
            self._metrics.planning_error()
        for _ in range(new["rank_divergences"]):
            self._metrics.ranks_diverged()

    def finished(self, record: Record, output_tokens: int, now_s: float) -> None:
        """A response is complete.

        Args:
            record: of the request.
            output_tokens: its length.
            now_s: the time.
        """
        first_s = now_s if record.first_token_s is None else record.first_token_s
        seen = {
            "ttft": first_s - record.arrival_s,
            "tpot": (now_s - first_s) / max(output_tokens - 1, 1),
            "e2e": now_s - record.arrival_s,
        }
        limits = {"ttft": record.slo.ttft_s, "tpot": record.slo.tpot_s, "e2e": record.slo.e2e_s}
        met = {name: seen[name] <= limit for name, limit in limits.items() if limit is not None}
        self._metrics.finished(record.prediction.tokens, output_tokens, record.slo_class, met)
