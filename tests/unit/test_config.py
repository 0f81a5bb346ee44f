"""Flags: defaults, refusals, and the way to the spawned processes."""

import argparse
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest

from econoserve.config import (
    ARM_VARIABLE,
    CONFIG_VARIABLE,
    HELP,
    RuntimeConfig,
    add_flags,
    armed,
    flag_of,
    is_armed,
    split_arguments,
)


def split(*argv):
    return split_arguments(list(argv), argparse.ArgumentParser(prog="serve"))


def test_ours_are_taken_and_the_rest_is_left():
    config, rest = split(
        "--model-path", "m", "--econoserve-tfs", "64", "--port=1", "--econoserve-rl-quantile=0.5"
    )
    assert (config.tfs, config.rl_quantile) == (64, 0.5)
    assert rest == ["--model-path", "m", "--port=1"]


def test_every_setting_has_a_flag_and_a_help_text(capsys):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    parser.print_help()
    text = capsys.readouterr().out
    for field in fields(RuntimeConfig):
        assert flag_of(field.name) in text
        assert HELP[field.name]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--econoserve-tsf", "5"], "did you mean --econoserve-tfs"),
        (["--econoserve-tf=5"], "unknown flag --econoserve-tf"),
        (["--econoserve-xyzzy", "5"], "known are --econoserve-policy"),
        (["--econoserve-tfs", "0"], "--econoserve-tfs=0: give more than 0 tokens"),
        (["--econoserve-tfs", "many"], "--econoserve-tfs"),
        (["--econoserve-kvc-reserve", "1.5"], "--econoserve-kvc-reserve=1.5: give a share"),
        (["--econoserve-rl-quantile", "nan"], "--econoserve-rl-quantile=nan"),
        (["--econoserve-length-order", "random"], "--econoserve-length-order"),
    ],
)
def test_wrong_flags_and_values_are_refused_with_the_fix(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        split(*argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_settings_reach_the_environment_and_leave_it():
    before = dict(os.environ)
    config = RuntimeConfig(tfs=7, length_order="longer")
    with armed(config):
        assert is_armed()
        assert RuntimeConfig.from_environment() == config
    assert dict(os.environ) == before
    assert not is_armed() or before.get(ARM_VARIABLE) == "1"


@pytest.mark.parametrize(
    ("name", "value"),
    [("best_effort_ms", float("inf")), ("window_ms", float("nan")), ("tfs", "512"), ("tfs", 1.5)],
)
def test_values_that_are_no_finite_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=flag_of(name)):
        RuntimeConfig(**{name: value})


def test_a_broken_environment_is_refused(monkeypatch):
    monkeypatch.setenv(CONFIG_VARIABLE, '{"nonsense": 1}')
    with pytest.raises(ValueError, match=CONFIG_VARIABLE):
        RuntimeConfig.from_environment()


def test_every_flag_is_in_the_user_guide():
    guide = (Path(__file__).parents[2] / "docs" / "user-guide.md").read_text()
    assert [flag_of(f.name) for f in fields(RuntimeConfig) if flag_of(f.name) not in guide] == []


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ({"slo_class": ("a=x:5",)}, "give each NAME once"),
        ({"slo_class": ("a=ttft:5", "a=ttft:6")}, "give each NAME once"),
        ({"slo_class": ("a=ttft:-1",)}, "positive number of milliseconds"),
        ({"policy": "fifo"}, "give one of d, sd"),
        ({"late": "later"}, "give one of serve, demote, reject"),
        ({"kvc_risk": 1.0}, "give a share between 0 and 1"),
        ({"kvc_points": 1}, "give 2 lengths or more"),
        ({"group_ratio": 1.0}, "give a ratio above 1"),
        ({"max_queue": 0}, "give more than 0 requests"),
        ({"max_queue": 2.5}, "give a whole number"),
        ({"host_kvc_gib": -1.0}, "give 0 GiB or more"),
        ({"lost_damage": 1.5}, "give a share in [0, 1]"),
    ],
)
def test_settings_out_of_range_name_flag_value_and_fix(setting, fix):
    (name,) = setting
    with pytest.raises(ValueError, match=re.escape(flag_of(name))) as refused:
        RuntimeConfig(**setting)
    assert fix in str(refused.value)
