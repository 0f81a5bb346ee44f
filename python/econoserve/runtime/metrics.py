"""Prometheus metrics of the scheduler, beside SGLang's and with the prefix ``econoserve:``.

Owns the families and their label children of one scheduler process, all listed in
docs/metrics.md. It takes plain values, decides nothing, and must not import ``prometheus_client``
with the module: that package chooses where values live when it is imported, by
``PROMETHEUS_MULTIPROC_DIR``, which SGLang sets while it starts.
"""

from typing import TYPE_CHECKING, Any

from econoserve.core.types import Preemption

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

PREFIX = "econoserve:"

QUEUES = ("waiting", "prefilling", "ready", "running")
"""Keys of ``Metrics.state`` that count requests, by queue."""

KVC_TOKENS = {
    "parked_tokens": "KVC held by requests whose prompt is computed and who do not run.",
    "held_tokens": "KVC held over all claims; a shared prefix counts for each holder.",
    "promised_tokens": "KVC promised to claims and not yet taken.",
    "capacity_tokens": "Size of the KVC.",
    "used_tokens": "KVC in use by live requests; a shared prefix counts once.",
    "hosted_tokens": "KVC that guests use within their hosts' promises (KVC pipelining).",
    "offloaded_tokens": "KVC of live requests that lies in host memory.",
}
"""Keys of ``Metrics.state`` that count tokens, and what they say."""

PREEMPTIONS = tuple(kind.value for kind in Preemption)
REJECTIONS = ("queue_full", "late", "too_large")
OBJECTIVES = ("ttft", "tpot", "e2e")
ALL_OBJECTIVES = "all"
NO_CLASS = "none"

OWN_LABELS = frozenset({"queue", "kind", "reason", "slo_class", "objective", "outcome", "le"})
"""Labels that nobody else may set."""

# fmt: off
PLANNING_BUCKETS_S = (
    20e-6, 35e-6, 50e-6, 75e-6, 100e-6, 150e-6, 200e-6, 350e-6, 500e-6, 750e-6,
    1e-3, 2e-3, 5e-3, 10e-3, 20e-3,
)
FILL_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1, 1.1, 1.5, 2)
ERROR_BUCKETS = (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)
# fmt: on


class Metrics:
    """What the scheduler counts and measures, for Prometheus.

    One per process and registry. ``planned`` and ``iteration`` are called in every iteration and
    cost some microseconds.

    Args:
        labels: put on every metric, in addition to its own.
        registry: where to register; ``prometheus_client``'s default, which SGLang uses, if
            ``None``.

    Raises:
        ValueError: a label's name is one of ours.
    """

    def __init__(self, labels: dict[str, str], registry: "CollectorRegistry | None" = None) -> None:
        from prometheus_client import REGISTRY

        taken = sorted(OWN_LABELS & labels.keys())
        if taken:
            raise ValueError(
                f"labels={taken}: our own metrics use that name, take it out of "
                "--extra-metric-labels"
            )
        self._labels = dict(labels)
        self._registry = REGISTRY if registry is None else registry
        self._make_gauges()
        self._make_counters()
        self._make_histograms()

    def _make_gauges(self) -> None:
        queues = self._gauge("queue_requests", "Requests in the scheduler, by queue.", "queue")
        self._gauges = {queue: self._bind(queues, queue=queue) for queue in QUEUES}
        for key, meaning in KVC_TOKENS.items():
            self._gauges[key] = self._bind(self._gauge(f"kvc_{key}", meaning))
        self._useful = self._bind(
            self._gauge("kvc_useful_utilisation", "Share of the KVC in use by live requests.")
        )
        self._tfs = self._bind(self._gauge("tfs_tokens", "Target forward size."))
        self._tfs_tokens = -1
        self._coverage = self._bind(
            self._gauge(
                "prediction_coverage_90",
                "Share of the last responses no longer than predicted with probability 0.9.",
            )
        )

    def _make_counters(self) -> None:
        def plain(name: str, meaning: str) -> Any:
            return self._bind(self._counter(name, meaning))

        preempted = self._counter(
            "preemptions_total", "Requests taken out of the batch by plan.", "kind"
        )
        self._preempted = {kind: self._bind(preempted, kind=kind) for kind in PREEMPTIONS}
        rejected = self._counter("rejected_requests_total", "Requests refused.", "reason")
        self._rejected = {reason: self._bind(rejected, reason=reason) for reason in REJECTIONS}
        self._failed = plain(
            "allocation_failures_total", "Requests retracted because the KVC was full."
        )
        self._planning_errors = plain("planning_errors_total", "Plans that raised.")
        self._divergences = plain(
            "rank_divergences_total", "Checks in which ranks had planned differently."
        )
        self._fallbacks = plain(
            "prediction_fallbacks_total", "Calls in which the length predictor failed."
        )
        self._predicted = plain(
            "predicted_tokens_total", "Response lengths of finished requests, as predicted."
        )
        self._output = plain("output_tokens_total", "Response lengths of finished requests.")
        self._slo_family = self._counter(
            "slo_requests_total",
            "Finished requests with an SLO, by objective and outcome.",
            *("slo_class", "objective", "outcome"),
        )
        self._slo: dict[tuple[str, str], dict[bool, Any]] = {}

    def _make_histograms(self) -> None:
        self._planning_s = self._histogram(
            "planning_seconds", "Time to plan an iteration.", PLANNING_BUCKETS_S
        )
        self._fill = self._histogram(
            "forward_size_ratio", "Tokens of a forward pass over the TFS.", FILL_BUCKETS
        )
        self._error = self._histogram(
            "prediction_error_ratio",
            "Distance of the predicted response length from the real one, over the real one.",
            ERROR_BUCKETS,
        )

    def planned(self, elapsed_s: float) -> None:
        """An iteration was planned.

        Args:
            elapsed_s: how long that took.
        """
        self._planning_s.observe(elapsed_s)

    def iteration(self, pass_tokens: int, tfs_tokens: int) -> None:
        """A forward pass was launched.

        Args:
            pass_tokens: decode and prompt tokens in it.
            tfs_tokens: target forward size, at least 1.
        """
        self._fill.observe(pass_tokens / tfs_tokens)
        if tfs_tokens != self._tfs_tokens:
            self._tfs_tokens = tfs_tokens
            self._tfs.set(tfs_tokens)

    def state(self, values: dict[str, float]) -> None:
        """Show the queues and the KVC as they are now.

        Args:
            values: by the names in ``QUEUES`` and ``KVC_TOKENS``; the capacity at least 1.
        """
        for key, gauge in self._gauges.items():
            gauge.set(values[key])
        self._useful.set(values["used_tokens"] / values["capacity_tokens"])

    def predictions(self, coverage_90: float, new_fallbacks: int) -> None:
        """Show how the length predictor does.

        Args:
            coverage_90: share of recent lengths not above the 0.9 quantile.
            new_fallbacks: failures since the last call.
        """
        self._coverage.set(coverage_90)
        self._fallbacks.inc(new_fallbacks)

    def preempted(self, kind: str, count: int = 1) -> None:
        """Requests left the batch by plan.

        Args:
            kind: value of a ``Preemption``.
            count: how many.
        """
        self._preempted[kind].inc(count)

    def allocation_failed(self, count: int = 1) -> None:
        """SGLang found the KVC full and retracted requests.

        Args:
            count: how many.
        """
        self._failed.inc(count)

    def planning_error(self) -> None:
        """A plan raised."""
        self._planning_errors.inc()

    def ranks_diverged(self) -> None:
        """A check found ranks that had planned differently."""
        self._divergences.inc()

    def rejected(self, reason: str) -> None:
        """A request was refused.

        Args:
            reason: one of ``REJECTIONS``.
        """
        self._rejected[reason].inc()

    def finished(
        self,
        predicted_tokens: int,
        output_tokens: int,
        slo_class: str | None,
        met: dict[str, bool],
    ) -> None:
        """A response is complete.

        Args:
            predicted_tokens: its length as predicted on arrival.
            output_tokens: its length; an empty one counts as 1 in the relative error.
            slo_class: name of the request's class, of which there must be few; ``None`` without.
            met: for each of ``OBJECTIVES`` that the request had, whether it was met.
        """
        self._predicted.inc(predicted_tokens)
        self._output.inc(output_tokens)
        self._error.observe(abs(predicted_tokens - output_tokens) / max(output_tokens, 1))
        if met:
            name = NO_CLASS if slo_class is None else slo_class
            for objective, is_met in met.items():
                self._outcomes(name, objective)[is_met].inc()
            self._outcomes(name, ALL_OBJECTIVES)[all(met.values())].inc()

    def _outcomes(self, slo_class: str, objective: str) -> dict[bool, Any]:
        """The counters of an objective; both outcomes appear at once, so that shares are right."""
        outcomes = self._slo.get((slo_class, objective))
        if outcomes is None:
            outcomes = self._slo[slo_class, objective] = {
                is_met: self._bind(
                    self._slo_family,
                    slo_class=slo_class,
                    objective=objective,
                    outcome="met" if is_met else "missed",
                )
                for is_met in (False, True)
            }
        return outcomes

    def _gauge(self, name: str, meaning: str, *own: str) -> Any:
        from prometheus_client import Gauge

        return Gauge(
            PREFIX + name,
            meaning,
            (*self._labels, *own),
            registry=self._registry,
            # As SGLang's: one writer per set of labels, and no label for its process.
            multiprocess_mode="mostrecent",
        )

    def _counter(self, name: str, meaning: str, *own: str) -> Any:
        from prometheus_client import Counter

        return Counter(PREFIX + name, meaning, (*self._labels, *own), registry=self._registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Any:
        from prometheus_client import Histogram

        return self._bind(
            Histogram(
                PREFIX + name,
                meaning,
                tuple(self._labels),
                registry=self._registry,
                buckets=buckets,
            )
        )

    def _bind(self, family: Any, **own: str) -> Any:
        """A family's child with our labels; a family without labels is its own child."""
        values = {**self._labels, **own}
        return family.labels(**values) if values else family
