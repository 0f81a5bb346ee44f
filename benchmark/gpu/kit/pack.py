"""Packs wheels, without what is left out of them, and cuts the result into parts.

Owns the format that ``assemble.py`` reads: archives (``tar.xz``, one per distribution) one after
another in one stream, which is cut into parts; a manifest says where each begins and ends.
"""

import fnmatch
import hashlib
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmark.gpu.assemble import sha256_of
from benchmark.gpu.kit.blank import blank
from benchmark.gpu.kit.wheels import CHUNK_BYTES

FORMAT = 1
"""Rises when archives that were packed before must be packed again, or the manifest changes."""

PRESET = 6
MANIFEST = "manifest.json"
PART_NAME = "part-{:02d}"


@dataclass(frozen=True, slots=True)
class Archive:
    """A packed distribution.

    Attributes:
        distribution: canonical name.
        version: its version.
        bytes: size of the archive.
        sha256: its checksum.
        installed_bytes: size of its files.
        left_out_bytes: size of the files of the wheel that are not in it.
        blanked_bytes: bytes of its files that were overwritten with zeros.
    """

    distribution: str
    version: str
    bytes: int
    sha256: str
    installed_bytes: int
    left_out_bytes: int
    blanked_bytes: int


def installed_path(member: str) -> str | None:
    """Where a file of a wheel is installed.

    Args:
        member: its path in the wheel.

    Returns:
        Its path in the private target; ``None`` for what is not installed.
    """
    head, _, rest = member.partition("/")
    if not head.endswith(".data"):
        return member
    kind, _, inner = rest.partition("/")
    if kind in ("purelib", "platlib"):
        return inner
    return f"bin/{inner}" if kind == "scripts" else None


def pack(
    wheel: Path, distribution: str, version: str, strip: Iterable[str], architecture: int, to: Path
) -> Archive:
    """Pack a wheel, unless the same was packed before.

    Args:
        wheel: the file.
        distribution: canonical name.
        version: its version.
        strip: patterns of paths that are left out.
        architecture: compute capability whose GPU code is kept, such as 90.
        to: folder of archives.

    Returns:
        The archive; its file is ``archive_path(to, archive.distribution)``.
    """
    patterns = sorted(strip)
    key = json.dumps([FORMAT, PRESET, sha256_of(wheel), patterns, architecture])
    path, notes = archive_path(to, distribution), to / f"{distribution}.json"
    if path.exists() and notes.exists():
        known = json.loads(notes.read_text())
        if known["key"] == key and path.stat().st_size == known["archive"]["bytes"]:
            return Archive(**known["archive"])
    to.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    sizes = _write(wheel, patterns, architecture, partial)
    partial.rename(path)
    archive = Archive(distribution, version, path.stat().st_size, sha256_of(path), *sizes)
    notes.write_text(json.dumps({"key": key, "archive": asdict(archive)}))
    return archive


def archive_path(folder: Path, distribution: str) -> Path:
    """The file of an archive.

    Args:
        folder: of archives.
        distribution: canonical name.

    Returns:
        Its path.
    """
    return folder / f"{distribution}.tar.xz"


def _write(
    wheel: Path, patterns: Sequence[str], architecture: int, to: Path
) -> tuple[int, int, int]:
    installed = left_out = blanked = 0
    with (
        zipfile.ZipFile(wheel) as source,
        lzma.open(to, "wb", preset=PRESET) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        # Alike files next to each other pack better.
        members = sorted(
            source.infolist(), key=lambda one: (Path(one.filename).suffix, one.filename)
        )
        for member in members:
            path = installed_path(member.filename)
            if member.is_dir() or path is None:
                continue
            if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
                left_out += member.file_size
                continue
            content = bytearray(source.read(member))
            blanked += blank(content, architecture)
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            entry.mode = 0o755 if (member.external_attr >> 16) & 0o111 else 0o644
            archive.addfile(entry, io.BytesIO(content))
            installed += len(content)
    return installed, left_out, blanked


def cut(archives: Sequence[Archive], folder: Path, to: Path, part_bytes: int) -> list[dict]:
    """Write the archives one after another into parts.

    Args:
        archives: in the order in which they are installed.
        folder: of archives.
        to: folder of parts; parts of an earlier run are removed.
        part_bytes: greatest size of a part.

    Returns:
        Name, bytes and SHA-256 of each part.
    """
    to.mkdir(parents=True, exist_ok=True)
    for old in to.glob(PART_NAME.format(0)[:-2] + "*"):
        old.unlink()
    parts: list[dict[str, Any]] = []
    file, room, digest = None, 0, hashlib.sha256()

    def close() -> None:
        if file is not None:
            file.close()
            size = part_bytes - room
            parts.append(
                {"name": Path(file.name).name, "bytes": size, "sha256": digest.hexdigest()}
            )

    for archive in archives:
        with archive_path(folder, archive.distribution).open("rb") as source:
            while chunk := source.read(min(CHUNK_BYTES, room) or CHUNK_BYTES):
                if room == 0:
                    close()
                    file = (to / PART_NAME.format(len(parts) + 1)).open("wb")
                    room, digest = part_bytes, hashlib.sha256()
                head = chunk[:room]
                file.write(head)
                digest.update(head)
                room -= len(head)
                source.seek(len(head) - len(chunk), io.SEEK_CUR)
    close()
    return parts


def manifest(
    archives: Sequence[Archive],
    parts: Sequence[Mapping[str, Any]],
    python: str,
    decisions: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What ``assemble.py`` needs to know.

    Args:
        archives: in the order of the stream.
        parts: as ``cut`` returned them.
        python: the Python they are for, such as ``3.12``.
        decisions: what travels and what not, as plain values.

    Returns:
        Plain values.
    """
    listed, start = [], 0
    for archive in archives:
        listed.append({**asdict(archive), "start": start})
        start += archive.bytes
    return {
        "format": FORMAT,
        "python": python,
        "parts": list(parts),
        "archives": listed,
        "decisions": list(decisions),
    }
