"""Which distributions an EconoServe server imports, on a CPU and as far as can be known on CUDA.

Owns the two traced runs and the way from module names to distributions. It decides nothing: what
must travel is ``plan``'s.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import packages_distributions, version
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
HOOK = Path(__file__).resolve().parent / "trace" / "hook"
PROGRAMS = {
    "CPU server": "benchmark.gpu.kit.trace.cpu_server",
    "CUDA imports": "benchmark.gpu.kit.trace.cuda_imports",
}
PROGRAM_LIMIT_S = 400

STUB_SOURCE = """\
int cuInit(unsigned flags) { return 100; }
int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) { return 100; }
"""
"""A CUDA driver without a device, for kernel libraries that are linked to one."""


class TraceFailed(Exception):
    """A traced program did not run; the message holds the end of its output."""


def trace(program: str) -> set[str]:
    """Run a program and note what it and its child processes import.

    Args:
        program: a module's name.

    Returns:
        Top-level names of all modules that were imported or tried.

    Raises:
        TraceFailed: it did not run to its end.
    """
    with tempfile.TemporaryDirectory(prefix="import-trace-") as folder:
        notes = Path(folder) / "notes"
        notes.mkdir()
        paths = [str(HOOK), str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "TRACE_FOLDER": str(notes),
        }
        if program == PROGRAMS["CUDA imports"]:
            environment["LD_LIBRARY_PATH"] = str(driver_stub(Path(folder)))
        done = subprocess.run(
            [sys.executable, "-m", program],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PROGRAM_LIMIT_S,
            check=False,
        )
        if done.returncode != 0:
            raise TraceFailed(f"{program}: status {done.returncode}; ends with\n{tail(done)}")
        names = {line for file in notes.iterdir() for line in file.read_text().split()}
    return {name.split(".")[0] for name in names}


def tail(done: subprocess.CompletedProcess) -> str:
    """The end of what a program printed.

    Args:
        done: the program.

    Returns:
        Some lines.
    """
    return "\n".join((done.stdout + done.stderr).splitlines()[-20:])


def driver_stub(folder: Path) -> Path:
    """Make a CUDA driver that finds no device; none where no compiler is.

    Args:
        folder: where to.

    Returns:
        The folder.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is not None:
        source = folder / "driver.c"
        source.write_text(STUB_SOURCE)
        library = folder / "libcuda.so.1"
        command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"]
        subprocess.run([*command, str(library), str(source)], check=True)
    return folder


def distributions(
    modules: Iterable[str], packages: Mapping[str, list[str]] | None = None
) -> set[str]:
    """Map modules to the distributions that hold them.

    Args:
        modules: top-level names.
        packages: distributions by top-level name; by default those installed here.

    Returns:
        Canonical names; modules of the standard library, or of nothing that is installed, are left
        out.
    """
    known = packages_distributions() if packages is None else packages
    return {str(canonicalize_name(name)) for module in modules for name in known.get(module, ())}


def find_closure() -> dict[str, set[str]]:
    """Trace all programs.

    Returns:
        By distribution the programs that import it.

    Raises:
        TraceFailed: a program did not run to its end.
    """
    importers: dict[str, set[str]] = {}
    for title, program in PROGRAMS.items():
        for name in distributions(trace(program)):
            importers.setdefault(name, set()).add(title)
    return importers


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """The versions here.

    Args:
        names: of installed distributions.

    Returns:
        Versions by name.
    """
    return {name: version(name) for name in names}
