"""The objectives of a workload's requests, from what the command line says of them."""

from collections.abc import Sequence
from dataclasses import replace

from econoserve.core.types import Slo
from econoserve.workload.trace import TraceRequest

NAMES = {"ttft": "ttft_s", "tpot": "tpot_s", "e2e": "e2e_s"}


def parse_slo(text: str) -> Slo:
    """Read objectives such as ``ttft=0.25,tpot=0.1`` or ``e2e=30``, in seconds.

    Args:
        text: pairs of name and seconds; empty for none.

    Returns:
        The objectives.

    Raises:
        ValueError: a name is unknown or stated twice, or a time is not more than 0.
    """
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name not in NAMES:
            raise ValueError(f"slo {part!r}: give ttft=, tpot= or e2e= and seconds")
        if NAMES[name] in found:
            raise ValueError(f"slo {text!r}: {name} is stated twice; state it once")
        try:
            seconds = float(value)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise ValueError(f"slo {part!r}: give a time in seconds, more than 0")
        found[NAMES[name]] = seconds
    return Slo(**found)


def with_slo(requests: Sequence[TraceRequest], slo: Slo) -> list[TraceRequest]:
    """Give all requests the same objectives.

    Args:
        requests: of a workload.
        slo: their objectives; none depends on a request's true length.

    Returns:
        The requests.
    """
    return [replace(request, slo=slo) for request in requests]
