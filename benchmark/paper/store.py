"""Runs that were done, a line of JSON each, so that a second call goes on where the first ended.

Owns the file and what makes a line valid: the settings of its run, and the code that ran.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import econoserve

LAYERS = ("core", "policies", "prediction", "sim", "workload")
"""What decides the outcome of a run."""


class StoreError(ValueError):
    """A store that cannot be used."""


def code_version() -> str:
    """The code that decides the outcome of a run.

    Returns:
        A hash over the sources and data files of ``LAYERS``.
    """
    package = Path(econoserve.__file__).parent
    digest = hashlib.sha256()
    for layer in LAYERS:
        for path in sorted((package / layer).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.relative_to(package).as_posix().encode() + b"\0")
                digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Line:
    """What came of a run or a search.

    Attributes:
        attained: whether enough requests met their SLO.
        figures: of the run; empty if it was ended early, when it could not attain any more.
        wall_s: how long it took.
    """

    attained: bool
    figures: dict[str, Any]
    wall_s: float


class Store:
    """Lines by the settings of their run.

    Args:
        path: of the file; it is made with the first line.
        code: version of the code that runs; ``None`` to take that of the file's last line.
        keep: whether lines of other versions are valid, too.

    Raises:
        StoreError: a line cannot be read.

    Attributes:
        code: version of the code.
        stale: lines of other versions, which are not used.
        versions: of the lines that are used.
    """

    def __init__(self, path: Path, code: str | None, *, keep: bool = False) -> None:
        self._path = path
        self._lines: dict[str, Line] = {}
        self.versions: set[str] = set()
        self.stale = 0
        whole, read = self._read()
        if code is None and not read:
            raise StoreError(f"{path}: no run is in it; run python -m benchmark.paper first")
        self.code = code or read[-1]["code"]
        for fields in read:
            if keep or fields["code"] == self.code:
                self._keep(fields)
            else:
                self.stale += 1
        if not whole:
            path.write_text("".join(json.dumps(fields) + "\n" for fields in read))

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def wall_s(self) -> float:
        """How long all runs that are used took together."""
        return sum(line.wall_s for line in self._lines.values())

    def get(self, key: str) -> Line | None:
        """What came of a run.

        Args:
            key: of its settings.

        Returns:
            Its line, if it was done.
        """
        return self._lines.get(key)

    def add(self, settings: Mapping[str, Any], line: Line) -> None:
        """Keep what came of a run, in the file too.

        Args:
            settings: all that describes it.
            line: what came of it.
        """
        fields = {
            "code": self.code,
            "settings": dict(settings),
            "attained": line.attained,
            "figures": short(line.figures),
            "wall_s": round(line.wall_s, 2),
        }
        text = json.dumps(fields, sort_keys=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        self._keep(json.loads(text))

    def _keep(self, fields: Mapping[str, Any]) -> None:
        key = key_of(fields["settings"])
        self._lines[key] = Line(fields["attained"], fields["figures"], fields["wall_s"])
        self.versions.add(fields["code"])

    def _read(self) -> tuple[bool, list[dict[str, Any]]]:
        """All lines, and whether the last one is whole."""
        if not self._path.exists():
            return True, []
        text = self._path.read_text(encoding="utf-8")
        lines = text.splitlines()
        read = []
        for number, line in enumerate(lines, 1):
            try:
                fields = json.loads(line)
                fields["code"], fields["settings"], fields["attained"], fields["figures"]
                read.append(fields)
            except (ValueError, TypeError, KeyError) as error:
                # A call that was ended while it wrote leaves part of a line.
                if number == len(lines) and not text.endswith("\n"):
                    return False, read
                raise StoreError(
                    f"{self._path}, line {number}: not a line of this benchmark ({error!r}): "
                    "give another file, or delete that line"
                ) from None
        return text == "" or text.endswith("\n"), read


def short(value: Any) -> Any:
    """Numbers with six digits, which keeps the file small.

    Args:
        value: what JSON can hold.

    Returns:
        The same with rounded numbers.
    """
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: short(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [short(part) for part in value]
    return value


def key_of(settings: Mapping[str, Any]) -> str:
    """By what a line is found.

    Args:
        settings: all that describes a run.

    Returns:
        The same text for equal settings.
    """
    return json.dumps(settings, sort_keys=True)
