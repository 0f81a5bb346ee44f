"""Installs what ``prepare`` collected: ``python benchmark/gpu/assemble.py PARTS --target DIR``.

Runs on a machine without a network, with the standard library only. Parts may arrive in several
calls, any number at a time: each is checked and kept, what is complete is installed, and what is
missing is named. Nothing outside the target is changed, and no ``.pth`` file is written: the
variables to set are printed, and written to ``environment.sh`` in the target.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = "manifest.json"
ENVIRONMENT = "environment.sh"
FORMAT = 1
CHUNK_BYTES = 1 << 20
MIB = 1 << 20

SETTINGS = {
    # The machine's cuDNN may be older than the one that torch was built with; nothing here uses it.
    "PYTORCH_SKIP_CUDNN_COMPATIBILITY_CHECK": "1",
    # There is no network to ask for models.
    "HF_HUB_OFFLINE": "1",
}

DONE, FAILED, INCOMPLETE = 0, 1, 3
"""Exit statuses: in order; something is wrong; parts are missing."""


class Wrong(Exception):
    """Something that the user must mend; the message says how."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders of a target.

    Attributes:
        target: the folder that holds all others.
    """

    target: Path

    @property
    def parts(self) -> Path:
        """Parts that have arrived, and the manifest."""
        return self.target / "parts"

    @property
    def site(self) -> Path:
        """Installed distributions."""
        return self.target / "site"

    @property
    def project(self) -> Path:
        """Links to this repository's packages, and EconoServe's metadata."""
        return self.target / "project"

    @property
    def marks(self) -> Path:
        """One file for each installed distribution."""
        return self.target / "installed"

    def environment(self, repository: Path) -> dict[str, str]:
        """Variables under which Python finds what was installed.

        Args:
            repository: a checkout of EconoServe.

        Returns:
            Values by name.
        """
        path = os.pathsep.join(str(one) for one in (self.site, self.project, repository))
        return {"PYTHONPATH": path, **SETTINGS}


def sha256_of(path: Path) -> str:
    """The checksum of a file.

    Args:
        path: the file.

    Returns:
        SHA-256 in hexadecimal.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take_in(arrived: Path, layout: Layout) -> dict:
    """Check what has arrived and keep it in the target.

    Args:
        arrived: folder with some parts, and the manifest unless an earlier call brought it.
        layout: the target.

    Returns:
        The manifest.

    Raises:
        Wrong: there is no manifest, it is of another release of this program, or a part is
            damaged.
    """
    layout.parts.mkdir(parents=True, exist_ok=True)
    kept = layout.parts / MANIFEST
    if (arrived / MANIFEST).exists():
        text = (arrived / MANIFEST).read_text()
        if not kept.exists() or kept.read_text() != text:
            kept.write_text(text)
    if not kept.exists():
        raise Wrong(f"{arrived}: no {MANIFEST}; bring it along with the first part")
    manifest = json.loads(kept.read_text())
    if manifest["format"] != FORMAT:
        raise Wrong(f"{MANIFEST}: format {manifest['format']}, this program reads {FORMAT}")
    for part in manifest["parts"]:
        source, mine = arrived / part["name"], layout.parts / part["name"]
        if _is_whole(mine, part):
            continue
        if source.exists():
            if sha256_of(source) != part["sha256"]:
                raise Wrong(f"{part['name']}: its checksum is wrong; bring it again")
            partial = mine.with_suffix(".partial")
            shutil.copyfile(source, partial)
            partial.rename(mine)
            _mark_whole(mine, part)
    return manifest


def _is_whole(path: Path, part: dict) -> bool:
    mark = path.with_suffix(".sha256")
    return path.exists() and mark.exists() and mark.read_text() == part["sha256"]


def _mark_whole(path: Path, part: dict) -> None:
    path.with_suffix(".sha256").write_text(part["sha256"])


def missing_parts(manifest: dict, layout: Layout) -> list[str]:
    """Parts that have not arrived.

    Args:
        manifest: names all parts.
        layout: the target.

    Returns:
        Their names.
    """
    parts = manifest["parts"]
    return [one["name"] for one in parts if not _is_whole(layout.parts / one["name"], one)]


class Stream(io.RawIOBase):
    """The bytes of an archive, wherever its parts are.

    Args:
        manifest: says where parts and archives begin.
        layout: the target.
        start: the archive's first byte.
        length: its bytes.

    Raises:
        FileNotFoundError: on reading, if a part is missing.
    """

    def __init__(self, manifest: dict, layout: Layout, start: int, length: int) -> None:
        self._chunks = self._read_all(manifest, layout, start, start + length)
        self._rest = b""
        self.digest = hashlib.sha256()

    @staticmethod
    def _read_all(manifest: dict, layout: Layout, start: int, end: int) -> Iterator[bytes]:
        at = 0
        for part in manifest["parts"]:
            begin, at = at, at + part["bytes"]
            if at <= start or begin >= end:
                continue
            with (layout.parts / part["name"]).open("rb") as file:
                file.seek(max(start - begin, 0))
                left = min(end, at) - max(start, begin)
                while left > 0 and (chunk := file.read(min(CHUNK_BYTES, left))):
                    left -= len(chunk)
                    yield chunk

    def readable(self) -> bool:
        """See ``io.RawIOBase``."""
        return True

    def readinto(self, buffer: bytearray) -> int:
        """See ``io.RawIOBase``.

        Args:
            buffer: where to.

        Returns:
            Bytes read.
        """
        if not self._rest:
            self._rest = next(self._chunks, b"")
            self.digest.update(self._rest)
        taken, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


def install(manifest: dict, layout: Layout) -> list[str]:
    """Install every distribution whose parts are here and that is not installed yet.

    Args:
        manifest: lists the archives.
        layout: the target.

    Returns:
        Names of those that could not be installed, because parts are missing.

    Raises:
        Wrong: an archive is damaged.
    """
    layout.site.mkdir(parents=True, exist_ok=True)
    layout.marks.mkdir(parents=True, exist_ok=True)
    absent = set(missing_parts(manifest, layout))
    waiting = []
    for archive in manifest["archives"]:
        mark = layout.marks / archive["distribution"]
        if mark.exists() and mark.read_text() == archive["sha256"]:
            continue
        if absent & set(_parts_of(archive, manifest)):
            waiting.append(archive["distribution"])
            continue
        print(f"installing {archive['distribution']} {archive['version']}", flush=True)
        _unpack(archive, manifest, layout)
        mark.write_text(archive["sha256"])
    return waiting


def _parts_of(archive: dict, manifest: dict) -> Iterator[str]:
    at, start, end = 0, archive["start"], archive["start"] + archive["bytes"]
    for part in manifest["parts"]:
        begin, at = at, at + part["bytes"]
        if begin < end and at > start:
            yield part["name"]


def _unpack(archive: dict, manifest: dict, layout: Layout) -> None:
    stream = Stream(manifest, layout, archive["start"], archive["bytes"])
    try:
        with (
            lzma.open(io.BufferedReader(stream, CHUNK_BYTES)) as unpacked,
            tarfile.open(fileobj=unpacked, mode="r|") as files,
        ):
            files.extractall(layout.site, filter="data")
            while unpacked.read(CHUNK_BYTES):
                pass
    except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
        raise Wrong(f"{archive['distribution']}: cannot be unpacked ({error})") from None
    if stream.digest.hexdigest() != archive["sha256"]:
        raise Wrong(f"{archive['distribution']}: its checksum is wrong; prepare the parts again")


def link_project(layout: Layout, repository: Path) -> None:
    """Make ``econoserve`` and ``econoserve.patches`` importable, and its plug-ins findable.

    Args:
        layout: the target.
        repository: a checkout of EconoServe.

    Raises:
        Wrong: it is no such checkout.
    """
    sources = repository / "python" / "econoserve"
    if not sources.is_dir():
        raise Wrong(f"--repository {repository}: has no python/econoserve in it")
    shutil.rmtree(layout.project, ignore_errors=True)
    package = layout.project / "econoserve"
    package.mkdir(parents=True)
    for source in (*sources.iterdir(), repository / "patches"):
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    described = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    metadata = layout.project / f"econoserve-{described['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {described['name']}\nVersion: {described['version']}\n"
    )
    lines = []
    for group, points in described["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), ""]
    (metadata / "entry_points.txt").write_text("\n".join(lines))


def link_libraries(layout: Layout) -> list[str]:
    """Let libraries in the target find NVIDIA's that the machine has, by their relative path.

    Args:
        layout: the target.

    Returns:
        Folders that were linked.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    linked = []
    for folder in map(Path, folders):
        if layout.site in folder.parents:
            continue
        for source in sorted(folder.iterdir()):
            link = layout.site / "nvidia" / source.name
            if source.is_dir() and not link.is_symlink() and not link.exists():
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(source)
            if link.is_symlink():
                linked.append(source.name)
    return linked


def doctor(layout: Layout, repository: Path) -> int:
    """Run ``econoserve doctor`` on what was installed.

    Args:
        layout: the target.
        repository: a checkout of EconoServe.

    Returns:
        Its exit status.
    """
    environment = {**os.environ, **layout.environment(repository)}
    command = [sys.executable, "-m", "econoserve.cli", "doctor"]
    return subprocess.run(command, env=environment, check=False).returncode


def main(argv: list[str] | None = None) -> int:
    """Take parts in and install what is complete.

    Args:
        argv: arguments; by default those of the command line.

    Returns:
        ``DONE``, ``FAILED`` or ``INCOMPLETE``.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arrived", type=Path, help="folder with parts and the manifest")
    parser.add_argument("--target", type=Path, required=True, help="private folder to install to")
    parser.add_argument("--repository", type=Path, default=ROOT, help="default: this checkout")
    parser.add_argument("--no-doctor", action="store_true", help="do not run econoserve doctor")
    options = parser.parse_args(argv)
    layout, repository = Layout(options.target.absolute()), options.repository.absolute()
    try:
        manifest = take_in(options.arrived, layout)
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        if here != manifest["python"]:
            raise Wrong(f"Python {here}: the parts are for {manifest['python']}; run it with that")
        waiting = install(manifest, layout)
        if waiting:
            print(f"missing: {', '.join(missing_parts(manifest, layout))}")
            print(f"not installed for want of them: {', '.join(waiting)}")
            return INCOMPLETE
        link_project(layout, repository)
        linked = link_libraries(layout)
    except (Wrong, OSError) as error:
        print(f"assemble: error: {error}", file=sys.stderr)
        return FAILED
    print(f"libraries of the machine: {', '.join(linked) or 'none found'}")
    status = DONE if options.no_doctor else doctor(layout, repository)
    exports = [f"export {name}={value}" for name, value in layout.environment(repository).items()]
    (layout.target / ENVIRONMENT).write_text("\n".join(exports) + "\n")
    print("\n".join([*exports, f"# the same: . {layout.target / ENVIRONMENT}"]))
    return DONE if status == 0 else FAILED


if __name__ == "__main__":
    sys.exit(main())
