"""Dependencies point one way: the core imports nothing of ours above it, and no SGLang."""

import ast
import sys
from pathlib import Path

import pytest

import econoserve

PACKAGE = Path(econoserve.__file__).parent
STANDARD = sys.stdlib_module_names
PURE = {"numpy", "sortedcontainers"}
SGLANG_LAYERS = {"runtime", "platform", "patches"}
ENTRY_POINTS = {"engine", "launch_server", "launching", "bench_offline_throughput"}
ALLOWED = {
    "core": {"econoserve.core"},
    "policies": {"econoserve.core"},
    "prediction": {"econoserve.core", "econoserve.prediction"},
    "workload": {"econoserve.core", "econoserve.prediction", "econoserve.workload"},
    "sim": {
        "econoserve.core",
        "econoserve.policies",
        "econoserve.prediction",
        "econoserve.sim",
        "econoserve.workload",
    },
    "report": {"econoserve.report", "econoserve.sim", "econoserve.workload"},
}
EXTRA = {"report": {"matplotlib"}}
TIMELESS = ("core", "policies", "prediction", "sim")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports"
            yield node.module


def modules(layer):
    found = sorted((PACKAGE / layer).glob("*.py"))
    assert found, layer
    return found


@pytest.mark.parametrize("layer", ALLOWED)
def test_pure_layers_import_only_the_standard_library_and_the_core(layer):
    for path in modules(layer):
        for name in imported(path):
            top = name.split(".")[0]
            # A policy knows no other; only the list of all of them does.
            own = {f"econoserve.{layer}"} if path.stem == "__init__" else set()
            allowed = ALLOWED[layer] | own
            ours = any(name.startswith(prefix) for prefix in allowed)
            others = STANDARD | PURE | EXTRA.get(layer, set())
            assert ours or top in others, f"{path.name} imports {name}"


def test_only_the_sglang_side_imports_sglang():
    for path in PACKAGE.rglob("*.py"):
        layer = path.relative_to(PACKAGE).parts[0]
        if layer in SGLANG_LAYERS or path.stem in ENTRY_POINTS:
            continue
        tops = {name.split(".")[0] for name in imported(path)}
        assert "sglang" not in tops, path


def test_kernels_know_nothing_of_sglang():
    for path in modules("platform/kernels"):
        for name in imported(path):
            assert name.split(".")[0] != "sglang", f"{path.name} imports {name}"
            if name.startswith("econoserve"):
                assert name.startswith("econoserve.platform.kernels"), f"{path.name}: {name}"


def test_patches_do_not_depend_on_the_runtime():
    import econoserve.patches

    for path in Path(econoserve.patches.__file__).parent.glob("*.py"):
        for name in imported(path):
            assert not name.startswith(("econoserve.runtime", "econoserve.policies")), path


def test_decisions_and_the_simulator_read_no_clock_and_no_randomness():
    for layer in TIMELESS:
        for path in modules(layer):
            tops = {name.split(".")[0] for name in imported(path)}
            assert not tops & {"time", "datetime", "random", "secrets", "uuid", "os"}, path


def test_files_stay_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
