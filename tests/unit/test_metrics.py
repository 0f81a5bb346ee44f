"""The scheduler's Prometheus metrics: each call moves what it should; the docs list them all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from econoserve.runtime.metrics import KVC_TOKENS, PREEMPTIONS, QUEUES, REJECTIONS, Metrics

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
LABELS = {"model_name": "demo", "tp_rank": "0"}
STATE = {name: float(number) for number, name in enumerate((*QUEUES, *KVC_TOKENS), start=1)}

MULTIPROCESS = """
import json, os, sys
from econoserve.runtime.metrics import Metrics

assert "prometheus_client" not in sys.modules, "imported before PROMETHEUS_MULTIPROC_DIR is set"
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
metrics = Metrics({"tp_rank": "0"})
metrics.iteration(96, 64)
metrics.state(json.loads(sys.argv[2]))
metrics.preempted("park")

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

registry = CollectorRegistry()
MultiProcessCollector(registry)
samples = [sample for family in registry.collect() for sample in family.samples]
print(json.dumps([[sample.name, sample.labels, sample.value] for sample in samples]))
"""


class Observed:
    """Metrics in a registry of their own, and what it holds."""

    def __init__(self, labels=LABELS):
        self.registry = CollectorRegistry()
        self.labels = labels
        self.metrics = Metrics(labels, self.registry)

    def value(self, name, **own):
        return self.registry.get_sample_value(f"econoserve:{name}", {**self.labels, **own})


@pytest.fixture
def observed():
    return Observed()


def documented():
    """``{name: (type, own labels)}`` from the table's rows."""
    rows = {}
    for line in DOCS.read_text().splitlines():
        if line.startswith("| `econoserve:"):
            name, kind, labels, unit, meaning = (cell.strip() for cell in line.split("|")[1:-1])
            assert unit and meaning, line
            name = name.strip("`")
            assert name not in rows, line
            rows[name] = (kind, frozenset(re.findall(r"`(\w+)`", labels)))
    return rows


def exported(observed):
    """``{name as in /metrics: (type, own labels)}`` of every family that was used."""
    found = {}
    for family in observed.registry.collect():
        labels = {label for sample in family.samples for label in sample.labels}
        assert labels >= LABELS.keys(), family
        own = frozenset(labels - LABELS.keys() - {"le"})
        name = family.name + ("_total" if family.type == "counter" else "")
        found[name] = (family.type, own)
    return found


def test_the_page_lists_exactly_the_families(observed):
    observed.metrics.finished(10, 20, "priority", {"ttft": True})
    assert documented() == exported(observed)


def test_the_page_queries_only_what_exists():
    known = documented()
    for name in re.findall(r"econoserve:\w+", DOCS.read_text()):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert name in known or known.get(base, ("",))[0] == "histogram", name


def test_families_have_our_prefix_and_a_help(observed):
    for family in observed.registry.collect():
        assert family.name.startswith("econoserve:")
        assert family.documentation.endswith("."), family.name


def test_state_sets_every_gauge(observed):
    observed.metrics.state(STATE)
    for queue in QUEUES:
        assert observed.value("queue_requests", queue=queue) == STATE[queue]
    for name in KVC_TOKENS:
        assert observed.value(f"kvc_{name}") == STATE[name]
    useful = STATE["used_tokens"] / STATE["capacity_tokens"]
    assert observed.value("kvc_useful_utilisation") == useful


def test_state_takes_what_it_says_and_no_less(observed):
    assert set(STATE) == {
        *("waiting", "prefilling", "ready", "running"),
        *("parked_tokens", "held_tokens", "promised_tokens", "capacity_tokens"),
        *("used_tokens", "hosted_tokens", "offloaded_tokens"),
    }
    with pytest.raises(KeyError, match="hosted_tokens"):
        observed.metrics.state({key: 1.0 for key in STATE if key != "hosted_tokens"})


@pytest.mark.parametrize(
    ("elapsed_s", "bound"), [(20e-6, "2e-05"), (140e-6, "0.00015"), (0.02, "0.02"), (1, "+Inf")]
)
def test_planning_time_falls_into_its_bucket(observed, elapsed_s, bound):
    observed.metrics.planned(elapsed_s)
    buckets = {
        sample.labels["le"]: sample.value
        for family in observed.registry.collect()
        if family.name == "econoserve:planning_seconds"
        for sample in family.samples
        if sample.name.endswith("_bucket")
    }
    assert next(le for le, count in buckets.items() if count) == bound
    assert observed.value("planning_seconds_sum") == elapsed_s
    assert observed.value("planning_seconds_count") == 1


def test_forward_size_is_measured_against_its_target(observed):
    observed.metrics.iteration(32, 64)
    observed.metrics.iteration(64, 64)
    assert observed.value("tfs_tokens") == 64
    observed.metrics.iteration(96, 48)
    assert observed.value("tfs_tokens") == 48
    bucket = "forward_size_ratio_bucket"
    assert [observed.value(bucket, le=le) for le in ("0.4", "0.5", "0.95", "1.0", "2.0")] == [
        *(0, 1, 1, 2, 3)
    ]
    assert observed.value("forward_size_ratio_sum") == 0.5 + 1 + 2


def test_a_fresh_server_shows_zeros(observed):
    assert {observed.value("preemptions_total", kind=kind) for kind in PREEMPTIONS} == {0}
    assert {observed.value("rejected_requests_total", reason=word) for word in REJECTIONS} == {0}
    for name in ("allocation_failures", "planning_errors", "rank_divergences"):
        assert observed.value(f"{name}_total") == 0


def test_events_are_counted_by_kind(observed):
    metrics = observed.metrics
    for number, kind in enumerate(PREEMPTIONS, start=1):
        metrics.preempted(kind, number)
    metrics.preempted("park")
    counted = {kind: observed.value("preemptions_total", kind=kind) for kind in PREEMPTIONS}
    assert counted == {"park": 2, "offload": 2, "recompute": 3}
    for reason in REJECTIONS:
        metrics.rejected(reason)
        assert observed.value("rejected_requests_total", reason=reason) == 1
    metrics.allocation_failed()
    metrics.allocation_failed(3)
    assert observed.value("allocation_failures_total") == 4
    metrics.planning_error()
    assert observed.value("planning_errors_total") == 1
    metrics.ranks_diverged()
    assert observed.value("rank_divergences_total") == 1


def test_unknown_kinds_are_errors(observed):
    with pytest.raises(KeyError, match="swap"):
        observed.metrics.preempted("swap")
    with pytest.raises(KeyError, match="bad mood"):
        observed.metrics.rejected("bad mood")


def test_prediction_error_is_relative_and_the_totals_tell_the_bias(observed):
    observed.metrics.finished(150, 100, None, {})
    observed.metrics.finished(50, 100, None, {})
    observed.metrics.finished(100, 100, None, {})
    assert observed.value("prediction_error_ratio_sum") == 1.0
    assert observed.value("prediction_error_ratio_bucket", le="0.0") == 1
    assert observed.value("prediction_error_ratio_bucket", le="0.5") == 3
    assert observed.value("predicted_tokens_total") == 300
    assert observed.value("output_tokens_total") == 300


def test_an_empty_response_has_a_finite_error(observed):
    observed.metrics.finished(7, 0, None, {})
    assert observed.value("prediction_error_ratio_sum") == 7


def slo(observed, slo_class):
    """``{objective: (met, missed)}`` of a class."""
    found = {}
    for objective in ("ttft", "tpot", "e2e", "all"):
        labels = {"slo_class": slo_class, "objective": objective}
        counts = [
            observed.value("slo_requests_total", outcome=outcome, **labels)
            for outcome in ("met", "missed")
        ]
        if counts != [None, None]:
            found[objective] = tuple(counts)
    return found


def test_slo_outcomes_are_counted_by_class_and_objective(observed):
    finished = observed.metrics.finished
    finished(1, 1, "priority", {"ttft": True, "tpot": True})
    finished(1, 1, "priority", {"ttft": True, "tpot": False})
    finished(1, 1, "flex", {"e2e": False})
    finished(1, 1, None, {"e2e": True})
    finished(1, 1, "default", {})
    assert slo(observed, "priority") == {"ttft": (2, 0), "tpot": (1, 1), "all": (1, 1)}
    assert slo(observed, "flex") == {"e2e": (0, 1), "all": (0, 1)}
    assert slo(observed, "none") == {"e2e": (1, 0), "all": (1, 0)}
    assert slo(observed, "default") == {}, "no SLO, no verdict"


def test_the_predictor_is_watched():
    observed = Observed(LABELS)
    observed.metrics.predictions(0.875, 2)
    observed.metrics.predictions(0.9, 1)
    assert observed.value("prediction_coverage_90") == 0.9
    assert observed.value("prediction_fallbacks_total") == 3


def test_no_labels_are_fine():
    observed = Observed({})
    observed.metrics.state(STATE)
    observed.metrics.iteration(1, 2)
    observed.metrics.allocation_failed()
    assert observed.value("kvc_used_tokens") == STATE["used_tokens"]
    assert observed.value("allocation_failures_total") == 1


@pytest.mark.parametrize("name", ["queue", "slo_class", "le"])
def test_labels_that_are_ours_are_refused_in_words(name):
    with pytest.raises(ValueError, match=f"'{name}'.*--extra-metric-labels"):
        Metrics({**LABELS, name: "x"}, CollectorRegistry())


def test_processes_share_values_the_way_sglang_collects_them(tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"
    }
    output = subprocess.run(
        [sys.executable, "-c", MULTIPROCESS, str(tmp_path), json.dumps(STATE)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    samples = json.loads(output)
    assert all("pid" not in labels for _, labels, _ in samples), "a gauge per process"
    values = {name: value for name, _, value in samples}
    assert values["econoserve:kvc_capacity_tokens"] == STATE["capacity_tokens"]
    assert values["econoserve:tfs_tokens"] == 64
    assert values["econoserve:forward_size_ratio_sum"] == 1.5
    parked = ["econoserve:preemptions_total", {"tp_rank": "0", "kind": "park"}, 1.0]
    assert parked in samples
