"""The prefix tree: what it learns from whom, what it forgets, and what it costs."""

import json
import os
import subprocess
import sys
import time
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import econoserve
from econoserve.prediction.nodes import Nodes
from econoserve.prediction.prefix_tree import NODES, PrefixTree
from econoserve.prediction.request import (
    CUTS,
    RequestFeatures,
    fingerprint,
    prefix_hashes,
)

CAP = 32_768


def prompt(template, text=0, length=100, **context):
    """A request of a template of 64 tokens, and a text of its own behind it."""
    head = np.random.default_rng(template).integers(0, 30_000, 64)
    tail = np.random.default_rng((template, text)).integers(0, 30_000, max(length - 64, 0))
    return RequestFeatures.of_prompt(np.concatenate((head, tail)).tolist(), CAP, **context)


def median(tree, features):
    return tree.predict(features).quantiles_tokens[31]


def taught(lengths_by_template, rounds=100, seed=1):
    tree = PrefixTree(0.5)
    draw = np.random.default_rng(seed)
    for number in range(rounds):
        for template, length in lengths_by_template.items():
            spread = max(int(length * draw.lognormal(0, 0.2)), 1)
            tree.observe(prompt(template, number), spread, True)
    return tree


def test_hashes_are_those_of_prefixes():
    tokens = list(range(1000))
    hashes = prefix_hashes(tokens)
    assert len(hashes) == sum(cut <= 1000 for cut in CUTS)
    assert prefix_hashes(array("q", tokens)) == hashes
    assert prefix_hashes(tokens[:500]) == hashes[: sum(cut <= 500 for cut in CUTS)]
    other = prefix_hashes([*tokens[:40], 7, *tokens[41:]])
    assert [a == b for a, b in zip(hashes, other, strict=True)] == [
        cut <= 40 for cut in CUTS if cut <= 1000
    ]
    assert prefix_hashes([1, 2]) == () == prefix_hashes([])
    assert len({*hashes, *other}) == len(hashes) + sum(40 < cut <= 1000 for cut in CUTS)


def test_templates_are_told_apart():
    tree = taught({1: 20, 2: 400, 3: 3000})
    for template, length in ((1, 20), (2, 400), (3, 3000)):
        assert median(tree, prompt(template, 999)) == pytest.approx(length, rel=0.15)


def test_an_unknown_prompt_falls_back_to_all():
    tree = taught({1: 20, 2: 400, 3: 3000})
    known = tree.predict(prompt(9)).quantiles_tokens
    assert known[8] < 40 and 200 < known[31] < 700 and known[55] > 2000


def test_one_response_does_not_decide():
    tree = taught({1: 100})
    tree.observe(prompt(5), 5000, True)
    quantiles = tree.predict(prompt(5, 1)).quantiles_tokens
    assert quantiles[8] < 200 and quantiles[60] > 200


def test_users_and_forms_are_context():
    tree = PrefixTree(0.5)
    long, short = fingerprint("long"), fingerprint("short")
    json_form = fingerprint("json")
    for _ in range(100):
        tree.observe(RequestFeatures(50, CAP, user=long), 1000, True)
        tree.observe(RequestFeatures(50, CAP, user=short), 10, True)
        tree.observe(RequestFeatures(50, CAP, constraint=json_form), 60, True)
    assert median(tree, RequestFeatures(50, CAP, user=long)) == pytest.approx(1000, rel=0.12)
    assert median(tree, RequestFeatures(50, CAP, user=short)) == pytest.approx(10, abs=1)
    assert median(tree, RequestFeatures(50, CAP, constraint=json_form)) == pytest.approx(
        60, rel=0.2
    )


def test_what_changes_is_followed():
    tree = taught({1: 100}, rounds=1000)
    for number in range(1000):
        tree.observe(prompt(1, number), 900, True)
    assert median(tree, prompt(1, 5000)) > 500


def test_what_nobody_renews_counts_less():
    def later(observations):
        tree = taught({1: 50}, rounds=30)
        tree._nodes.clock += observations
        for number in range(200):
            tree.observe(prompt(2, number), 2000, True)
        return tree.predict(prompt(1, 99)).quantiles_tokens[55]

    assert later(300_000) > later(0)


def test_memory_is_bounded_and_the_rare_is_forgotten_first():
    tree = PrefixTree(0.5, nodes=256)
    for number in range(2000):
        tree.observe(prompt(1, number), 30, True)
        tree.observe(prompt(10 + number), 700, True)
    assert len(tree) == 256
    assert len(tree._nodes._counts) <= 1024
    assert median(tree, prompt(1, 99)) == pytest.approx(30, rel=0.2)


def test_a_cut_response_would_have_gone_on():
    tree = PrefixTree(0.5, prior_tokens=100)
    for number in range(300):
        tree.observe(prompt(1, number), 50, number % 2 == 0)
    quantiles = tree.predict(prompt(1, 999)).quantiles_tokens
    # Half of them ended at 50, and of the others it is only known that they are longer.
    assert quantiles[16] == pytest.approx(50, rel=0.12) and quantiles[50] > 80


def test_when_all_are_cut_longer_is_predicted():
    tree = PrefixTree(0.5, prior_tokens=8)
    for number in range(200):
        tree.observe(prompt(1, number), 50, False)
    assert tree.predict(prompt(1, 999)).tokens > 50


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 200_000), st.booleans()), max_size=60),
    st.integers(0, 40_000),
    st.floats(0.01, 1.0),
)
def test_any_history_gives_a_distribution(history, cap, level):
    tree = PrefixTree(level)
    for template, length, ended in history:
        tree.observe(prompt(template, user=template), length, ended)
    features = RequestFeatures(80, cap, prompt(1).prefix_hashes, user=1)
    prediction = tree.predict(features)
    assert len(prediction.quantiles_tokens) == 64
    assert prediction.tokens <= max(cap, 1)
    again = PrefixTree(level)
    again.restore(tree.state())
    assert again.predict(features) == prediction
    again.observe(features, 77, True)
    tree.observe(features, 77, True)
    assert again.predict(features) == tree.predict(features)


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_poisoned_stream_moves_nobody_else_much(share):
    def served(poison):
        tree, draw = PrefixTree(0.5), np.random.default_rng(3)
        users = [fingerprint(f"user {number}") for number in range(40)]
        for number in range(2000):
            user = users[number % 40]
            features = prompt(number % 7, number, user=user)
            tree.observe(features, int(draw.lognormal(5, 0.4)), True)
            for extra in range(round(share / (1 - share)) if poison else 0):
                bad = prompt(extra % 7, number * 100 + extra, user=fingerprint("poison"))
                tree.observe(bad, 1 if extra % 5 == 0 else 30_000, True)
        return tree, users

    clean, users = served(poison=False)
    poisoned, _ = served(poison=True)
    asked = [prompt(3, 123_456, user=users[5]), prompt(3, 1, user=fingerprint("new")), prompt(99)]
    for features in asked:
        before = clean.predict(features).quantiles_tokens
        after = poisoned.predict(features).quantiles_tokens
        # The median stays between quantiles of the clean world that are a tenth away.
        assert before[24] <= after[31] <= before[39], features.user
        assert after[57] <= before[62]


def test_what_one_stranger_taught_is_hardly_believed():
    tree = PrefixTree(0.5)
    for number in range(300):
        tree.observe(prompt(1, number, user=fingerprint(f"user {number % 30}")), 100, True)
        tree.observe(prompt(8, number, user=fingerprint("poison")), 30_000, True)
    victim = prompt(8, 999, user=fingerprint("victim"))
    assert tree.predict(victim).quantiles_tokens[31] < 150


def test_the_hash_seed_of_python_changes_nothing():
    code = """
import numpy as np
from econoserve.prediction.registry import make_predictor
from econoserve.prediction.request import RequestFeatures, fingerprint
predictor, draw = make_predictor("text", 0.5), np.random.default_rng(0)
for number in range(300):
    tokens = draw.integers(0, 50, 40).tolist()
    user = fingerprint(f"u{number % 9}")
    features = RequestFeatures.of_prompt(tokens, 4096, user=user)
    told = predictor.predict(features)
    predictor.observe(features, 1 + number % 77, number % 5 > 0)
print(told.quantiles_tokens, predictor.fallbacks)
"""
    source = str(Path(econoserve.__file__).parents[1])
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": source},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "4242")
    ]
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0].split(")")[1]) == 0


def test_it_is_quick():
    tree = taught({1: 100, 2: 300})
    features = [prompt(1 + number % 2, number, length=500) for number in range(300)]
    spent_s = []
    for one in features:
        began_s = time.perf_counter()
        tree.predict(one)
        tree.observe(one, 100, True)
        spent_s.append(time.perf_counter() - began_s)
    # Some 50 us where nothing else runs.
    assert sorted(spent_s)[len(spent_s) // 2] < 1e-3


def test_hashing_a_long_prompt_is_quick():
    tokens = array("q", range(4096))
    spent_s = []
    for _ in range(200):
        began_s = time.perf_counter()
        prefix_hashes(tokens)
        spent_s.append(time.perf_counter() - began_s)
    assert sorted(spent_s)[100] < 2e-4


@pytest.mark.parametrize(("level", "prior", "nodes"), [(0, 9, NODES), (0.5, 0, NODES), (0.5, 9, 1)])
def test_impossible_settings_are_refused(level, prior, nodes):
    with pytest.raises(ValueError, match="give"):
        PrefixTree(level, prior, nodes)


def test_the_newest_nodes_are_restored_where_not_all_fit():
    many, few = Nodes(1000), Nodes(64)
    for number in range(500):
        many.observe([(number + 1, 1000.0)], 0, 10)
        many.observe([(number + 1, 1000.0)], 0, 10)
    few.restore(many.state())
    assert len(few) == 64 and few.get(500) is not None and few.get(400) is None
