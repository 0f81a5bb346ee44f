"""Runs ``cases.py`` on stock SGLang once and on EconoServe per configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parent / "cases.py"


FAULT = """
from econoserve.policies.econoserve import EconoServe

plan, calls = EconoServe.plan, 0


def faulty(self, view):
    global calls
    calls += 1
    if calls % 5 == 0:
        raise RuntimeError("a fault for the test")
    return plan(self, view)


EconoServe.plan = faulty
"""
"""A sitecustomize that lets every fifth plan fail, in every process of the engine."""


def run_cases(system, folder, fault=False, **options):
    """Run all cases in a process of their own, with or without a policy that fails.

    Returns:
        The worker's result.
    """
    output = folder / f"{system}.json"
    environment = {**os.environ, "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
    environment["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "1"
    environment.pop("ECONOSERVE", None)
    if fault:
        (folder / "sitecustomize.py").write_text(FAULT)
        environment["PYTHONPATH"] = str(folder)
    run = subprocess.run(
        [sys.executable, str(WORKER), system, str(output), json.dumps(options)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    return json.loads(output.read_text())
