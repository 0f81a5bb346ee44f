"""What the scheduler learns from: features of requests, ends that count, and the file."""

from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, FINISH_MATCHED_TOKEN
from sglang.srt.sampling.sampling_params import SamplingParams

from econoserve.config import RuntimeConfig
from econoserve.runtime.learning import Learner, Place, check_state, state_path

STOPPED = FINISH_MATCHED_TOKEN(matched=2)


def request(prompt=tuple(range(5, 45)), end=STOPPED, tokens=20, **params):
    """What a learner reads of a request."""
    sampling = SamplingParams(**{"max_new_tokens": 100, **params})
    return SimpleNamespace(
        origin_input_ids=list(prompt),
        sampling_params=sampling,
        finished_reason=end,
        output_ids_through_stop=[1] * tokens,
    )


def keep(learner, now_s):
    """Let it write its file if ten seconds are over, and wait for that."""
    learner.keep(now_s, period_s=10.0)
    if learner._writer is not None:
        learner._writer.join()


def test_features_are_what_the_request_says():
    learner = Learner(RuntimeConfig(), Place(adapter_of=lambda req: "french"))
    ours = {"econoserve": {"user": "ann", "expected_tokens": 40}}
    features = learner.features(request(custom_params=ours))
    plain = Learner(RuntimeConfig()).features(request())
    assert (features.prompt_tokens, features.cap_tokens, features.expected_tokens) == (40, 100, 40)
    assert plain.prefix_hashes == Learner(RuntimeConfig()).features(request()).prefix_hashes != ()
    # Another adapter's answers say nothing of this one's.
    assert not set(features.prefix_hashes) & set(plain.prefix_hashes)
    assert (plain.user, plain.model, plain.constraint, plain.expected_tokens) == (0, 0, 0, None)
    assert 0 not in (features.user, features.model)
    assert learner.features(request(json_schema="{}")).constraint != 0


def test_a_limit_that_only_the_context_sets_says_nothing():
    learner = Learner(RuntimeConfig(), Place(longest_tokens=141))
    assert learner.features(request(max_new_tokens=99)).limit_tokens == 99
    assert learner.features(request(max_new_tokens=100)).limit_tokens == 0


def test_a_bad_field_is_named():
    with pytest.raises(ValueError, match="expected_tokens=0: give"):
        Learner(RuntimeConfig()).features(
            request(custom_params={"econoserve": {"expected_tokens": 0}})
        )


@pytest.mark.parametrize("predictor", ["prefix-tree", "quantile"])
def test_it_learns_from_complete_responses_only(predictor):
    learner = Learner(RuntimeConfig(predictor=predictor))
    before = learner.predict(learner.features(request())).tokens
    for end, params in ((FINISH_ABORT(), {}), (STOPPED, {"max_new_tokens": 1})):
        for _ in range(50):
            req = request(end=end, tokens=20, **params)
            learner.learn(req, learner.features(req))
    assert learner.predict(learner.features(request())).tokens == before
    for _ in range(50):
        req = request(tokens=20)
        learner.learn(req, learner.features(req))
    assert 15 <= learner.predict(learner.features(request())).tokens <= 25


def test_what_ended_at_its_limit_would_have_gone_on():
    learner = Learner(RuntimeConfig())
    for _ in range(50):
        req = request(end=FINISH_LENGTH(length=20), tokens=20, max_new_tokens=20)
        learner.learn(req, learner.features(req))
    assert learner.predict(learner.features(request())).tokens > 20


def test_the_file_survives_a_restart(tmp_path):
    config = RuntimeConfig(predictor_state=str(tmp_path / "lengths"))
    learner = Learner(config)
    for number in range(50):
        req = request(tokens=20)
        learner.learn(req, learner.features(req))
        keep(learner, float(number))
    keep(learner, 1000.0)
    restarted = Learner(config)
    told = restarted.predict(restarted.features(request()))
    assert told == learner.predict(learner.features(request()))
    assert told.tokens != Learner(RuntimeConfig()).predict(restarted.features(request())).tokens


def test_only_who_should_writes(tmp_path):
    config = RuntimeConfig(predictor_state=str(tmp_path / "lengths"))
    learner = Learner(config, Place(writes=False))
    req = request()
    learner.learn(req, learner.features(req))
    learner.keep(0.0, 0.0)
    assert not state_path(config, None).exists()
    assert state_path(config, 1).name == "lengths.1"


def test_a_file_that_cannot_be_used_is_refused_before_the_start(tmp_path):
    broken = tmp_path / "lengths.1"
    broken.write_text("nonsense")
    check_state(RuntimeConfig(predictor_state=str(tmp_path / "lengths")), replicas=1)
    with pytest.raises(ValueError, match=r"lengths\.1 is no file of a predictor"):
        check_state(RuntimeConfig(predictor_state=str(tmp_path / "lengths")), replicas=2)
    with pytest.raises(ValueError, match=r"cannot be read .*: name another file"):
        check_state(RuntimeConfig(predictor_state=str(tmp_path)), replicas=1)
    with pytest.raises(ValueError, match="is no folder that can be written"):
        check_state(RuntimeConfig(predictor_state=str(tmp_path / "none" / "lengths")), replicas=1)
