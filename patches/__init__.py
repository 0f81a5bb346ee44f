"""Everything EconoServe touches inside SGLang, one module per seam.

Each module declares ``TARGETS``: by owner, the upstream symbols it was written against and the
SHA-256 of their source in the tested release (``python -m econoserve.patches`` prints them).
``econoserve doctor`` and every launch compare them with what is installed; nothing else in this
package may reach into SGLang's internals.
"""

import hashlib
import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from typing import Any

TESTED_SGLANG = "0.5.23"
"""The release whose sources the fingerprints were taken from."""

MODULES = (
    "decode_batch",
    "host_kvc",
    "offline_benchmark",
    "output_report",
    "planned_prefill",
    "refused_streams",
    "request_intake",
    "retry_after",
    "scheduler_loop",
    "unpinned_lora",
)
"""The seams, as module names of this package."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A patched symbol whose source is not the tested one.

    Attributes:
        module: the seam that relies on it.
        symbol: its dotted name.
        problem: what differs, in words.
    """

    module: str
    symbol: str
    problem: str


def fingerprint(owner: str, name: str) -> str:
    """Hash the source of an upstream symbol.

    Args:
        owner: dotted name of its module or class.
        name: its name there.

    Returns:
        The SHA-256 of its source text, in hexadecimal.

    Raises:
        ImportError: the module cannot be imported.
        AttributeError: the owner has no such name.
    """
    source = inspect.getsource(inspect.unwrap(_upstream(owner, name)))
    return hashlib.sha256(source.encode()).hexdigest()


def _upstream(owner_name: str, name: str) -> Any:
    """Find SGLang's own definition, also where our subclass has taken its class's name."""
    owner = pkgutil.resolve_name(owner_name)
    if not isinstance(owner, type):
        return getattr(owner, name)
    for base in owner.__mro__:
        if base.__module__.startswith("sglang.") and name in vars(base):
            return getattr(base, name)
    raise AttributeError(f"{owner_name} has no attribute {name!r}")


def targets() -> list[tuple[str, str, str, str]]:
    """All declared targets.

    Returns:
        For each: the seam's module name, the owner, the symbol and its tested fingerprint.
    """
    declared = []
    for module in MODULES:
        owners = importlib.import_module(f"econoserve.patches.{module}").TARGETS
        for owner, symbols in owners.items():
            declared += [(module, owner, name, tested) for name, tested in symbols.items()]
    return declared


def check() -> list[Finding]:
    """Compare every target with the installed SGLang.

    Returns:
        One finding per symbol that is missing or changed; empty when all are as tested.
    """
    findings = []
    for module, owner, name, tested in targets():
        symbol = f"{owner}.{name}"
        try:
            found = fingerprint(owner, name)
        except (ImportError, AttributeError) as error:
            findings.append(Finding(module, symbol, f"not found ({error})"))
            continue
        if found != tested:
            findings.append(Finding(module, symbol, "its source changed"))
    return findings
