"""SLOs between a request and its report: read, check, carry, and judge.

Owns the names and units of the request's fields (milliseconds outside, seconds inside). It must
not know SGLang: it works on plain dicts and headers.
"""

import math
from collections.abc import Mapping
from typing import Any

from econoserve.core.types import Slo

FIELD = "econoserve"
"""Key in ``custom_params`` that carries our fields."""

NAMES = ("ttft_ms", "tpot_ms", "e2e_ms")
"""SLO fields in ``custom_params["econoserve"]``, in milliseconds."""

HEADERS = {"ttft_ms": "x-slo-ttft-ms", "tpot_ms": "x-slo-tpot-ms", "e2e_ms": "x-slo-e2e-ms"}
"""HTTP header of each field, the convention of the gateway-API inference extension."""


def _milliseconds(where: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{where}={value!r}: give a positive number of milliseconds, such as 500")
    return number


def read_fields(where: str, fields: Any) -> dict[str, float]:
    """Check the SLO fields of a request body.

    Args:
        where: the place they stand, for errors.
        fields: what the request holds there.

    Returns:
        The fields that are set, in milliseconds.

    Raises:
        ValueError: it is no dict, a name is unknown, or a value is not a positive number.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}={fields!r}: give an object with any of {', '.join(NAMES)}")
    slo = {}
    for name, value in fields.items():
        if name not in NAMES:
            raise ValueError(f"{where}.{name}: unknown field, give any of {', '.join(NAMES)}")
        if value is not None:
            slo[name] = _milliseconds(f"{where}.{name}", value)
    return slo


def read_headers(headers: Mapping[str, str]) -> dict[str, float]:
    """Check the SLO headers of a request.

    Args:
        headers: HTTP headers, looked up in lower case.

    Returns:
        The fields that are set, in milliseconds.

    Raises:
        ValueError: a value is not a positive number.
    """
    return {
        name: _milliseconds(header, headers[header])
        for name, header in HEADERS.items()
        if headers.get(header) is not None
    }


def attach_slo(sampling_params: Any, headers: Mapping[str, str]) -> Any:
    """Check a request's SLOs and leave them where the scheduler finds them.

    Args:
        sampling_params: SGLang's sampling parameters: a dict, one dict per prompt, or ``None``.
        headers: HTTP headers; a header wins over the body's field of that name.

    Returns:
        The sampling parameters, copied where something had to be added.

    Raises:
        ValueError: an SLO is not a positive number, or a field is unknown.
    """
    if isinstance(sampling_params, (list, tuple)):
        return [attach_slo(one, headers) for one in sampling_params]
    params = sampling_params or {}
    custom = params.get("custom_params") or {}
    slo = read_headers(headers)
    if slo and not isinstance(custom, Mapping):
        raise ValueError(f"custom_params={custom!r}: give an object to send an SLO header with")
    if isinstance(custom, Mapping) and FIELD in custom:
        slo = {**read_fields(f"custom_params.{FIELD}", custom[FIELD]), **slo}
    if not slo:
        return sampling_params
    return {**params, "custom_params": {**custom, FIELD: slo}}


def slo_of(custom_params: Any) -> Slo:
    """The SLO that a request brought to the scheduler.

    Args:
        custom_params: the request's ``custom_params``.

    Returns:
        Its objectives in seconds.

    Raises:
        ValueError: a value is not a positive number, or a field is unknown.
    """
    if not isinstance(custom_params, Mapping) or FIELD not in custom_params:
        return Slo()
    fields = read_fields(f"custom_params.{FIELD}", custom_params[FIELD])
    seconds = {name: value / 1e3 for name, value in fields.items()}
    return Slo(
        ttft_s=seconds.get("ttft_ms"), tpot_s=seconds.get("tpot_ms"), e2e_s=seconds.get("e2e_ms")
    )


def complete_report(
    report: dict[str, Any], first_token_s: float, finished_s: float, streamed: bool
) -> dict[str, Any]:
    """Add what the caller saw to the scheduler's report, and judge the SLO.

    Args:
        report: the scheduler's part, with ``slo`` (milliseconds or ``None``) and
            ``output_tokens``; its ``decode_ms``, first token to last, is used and left out.
        first_token_s: arrival to first token.
        finished_s: arrival to last token.
        streamed: whether the caller saw tokens as they came; if not, the scheduler knows when
            the first was there.

    Returns:
        A new report with ``ttft_ms``, ``tpot_ms`` (``None`` for a single token), ``e2e_ms`` and
        ``slo_met`` (``None`` without an SLO).
    """
    report = dict(report)
    decode_s = report.pop("decode_ms") / 1e3
    if not streamed:
        first_token_s = finished_s - decode_s
    decoded = report["output_tokens"] - 1
    seen = {
        "ttft_ms": first_token_s * 1e3,
        "tpot_ms": (finished_s - first_token_s) * 1e3 / decoded if decoded > 0 else None,
        "e2e_ms": finished_s * 1e3,
    }
    slo = report.get("slo")
    met = None
    if slo:
        met = all(seen[name] is None or seen[name] <= limit for name, limit in slo.items())
    rounded = {name: None if value is None else round(value, 3) for name, value in seen.items()}
    return {**report, **rounded, "slo_met": met}
