"""What is measured in which order, and the files that keep it, so that a run can be resumed.

Owns the keys. A record is written when its run is done, as a line of its own; a line that was cut
off counts as not written.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Cell:
    """The key of a run.

    Attributes:
        repeat: from 0.
        kvc: size of the KVC, by its name.
        system: its name.
        workload: its name.
        load: how much arrives, in the unit of ``workloads``.
    """

    repeat: int
    kvc: str
    system: str
    workload: str
    load: float

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Cell":
        """The key of a record.

        Args:
            record: with the key's fields.

        Returns:
            The key.
        """
        return cls(**{name: record[name] for name in cls.__slots__})


LATE_S = 0.1
"""A run in which a request was sent later than this after it was due: the load generator got no
CPU, and times at the client say little about the server."""


def is_late(record: Mapping[str, Any]) -> bool:
    """Whether the load generator was late in a run.

    Args:
        record: of the run.

    Returns:
        Whether its greatest delay exceeds ``LATE_S``.
    """
    return record["client_lag_s"] > LATE_S


class SettingsDiffer(ValueError):
    """A folder holds records of other settings."""


def order(
    repeats: int,
    sizes: Sequence[str],
    systems: Sequence[str],
    workloads: Sequence[str],
    loads: Sequence[float],
) -> list[list[Cell]]:
    """The order of all runs.

    Args:
        repeats: runs of each kind.
        sizes: of the KVC.
        systems: in turns: another one goes first in every repeat and at every size.
        workloads: in this order on every server.
        loads: in this order for every workload.

    Returns:
        The runs of each server, one server after the other.
    """
    servers = []
    for repeat in range(repeats):
        for number, size in enumerate(sizes):
            first = (repeat + number) % len(systems)
            for system in (*systems[first:], *systems[:first]):
                servers.append(
                    [Cell(repeat, size, system, name, load) for name in workloads for load in loads]
                )
    return servers


def missing(
    servers: Sequence[Sequence[Cell]], done: Sequence[Mapping[str, Any]]
) -> list[list[Cell]]:
    """What is left to measure.

    Args:
        servers: all runs.
        done: records.

    Returns:
        The runs without a record, of each server that has any, in their order.
    """
    keys = {Cell.of(record) for record in done}
    left = [[cell for cell in cells if cell not in keys] for cells in servers]
    return [cells for cells in left if cells]


class Store:
    """The files of a run: a line per run in two, its settings and what the systems said in others.

    Args:
        folder: is made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._records = folder / "records.jsonl"
        self._requests = folder / "requests.jsonl"
        self._settings = folder / "settings.json"
        self._facts = folder / "systems.json"

    def open(self, settings: Mapping[str, Any]) -> None:
        """Note the settings, or see that they are those of the records that are there.

        Args:
            settings: plain values that change what a run is.

        Raises:
            SettingsDiffer: they are others; names the field.
        """
        plain = json.loads(json.dumps(settings))
        if self._settings.exists():
            found = json.loads(self._settings.read_text())
            _compare(self._settings.name, found, plain, "--out")
        else:
            self._settings.write_text(json.dumps(plain, indent=1) + "\n")

    def read_facts(self) -> dict[str, Any]:
        """What was learned of the systems so far.

        Returns:
            By system.
        """
        return json.loads(self._facts.read_text()) if self._facts.exists() else {}

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Keep what was learned of the systems.

        Args:
            facts: by system.
        """
        self._facts.write_text(json.dumps(facts, indent=1) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All records.

        Returns:
            In the order of measurement; a cell's last one if it has several.
        """
        return list({Cell.of(record): record for record in _lines(self._records)}.values())

    def read_requests(self) -> dict[Cell, dict[str, Any]]:
        """What came of each request.

        Returns:
            Columns by key.
        """
        return {Cell.of(row): row for row in _lines(self._requests)}

    def add(self, cell: Cell, record: Mapping[str, Any], requests: Mapping[str, Any]) -> None:
        """Keep a run.

        Args:
            cell: its key.
            record: its figures.
            requests: columns, one value per request.
        """
        for path, fields in ((self._requests, requests), (self._records, record)):
            text = json.dumps({**asdict(cell), **fields})
            with path.open("ab+") as file:
                if file.tell() and path.read_bytes()[-1:] != b"\n":
                    file.write(b"\n")  # the line before was cut off
                file.write(text.encode() + b"\n")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off


def merge(
    path: Path,
    terms: Mapping[str, Any],
    facts: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> None:
    """Write records to a file of results, beside those of other cells that are there.

    Args:
        path: the file.
        terms: settings that all its records share.
        facts: what else is to be known, of the last measurement; what is known of systems that
            were not part of it stays.
        records: they replace those of the same cells.

    Raises:
        SettingsDiffer: the file holds records of other terms; names the first that differs.
    """
    kept: dict[Cell, Mapping[str, Any]] = {}
    plain = json.loads(json.dumps(terms))
    if path.exists():
        found = json.loads(path.read_text())
        _compare(path.name, found["terms"], plain, "--json")
        kept = {Cell.of(record): record for record in found["records"]}
        systems = {**found["facts"].get("systems", {}), **facts.get("systems", {})}
        facts = {**facts, "systems": systems}
    kept.update({Cell.of(record): record for record in records})
    rows = sorted(kept, key=lambda c: (c.workload, c.kvc, c.load, c.repeat, c.system))
    body = ",\n".join(json.dumps(kept[cell]) for cell in rows)
    head = f'"terms": {json.dumps(plain)},\n"facts": {json.dumps(dict(facts))}'
    path.write_text(f'{{{head},\n"records": [\n{body}\n]}}\n', encoding="utf-8")


def _compare(file: str, found: Mapping[str, Any], wanted: Mapping[str, Any], option: str) -> None:
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise SettingsDiffer(
                f"{file}: {name} was {found.get(name)!r} and is now {wanted[name]!r}; give another "
                f"{option}, or the same settings"
            )
