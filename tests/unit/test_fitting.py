"""Profiles with fitted coefficients, and their way from tables and logs."""

import json

import numpy as np
import pytest

from econoserve.cli import main
from econoserve.profiling import profile_from
from econoserve.sim.fitted import FittedTime
from econoserve.sim.fitting import Timed, fit_time
from econoserve.sim.profile import ProfileError, load_profile, profile_names, profile_of
from econoserve.sim.timing import Pass

TRUE = FittedTime(
    tokens=(1.0, 64.0, 1024.0),
    tokens_s=(0.01, 0.012, 0.05),
    alone_s=(1e-5, 1e-7),
    beside_s=(0.001, 1e-4, 2e-9, 2e-5, 2e-7, 1e-7),
)


def passes(seed=1, count=400):
    draw = np.random.default_rng(seed)
    for _ in range(count):
        decoding = int(draw.integers(1, 200))
        context = int(decoding * draw.integers(10, 2000))
        if draw.random() < 0.5:
            yield Pass(decoding=decoding, context_tokens=context)
        else:
            tokens = int(draw.integers(1, 1500))
            prompts = int(draw.integers(1, 4))
            yield Pass(prompts, tokens, tokens**2 // prompts, 0, decoding, context)


def test_a_fit_finds_what_made_the_times():
    fit = fit_time([Timed(work, TRUE.seconds(work)) for work in passes()], (1, 64, 1024))
    assert fit.mean_error < 1e-3 and abs(fit.total_error) < 1e-3
    found = FittedTime.of(fit.fields)
    for work in passes(seed=2, count=50):
        assert found.seconds(work) == pytest.approx(TRUE.seconds(work), rel=5e-3)


def test_noise_makes_passes_wrong_and_not_their_sum():
    draw = np.random.default_rng(3)
    timed = [
        Timed(work, TRUE.seconds(work) * (1 + float(draw.exponential(0.5)))) for work in passes()
    ]
    fit = fit_time(timed, (1, 64, 1024))
    assert fit.mean_error > 0.1 and abs(fit.total_error) < 0.005


def test_what_was_not_measured_costs_as_alone():
    timed = [
        Timed(work, TRUE.seconds(work))
        for work in (
            *(Pass(decoding=n, context_tokens=100 * n * n) for n in range(1, 60)),
            *(Pass(1, n, n * n) for n in range(10, 1000, 10)),
        )
    ]
    found = FittedTime.of(fit_time(timed, (1, 64, 1024)).fields)
    assert found.beside_s[3:] == (*found.alone_s, 0.0)


def test_nothing_to_fit_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        fit_time([], (1, 2))
    with pytest.raises(ValueError, match="ascending"):
        fit_time([Timed(Pass(decoding=1), 1.0)], (2, 1))


def test_uneven_contexts_cost_more():
    time = FittedTime(
        TRUE.tokens, TRUE.tokens_s, TRUE.alone_s, TRUE.beside_s, (1.0, 8.0), (0.0, 0.5), (0.0, 0.1)
    )
    equal, uneven = Pass(0, 0, 0, 0, 8, 800, 100), Pass(0, 0, 0, 0, 8, 800, 400)
    assert time.seconds(equal) == TRUE.seconds(equal)
    assert time.seconds(uneven) - time.seconds(equal) == pytest.approx(1e-7 * 0.5 * 2400)
    assert TRUE.seconds(uneven) == TRUE.seconds(equal)


@pytest.mark.parametrize("field", ["tokens", "tokens_s", "alone_s", "beside_s"])
def test_a_field_of_another_form_is_named(field):
    fields = {name: list(getattr(TRUE, name)) for name in ("tokens", "tokens_s", "alone_s")}
    fields["beside_s"] = list(TRUE.beside_s)
    with pytest.raises(ValueError, match=field):
        FittedTime.of({**fields, field: [1.0]})


@pytest.mark.parametrize("name", profile_names())
def test_packaged_profiles_grow_with_work(name):
    profile = load_profile(*name.split("/"))
    time = profile.time
    small, large = Pass(decoding=4, context_tokens=2000), Pass(decoding=64, context_tokens=64_000)
    prompt, longer = Pass(1, 512, 512**2, 512**2), Pass(1, 2048, 2048**2, 2048**2)
    assert 0.001 < time.seconds(small) < time.seconds(large) < 1
    assert time.seconds(prompt) < time.seconds(longer) < 3
    assert profile.memory.capacity_tokens > 10_000
    assert len(profile.source) > 100


def log_of(folder, lines, header=None):
    header = {
        "kvc_tokens": 1000,
        "bytes_per_token": 512,
        "context_tokens": 4096,
        "tensor": 1,
        "pipeline": 1,
        **(header or {}),
    }
    path = folder / "log.jsonl"
    rows = [json.dumps(row) for row in (header, *lines)]
    path.write_text("\n".join(rows) + "\n")
    return path


def rows():
    for work in passes():
        yield {
            "prompts": work.prompts,
            "prompt_tokens": work.prompt_tokens,
            "prompt_squares": work.prompt_squares,
            "decoding": work.decoding,
            "context_tokens": work.context_tokens,
            "seconds": TRUE.seconds(work),
        }


def test_a_log_becomes_a_profile(tmp_path, capsys):
    lines = list(rows())
    # The first use of a kernel is no iteration like others.
    lines.insert(0, {**lines[0], "seconds": 30.0})
    log, out = log_of(tmp_path, lines), tmp_path / "mine.json"
    assert main(["profile", str(log), "--out", str(out)]) == 0
    assert "400 iterations" in capsys.readouterr().out
    profile = load_profile(str(out), "")
    assert profile.memory.capacity_tokens == 1000 and profile.context_tokens == 4096
    assert profile.memory.kvc_bytes_per_token == 512
    work = Pass(decoding=100, context_tokens=50_000)
    assert profile.time.seconds(work) == pytest.approx(TRUE.seconds(work), rel=0.05)


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_a_profile_has_as_many_gpus_as_the_engine(tmp_path, gpus):
    log = log_of(tmp_path, rows(), {"tensor": gpus})
    fields, _ = profile_from(log)
    memory = profile_of("mine", fields).memory
    assert (memory.gpus, memory.capacity_tokens) == (gpus, 1000)
    assert fields["host_bytes_per_s"] == gpus * 25e9


def test_a_log_that_cannot_be_used_is_refused(tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ProfileError, match=r"empty\.jsonl: the file is empty; give one that"):
        profile_from(empty)
    with pytest.raises(ProfileError, match=r"line 1: .*all are 1 or more"):
        profile_from(log_of(tmp_path, rows(), {"tensor": 0}))
    with pytest.raises(ProfileError, match="no iterations"):
        profile_from(log_of(tmp_path, []))
    broken = log_of(tmp_path, [{"decoding": 1}, *rows()])
    with pytest.raises(ProfileError, match="line 2"):
        profile_from(broken)
    assert main(["profile", str(tmp_path / "none"), "--out", str(tmp_path / "x.json")]) == 2
    assert "none" in capsys.readouterr().err


def test_the_half_written_last_line_of_a_log_is_left_out(tmp_path):
    path = log_of(tmp_path, rows())
    path.write_text(path.read_text() + '{"prompts":')
    _, fit = profile_from(path)
    assert fit.passes == 400
