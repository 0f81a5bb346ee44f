"""``/metrics`` of a real server: our families beside SGLang's, and they follow the requests."""

import random
import threading

import pytest
from live_server import KVC_TOKENS, METRICS, wait_until
from prometheus_client.parser import text_string_to_metric_families
from traffic import prompt_ids

LOOSE_MS, TIGHT_MS = 600_000.0, 0.001
OUTPUT_TOKENS = 10
TIMEOUT_S = 20.0


class Scrape:
    """One answer of ``/metrics``."""

    def __init__(self, server):
        response = server.http.get("/metrics")
        assert response.status_code == 200, response.text
        self.families = {
            family.name: family for family in text_string_to_metric_families(response.text)
        }

    def value(self, name, **own):
        """Our sample of that name whose labels include these; there must be one."""
        found = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == f"econoserve:{name}" and own.items() <= sample.labels.items()
        ]
        assert len(found) == 1, f"{name} {own}: {found}"
        return found[0]

    def slo(self, objective, outcome):
        return self.value("slo_requests_total", objective=objective, outcome=outcome)


def generate(server, output_tokens, **slo):
    """Have so many tokens generated; the answer's ``meta_info``."""
    sampling = {"max_new_tokens": output_tokens, "ignore_eos": True}
    if slo:
        sampling["custom_params"] = {"econoserve": slo}
    fields = {"text": "The tide", "sampling_params": sampling}
    response = server.http.post("/generate", json=fields)
    assert response.status_code == 200, response.text
    return response.json()["meta_info"]


def test_metrics_follow_the_requests(holder):
    server = holder.running(*METRICS)
    # The health check's own response has been counted when the scheduler answers.
    server.assert_drained()
    fresh = Scrape(server)
    assert any(name.startswith("sglang:") for name in fresh.families)
    ours = {
        name: family for name, family in fresh.families.items() if name.startswith("econoserve:")
    }
    assert len(ours) >= 20, sorted(ours)
    shared = {"model_name", "engine_type", "tp_rank"}
    for name, family in ours.items():
        for sample in family.samples:
            assert shared <= sample.labels.keys(), name
            assert "pid" not in sample.labels, f"{name}: a gauge per process"

    metas = [
        generate(server, OUTPUT_TOKENS, ttft_ms=LOOSE_MS, e2e_ms=LOOSE_MS),
        generate(server, OUTPUT_TOKENS, ttft_ms=LOOSE_MS, e2e_ms=TIGHT_MS),
        generate(server, OUTPUT_TOKENS),
    ]
    predicted = sum(meta["econoserve"]["predicted_tokens"] for meta in metas)
    too_large = {"input_ids": list(prompt_ids(random.Random(5), KVC_TOKENS + 500))}
    assert server.http.post("/generate", json=too_large).status_code == 400

    def total(name):
        return Scrape(server).value(name) - fresh.value(name)

    wanted = OUTPUT_TOKENS * len(metas)
    wait_until(lambda: total("output_tokens_total") >= wanted, TIMEOUT_S, "they are counted")
    after = Scrape(server)
    assert total("output_tokens_total") == wanted
    assert total("predicted_tokens_total") == predicted
    assert total("prediction_error_ratio_count") == len(metas)
    assert (after.slo("ttft", "met"), after.slo("ttft", "missed")) == (2, 0)
    assert (after.slo("e2e", "met"), after.slo("e2e", "missed")) == (1, 1)
    assert (after.slo("all", "met"), after.slo("all", "missed")) == (1, 1)
    assert after.value("rejected_requests_total", reason="too_large") == 1
    assert after.value("rejected_requests_total", reason="late") == 0
    # Each response needs a pass for its prompt and one for each further token.
    assert total("planning_seconds_count") >= wanted
    assert 0 < total("planning_seconds_sum") < TIMEOUT_S
    assert total("forward_size_ratio_count") >= wanted
    assert after.value("tfs_tokens") == 64
    assert after.value("kvc_capacity_tokens") == server.state()["capacity_tokens"]
    for name in ("planning_errors", "rank_divergences", "allocation_failures"):
        assert after.value(f"{name}_total") == 0

    long = threading.Thread(target=generate, args=(server, 700))
    long.start()

    def runs():
        now = Scrape(server)
        if now.value("queue_requests", queue="running") != 1:
            return False
        used = now.value("kvc_used_tokens")
        assert now.value("kvc_useful_utilisation") == pytest.approx(
            used / now.value("kvc_capacity_tokens")
        )
        return used > 0 and now.value("kvc_held_tokens") > 0

    wait_until(runs, TIMEOUT_S, "the gauges show the running request")
    long.join()

    def is_idle():
        now = Scrape(server)
        queues = ("waiting", "prefilling", "ready", "running")
        held = [now.value("queue_requests", queue=queue) for queue in queues]
        held += [now.value(f"kvc_{kind}_tokens") for kind in ("held", "promised", "used")]
        return not any(held)

    wait_until(is_idle, TIMEOUT_S, "the gauges are zero when nothing is served")
