"""The benchmark of predictions: nothing is learned before its time, and its figures are right."""

import pytest

from benchmark.prediction.accuracy import TOKEN_S, informed, measure, replay
from benchmark.prediction.run import main
from benchmark.prediction.scheduling import make_load, serve
from benchmark.prediction.synthetic import synthetic
from econoserve.core.lengths import LengthPrediction
from econoserve.prediction.oracle import Oracle
from econoserve.prediction.request import RequestFeatures
from econoserve.workload.trace import TraceRequest


class Recorder:
    def __init__(self):
        self.events = []

    def predict(self, features):
        self.events.append(("predict", features.prompt_tokens))
        return LengthPrediction((10, 20, 30, 40), 0.5, features.cap_tokens)

    def observe(self, features, output_tokens, ended):
        self.events.append(("observe", features.prompt_tokens))


def trace(*arrivals_and_lengths, hashes=((),)):
    return [
        TraceRequest(at_s, RequestFeatures(number + 1, 1000, hashes[number % len(hashes)]), length)
        for number, (at_s, length) in enumerate(arrivals_and_lengths)
    ]


def test_a_response_is_learned_from_when_it_has_ended():
    recorder = Recorder()
    long = int(10 / TOKEN_S)
    replay(trace((0.0, long), (1.0, 10), (5.0, 10), (20.0, 10)), recorder)
    assert recorder.events == [
        ("predict", 1),
        ("predict", 2),
        ("observe", 2),
        ("predict", 3),
        ("observe", 3),
        ("observe", 1),
        ("predict", 4),
    ]


def test_the_figures_of_a_prediction():
    figures = measure(trace((0.0, 15), (1.0, 50)), Recorder())
    # The median is 20, the 0.9 quantile 40.
    assert figures.mae == (5 + 30) / 2
    assert figures.pinball_90 == pytest.approx((0.1 * 25 + 0.9 * 10) / 2)
    assert figures.coverage_90 == 0.0 and figures.mae_informed is None


def test_a_prefix_of_all_informs_nobody():
    hashes = ((7, 8), (7, 9), (7, 10), (7, 8), (7, 11))
    requests = trace((0, 1), (1, 1), (2, 1), (3, 1), (4, 1), hashes=hashes)
    assert informed(requests) == [False, False, False, True, False]


def test_the_machine_serves_all_and_shows_no_lengths():
    load = make_load(synthetic(160), past=80, served=80)
    lengths = {id(request.features): request.output_tokens for request in load.requests}
    lengths |= {id(request.features): request.output_tokens for request in load.past}
    service = serve(load, Oracle(0.5, lambda features: lengths[id(features)]), lambda: None)
    assert service.preemptions == 0 and 0 < service.kvc_used <= 1
    assert max(r.output_tokens for r in load.requests) <= load.requests[0].features.cap_tokens


def test_absent_traces_are_skipped(tmp_path, capsys):
    main(["--traces", str(tmp_path), "--only", "azure", "--json"])
    said = capsys.readouterr()
    assert "azure: skipped" in said.err and said.out.splitlines()[-1] == "{}"
