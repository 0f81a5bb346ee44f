"""Profiles that cannot be used: errors name the file, the field, its value, and what to give."""

import json
import re
from importlib.resources import files

import pytest

from econoserve.cli import main
from econoserve.sim.profile import ProfileError, load_profile, read_profile

NAN, INF = float("nan"), float("inf")
GOOD = files("econoserve.sim").joinpath("profiles", "a100_opt-13b.json").read_text()


def changed(path, value):
    """The good profile with another value at a path of keys; without it if it is ``...``."""
    profile = json.loads(GOOD)
    *parents, last = path.split(".")
    place = profile
    for name in parents:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return profile


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("host_bytes_per_s", 0, "host_bytes_per_s=0.0: give bytes per second, more than 0"),
        ("host_bytes_per_s", INF, "host_bytes_per_s=inf: give bytes per second"),
        ("host_bytes_per_s", "fast", "host_bytes_per_s='fast': give a number"),
        ("link_bytes_per_s", -1, "link_bytes_per_s=-1.0: give bytes per second, 0 or more"),
        ("context_tokens", 0, "context_tokens=0: give a whole number of 1 or more"),
        ("context_tokens", INF, "context_tokens=inf: give a whole number"),
        ("context_tokens", 4096.5, "context_tokens=4096.5: give a whole number"),
        ("context_tokens", True, "context_tokens=True: give a whole number"),
        ("host_bytes_per_s", True, "host_bytes_per_s=True: give a number"),
        ("memory", [1], "memory is [1]: give a JSON object"),
        ("memory.layers", 0, "layers=0: give a whole number of 1 or more"),
        ("memory.layers", "40", "layers='40': give a whole number"),
        ("memory.gpus", 1.5, "gpus=1.5: give a whole number of 1 or more"),
        ("memory.gpus", True, "gpus=True: give a whole number of 1 or more"),
        ("memory.kv_heads", None, "kv_heads=None: give a whole number"),
        ("memory.gpu_bytes", NAN, "gpu_bytes=nan: give bytes, more than 0"),
        ("memory.bytes_per_value", 0, "bytes_per_value=0: give bytes, more than 0"),
        ("memory.weights_bytes", -1, "weights_bytes=-1: give bytes, 0 or more"),
        ("memory.usable_fraction", 1.1, "usable_fraction=1.1: give a share above 0, and 1 or"),
        ("memory.usable_fraction", 0.1, "leave no KVC in gpus=1"),
        ("memory.head_dim", ..., "field 'head_dim' is missing; add it"),
        ("memory.heads", 3, "memory has a field 'heads': give gpu_bytes, gpus, "),
        ("time", "fast", "time is fast: give a JSON object"),
        ("time.kind", "slow", "time kind 'slow': give one of distserve"),
        ("time.prefill", [1.0, -0.1, 0.0], "prefill=[1.0, -0.1, 0.0]: give three numbers, none"),
        ("time.prefill", [1.0, 0.1], "prefill=[1.0, 0.1]: give three numbers"),
        ("time.prefill", [1.0, NAN, 0.0], "prefill has nan: give finite numbers"),
        ("time.prefill", [1.0, True, 0.0], "prefill has True: give finite numbers"),
        ("time.prefill", "123", "prefill='123': give a list of numbers"),
        ("time.decoding_smallbs", [0, 0, 0], "decoding_smallbs=[0.0, 0.0, 0.0]: give three"),
        ("time.decoding_largebs", [None] * 3, "decoding_largebs has None: give finite"),
        ("time.decoding_large_small_bs_threshold", NAN, "_bs_threshold has nan: give finite"),
        ("time.decoding_large_small_bs_threshold", -1, "_bs_threshold=-1: give 0 or more requests"),
        ("tensor_times", [2], "tensor_times is [2]: give a JSON object"),
        ("tensor_times.0", json.loads(GOOD)["time"], "tensor_times=0: give numbers of GPUs of 1"),
        ("tensor_times.two", json.loads(GOOD)["time"], "tensor_times='two': give a whole number"),
        ("tensor_times.2.prefill", [0, 0, 0], "prefill=[0.0, 0.0, 0.0]: give three numbers"),
    ],
)
def test_errors_name_profile_field_value_and_fix(path, value, words):
    with pytest.raises(ProfileError, match=f"profile mine: .*{re.escape(words)}"):
        read_profile("mine", json.dumps(changed(path, value)))


def test_a_list_is_no_profile():
    with pytest.raises(ProfileError, match=r"mine: the profile is \[1, 2\]: give a JSON object"):
        read_profile("mine", "[1, 2]")


def test_a_profile_of_another_encoding_is_named(tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(b'{"source": "\xe9"}')
    with pytest.raises(ProfileError, match=r"mine\.json: .*; give a file in UTF-8"):
        load_profile(str(path), "")


@pytest.mark.parametrize(
    ("time", "words"),
    [
        ({"kind": "regimes", "decode_s": [NAN] * 5, "mixed_s": [0.1] * 5}, "decode_s has nan"),
        ({"kind": "fitted", "tokens": [1, INF]}, "tokens has inf: give finite numbers"),
        ({"kind": "operators", "tokens": 3}, "tokens=3: give a list of numbers"),
    ],
)
def test_no_kind_of_time_takes_what_is_no_number(time, words):
    rest = {"tokens_s": [1, 2], "alone_s": [0, 0], "beside_s": [0] * 6}
    with pytest.raises(ProfileError, match=words):
        read_profile("mine", json.dumps(changed("time", rest | time)))


def test_the_command_explains_a_wrong_profile(capsys, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(changed("memory.layers", 0)))
    arguments = ["--policy", "plus", "--rate", "3", "--num-requests", "5", "--hardware", str(path)]
    assert main(["simulate", *arguments]) == 2
    assert "profile mine: layers=0: give a whole number" in capsys.readouterr().err


def test_numbers_that_fit_are_taken_as_they_are():
    profile = read_profile("mine", GOOD)
    again = changed("memory.gpu_bytes", float(profile.memory.gpu_bytes))
    assert read_profile("mine", json.dumps(again)) == profile
