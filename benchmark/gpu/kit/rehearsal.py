"""Runs the traced programs with nothing but what will be on the machine: is anything missing?

Owns a folder of links to the distributions that travel, without the files that are left out, and to
those that the machine has, as far as they are installed here, in the versions that are installed
here. What their code for a GPU does is not seen.
"""

import fnmatch
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from benchmark.gpu.assemble import Layout, link_project
from benchmark.gpu.kit import closure
from benchmark.gpu.kit.plan import Decision, Rules, Target, Verdict


class Missing(Exception):
    """A program did not run; the message holds the end of its output."""


def link(name: str, left_out: Iterable[str], to: Path) -> int:
    """Link the files of a distribution that is installed here.

    Args:
        name: its name.
        left_out: patterns of files that are not linked.
        to: folder of links.

    Returns:
        How many files were linked; 0 if it is not installed.
    """
    try:
        files = distribution(name).files or ()
    except PackageNotFoundError:
        return 0
    patterns, linked = tuple(left_out), 0
    for file in files:
        path, source = str(file), Path(str(file.locate()))
        foreign = path.startswith("..") or path.endswith(".pth") or "__pycache__" in path
        if foreign or any(fnmatch.fnmatchcase(path, one) for one in patterns):
            continue
        here = to / path
        if source.exists() and not here.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            here.symlink_to(source.absolute())
            linked += 1
    return linked


def rehearse(decisions: Sequence[Decision], target: Target, rules: Rules) -> None:
    """Run everything.

    Args:
        decisions: what travels.
        target: what the machine has.
        rules: what is left out.

    Raises:
        Missing: a program did not run to its end.
    """
    travels = {one.name for one in decisions if one.verdict is Verdict.TRAVELS}
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        layout = Layout(Path(folder))
        for name in sorted(travels | set(target.installed)):
            link(name, rules.strip.get(name, ()), layout.site)
        link_project(layout, closure.ROOT)
        driver = Path(folder) / "driver"
        driver.mkdir()
        for program in closure.PROGRAMS.values():
            environment = {
                **os.environ,
                **layout.environment(closure.ROOT),
                "PYTHONDONTWRITEBYTECODE": "1",
            }
            if program == closure.PROGRAMS["CUDA imports"]:
                environment["LD_LIBRARY_PATH"] = str(closure.driver_stub(driver))
            done = subprocess.run(
                # Without this environment's own packages.
                [sys.executable, "-S", "-m", program],
                env=environment,
                cwd=closure.ROOT,
                capture_output=True,
                text=True,
                timeout=closure.PROGRAM_LIMIT_S,
                check=False,
            )
            if done.returncode != 0:
                raise Missing(f"{program}: status {done.returncode}\n{closure.tail(done)}")
