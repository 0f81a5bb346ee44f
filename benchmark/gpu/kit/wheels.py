"""Fetches wheels for another Python from the registry that pip is set up with.

Owns the folder of wheels: a wheel whose checksum is right is never fetched twice.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name, parse_wheel_filename

from benchmark.gpu.assemble import sha256_of
from benchmark.gpu.kit.plan import Target

OLDEST_GLIBC_MINOR = 5
RESOLVE_LIMIT_S = 300
FETCH_LIMIT_S = 900
CHUNK_BYTES = 1 << 20


class NotAvailable(Exception):
    """A wheel cannot be had; the message names it and says what pip said."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel in the registry.

    Attributes:
        distribution: canonical name.
        version: its version.
        file_name: of the wheel.
        sha256: its checksum, in hexadecimal.
    """

    distribution: str
    version: str
    file_name: str
    sha256: str


def platform_flags(target: Target) -> list[str]:
    """pip's flags for wheels of another machine.

    Args:
        target: the machine.

    Returns:
        Flags: its Python, and all platforms that its C library runs.
    """
    newest = int(target.glibc.split(".")[1])
    platforms = [f"manylinux_2_{n}_x86_64" for n in range(newest, OLDEST_GLIBC_MINOR - 1, -1)]
    platforms += [f"manylinux{name}_x86_64" for name in ("2014", "2010", "1")]
    flags = ["--no-deps", "--only-binary", ":all:", "--python-version", target.python]
    flags += ["--implementation", "cp"]
    return [*flags, *(part for name in platforms for part in ("--platform", name))]


def resolve(wanted: Mapping[str, str], target: Target) -> list[Wheel]:
    """Find the wheels, without fetching them.

    Args:
        wanted: versions by name.
        target: the machine they are for.

    Returns:
        A wheel for each.

    Raises:
        NotAvailable: one does not exist for that machine, or the registry does not answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        _pip(
            ["install", "--dry-run", "--ignore-installed", "--target", folder]
            + ["--report", str(report), *platform_flags(target)]
            + [f"{name}=={version}" for name, version in wanted.items()],
            RESOLVE_LIMIT_S,
        )
        found = json.loads(report.read_text())["install"]
    return [
        Wheel(
            str(canonicalize_name(one["metadata"]["name"])),
            one["metadata"]["version"],
            one["download_info"]["url"].rsplit("/", 1)[-1],
            one["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for one in found
    ]


def fetch(wheel: Wheel, folder: Path, target: Target) -> Path:
    """Have a wheel in the folder.

    Args:
        wheel: which.
        folder: where to.
        target: the machine it is for.

    Returns:
        The file; its checksum is right.

    Raises:
        NotAvailable: it cannot be fetched, or is another file than was found before.
    """
    path = folder / wheel.file_name
    if path.exists() and sha256_of(path) == wheel.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    requirement = f"{wheel.distribution}=={wheel.version}"
    _pip(["download", "--dest", str(folder), *platform_flags(target), requirement], FETCH_LIMIT_S)
    found = sha256_of(path) if path.exists() else "no file"
    if found != wheel.sha256:
        raise NotAvailable(
            f"{wheel.file_name}: checksum {found}, expected {wheel.sha256}; delete it and run again"
        )
    return path


def in_folder(folder: Path, name: str, version: str) -> Path | None:
    """A wheel that was fetched before.

    Args:
        folder: the folder of wheels.
        name: canonical name.
        version: its version.

    Returns:
        The file, if it is there.
    """
    for path in sorted(folder.glob("*.whl")):
        found_name, found_version, _, _ = parse_wheel_filename(path.name)
        if found_name == name and str(found_version) == version:
            return path
    return None


def _pip(arguments: Iterable[str], limit_s: float) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise NotAvailable(f"no answer from the registry in {limit_s:.0f} s: run again") from None
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotAvailable("\n".join(errors or done.stderr.splitlines()[-5:]))
