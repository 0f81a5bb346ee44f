"""Which distributions travel to a machine without a network, and why each other one does not.

Pure functions over names, versions and requirements; nothing is looked up on a network.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).resolve().parent
OURS = "econoserve"
"""Its exact pins are for development and do not say what it needs."""


class Verdict(Enum):
    """What becomes of a distribution."""

    TRAVELS = "travels"
    SERVED = "is there"
    LEFT_OUT = "left out"


@dataclass(frozen=True, slots=True)
class Decision:
    """One distribution.

    Attributes:
        name: canonical name.
        version: the one that runs here.
        verdict: what becomes of it.
        reason: why, for readers.
    """

    name: str
    version: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Target:
    """The machine without a network.

    Attributes:
        python: its Python, such as ``3.12``.
        glibc: its C library, such as ``2.39``.
        cuda_architecture: of its GPU, such as 90.
        installed: versions by canonical name; ``None`` where only the name is known.
    """

    python: str
    glibc: str
    cuda_architecture: int
    installed: dict[str, str | None]

    @classmethod
    def read(cls, path: Path = FOLDER / "target.json") -> "Target":
        """Read a description.

        Args:
            path: a JSON file with the attributes.

        Returns:
            The target.
        """
        return cls(**json.loads(path.read_text()))

    def with_installed(self, pip_list: Path) -> "Target":
        """The same machine with what ``pip list --format json`` printed there.

        Args:
            pip_list: its output.

        Returns:
            A target that knows all versions.

        Raises:
            ValueError: the file is no such output.
        """
        try:
            rows = json.loads(pip_list.read_text())
            found = {str(canonicalize_name(row["name"])): row["version"] for row in rows}
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"--installed {pip_list.name}: {error!r}; give the output of "
                "`python -m pip list --format json`"
            ) from None
        return Target(self.python, self.glibc, self.cuda_architecture, found)

    def environment(self) -> dict[str, str]:
        """Values of the markers in requirements."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": "x86_64",
            "os_name": "posix",
        }


@dataclass(frozen=True, slots=True)
class Rules:
    """What cannot be seen in imports and requirements; each entry says why.

    Attributes:
        added: needed, though no traced program imports them.
        linked: loaded as shared libraries by the distribution of that name: its requirements count
            as imported.
        forced: travel although the target has one that satisfies all requirements.
        served: the target's serve although a requirement says otherwise.
        left_out: imported only where a missing one is tolerated, or not on CUDA.
        strip: files that are left out, as patterns by distribution.
    """

    added: dict[str, str]
    linked: dict[str, str]
    forced: dict[str, str]
    served: dict[str, str]
    left_out: dict[str, str]
    strip: dict[str, dict[str, str]]

    @classmethod
    def read(cls, path: Path = FOLDER / "rules.json") -> "Rules":
        """Read the rules.

        Args:
            path: a JSON file with the attributes.

        Returns:
            The rules.
        """
        return cls(**json.loads(path.read_text()))


def requirements_here(name: str) -> list[Requirement]:
    """What an installed distribution requires.

    Args:
        name: its name.

    Returns:
        Its requirements, with their markers; none if it is not installed.
    """
    try:
        return [Requirement(line) for line in requires(name) or ()]
    except PackageNotFoundError:
        return []


def linked_names(
    roots: Iterable[str], requirements: Mapping[str, list[Requirement]], target: Target
) -> set[str]:
    """Everything that some distributions require, and what that requires.

    Args:
        roots: their names.
        requirements: by name.
        target: for the markers.

    Returns:
        Canonical names of the required ones.
    """
    reached = set(roots)
    while True:
        extras = requested_extras(reached, requirements, target)
        more = {
            str(canonicalize_name(requirement.name))
            for name in reached
            for requirement in applying(requirements.get(name, ()), extras[name], target)
        }
        if more <= reached:
            return reached - set(roots)
        reached |= more


def requested_extras(
    names: Iterable[str], requirements: Mapping[str, list[Requirement]], target: Target
) -> dict[str, set[str]]:
    """The extras that distributions ask of each other.

    Args:
        names: the distributions.
        requirements: by name.
        target: for the markers.

    Returns:
        Extras by name, of all that were given and all that they require.
    """
    extras: dict[str, set[str]] = defaultdict(set)
    size = -1
    while size != sum(map(len, extras.values())):
        size = sum(map(len, extras.values()))
        for name in names:
            for requirement in applying(requirements.get(name, ()), extras[name], target):
                extras[str(canonicalize_name(requirement.name))] |= requirement.extras
    return extras


def applying(
    requirements: Iterable[Requirement], extras: Iterable[str], target: Target
) -> list[Requirement]:
    """The requirements whose markers hold.

    Args:
        requirements: all.
        extras: the extras that are asked for.
        target: for the markers.

    Returns:
        Those that apply on the target.
    """
    environments = [{**target.environment(), "extra": extra} for extra in ("", *sorted(extras))]
    return [
        requirement
        for requirement in requirements
        if requirement.marker is None
        or any(requirement.marker.evaluate(environment) for environment in environments)
    ]


def decide(
    needed: Mapping[str, str],
    requirements: Mapping[str, list[Requirement]],
    target: Target,
    rules: Rules,
) -> list[Decision]:
    """Subtract what the target has from what is needed.

    Args:
        needed: versions that run here, by canonical name.
        requirements: of the needed ones, by name.
        target: the machine.
        rules: exceptions.

    Returns:
        A decision for each, by name.
    """
    asked = _specifiers([one for one in needed if one not in rules.left_out], requirements, target)
    return [
        Decision(name, needed[name], *_verdict(name, asked.get(name, {}), target, rules))
        for name in sorted(needed)
        if name != OURS
    ]


def _specifiers(
    needed: Iterable[str], requirements: Mapping[str, list[Requirement]], target: Target
) -> dict[str, dict[str, SpecifierSet]]:
    """By distribution what each other one says about its version."""
    asked: dict[str, dict[str, SpecifierSet]] = {}
    asking = [name for name in needed if name != OURS]
    extras = requested_extras(asking, requirements, target)
    for name in asking:
        for requirement in applying(requirements.get(name, ()), extras[name], target):
            if requirement.specifier:
                wanted = str(canonicalize_name(requirement.name))
                asked.setdefault(wanted, {})[name] = requirement.specifier
    return asked


def _verdict(
    name: str, asked: Mapping[str, SpecifierSet], target: Target, rules: Rules
) -> tuple[Verdict, str]:
    if name in rules.left_out:
        return Verdict.LEFT_OUT, rules.left_out[name]
    if name not in target.installed:
        return Verdict.TRAVELS, "not there"
    if name in rules.forced:
        return Verdict.TRAVELS, rules.forced[name]
    there = target.installed[name]
    if name in rules.served:
        return Verdict.SERVED, f"{there or 'unknown version'}: {rules.served[name]}"
    for requirer, specifier in sorted(asked.items()):
        if there is None and any(one.operator in ("==", "<", "<=", "~=") for one in specifier):
            return Verdict.TRAVELS, f"{requirer} wants {specifier}, the version there is unknown"
        if there is not None and not specifier.contains(there, prereleases=True):
            return Verdict.TRAVELS, f"{requirer} wants {specifier}, {there} is there"
    return Verdict.SERVED, there or "unknown version, any will do"


def as_rows(decisions: Iterable[Decision]) -> list[dict[str, Any]]:
    """The decisions as plain values.

    Args:
        decisions: all.

    Returns:
        Dicts for tables and the manifest.
    """
    return [
        {
            "distribution": one.name,
            "version": one.version,
            "verdict": one.verdict.value,
            "reason": one.reason,
        }
        for one in decisions
    ]
