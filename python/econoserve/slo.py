"""SLOs between a request and its report: read, check, carry, resolve, and judge.

Owns the names and units of the request's fields (milliseconds outside, seconds inside). The HTTP
process only checks and carries them; which SLO a class stands for is resolved in the scheduler,
where the classes are known. It must not know SGLang: it works on plain dicts and headers.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from econoserve.core.types import Slo

FIELD = "econoserve"
"""Key in ``custom_params`` that carries our fields."""

NAMES = ("ttft_ms", "tpot_ms", "e2e_ms")
"""SLO fields in ``custom_params["econoserve"]``, in milliseconds."""

HEADERS = {"ttft_ms": "x-slo-ttft-ms", "tpot_ms": "x-slo-tpot-ms", "e2e_ms": "x-slo-e2e-ms"}
"""HTTP header of each field, the convention of the gateway-API inference extension."""

HEADER_PREFIX = "x-slo-"
"""Headers that start so are ours; an unknown one is a mistake."""

CLASS_HEADER = "x-slo-class"
"""HTTP header that names an SLO class, as ``slo_class`` does."""

DEFAULT_CLASS = "default"
"""The class of requests that name none; without objectives unless it is configured."""

DEFAULT_TIERS = ("auto", DEFAULT_CLASS)
"""Values of OpenAI's ``service_tier`` that ask for no class in particular."""


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


def _tokens(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}={value!r}: give a positive whole number of tokens, such as 200")
    return value


def _name(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}={value!r}: give a name, such as 'priority'")
    return value


def _user(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}={value!r}: give a name, such as 'ann'")
    return value


READERS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(NAMES, _milliseconds),
    "expected_tokens": _tokens,
    "slo_class": _name,
    "service_tier": _name,
    "user": _user,
}
"""What checks each field of ``custom_params["econoserve"]``."""

HEADER_FIELDS = {**{header: name for name, header in HEADERS.items()}, CLASS_HEADER: "slo_class"}
"""The field that each of our headers sets."""


def read_fields(where: str, fields: Any) -> dict[str, Any]:
    """Check our fields of a request body.

    Args:
        where: the place they stand, for errors.
        fields: what the request holds there.

    Returns:
        The fields that are set: objectives in milliseconds, ``expected_tokens``, and names.

    Raises:
        ValueError: it is no dict, a name is unknown, or a value is out of range.
    """
    known = ", ".join(READERS)
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}={fields!r}: give an object with any of {known}")
    read = {}
    for name, value in fields.items():
        if name not in READERS:
            raise ValueError(f"{where}.{name}: unknown field, give any of {known}")
        if value is not None:
            read[name] = READERS[name](f"{where}.{name}", value)
    return read


def read_headers(headers: Mapping[str, str]) -> dict[str, Any]:
    """Check the SLO headers of a request.

    Args:
        headers: HTTP headers, by names in lower case.

    Returns:
        The fields that are set: objectives in milliseconds, and ``slo_class``.

    Raises:
        ValueError: a value is not a positive number, or an ``x-slo-`` header is unknown.
    """
    read = {}
    for header in headers:
        if not header.startswith(HEADER_PREFIX):
            continue
        if header not in HEADER_FIELDS:
            raise ValueError(f"{header}: unknown header, give any of {', '.join(HEADER_FIELDS)}")
        name = HEADER_FIELDS[header]
        read[name] = READERS[name](header, headers[header])
    return read


def read_classes(texts: Iterable[str]) -> dict[str, dict[str, float]]:
    """Read SLO classes as they are given on a command line.

    Args:
        texts: each ``NAME=ttft:MS,tpot:MS,e2e:MS``, some of the three.

    Returns:
        By name, the fields in milliseconds, named as in ``NAMES``.

    Raises:
        ValueError: one is not of that form, or a name is given twice.
    """
    classes: dict[str, dict[str, float]] = {}
    for text in texts:
        name, separator, objectives = text.partition("=")
        parts = [part.partition(":") for part in objectives.split(",")]
        known = all(f"{key}_ms" in NAMES for key, _, _ in parts)
        if not name or not separator or not known or name in classes:
            raise ValueError(
                f"{text!r}: give each NAME once, as in priority=ttft:500,tpot:50,e2e:20000 "
                "(milliseconds)"
            )
        classes[name] = {f"{key}_ms": _milliseconds(f"{text!r}: {key}", ms) for key, _, ms in parts}
    return classes


def attach_fields(
    sampling_params: Any, headers: Mapping[str, str], service_tier: Any = None, user: Any = None
) -> Any:
    """Check what a request says to the scheduler and leave it where that finds it.

    Args:
        sampling_params: SGLang's sampling parameters: a dict, one dict per prompt, or ``None``.
        headers: HTTP headers; a header wins over the body's field of that name.
        service_tier: OpenAI's field of that name in the request's body.
        user: likewise.

    Returns:
        The sampling parameters, copied where something had to be added.

    Raises:
        ValueError: a value is out of range, or a field or an ``x-slo-`` header is unknown.
    """
    named = {} if service_tier is None else {"service_tier": _name("service_tier", service_tier)}
    # Any server takes an empty one.
    if user:
        named["user"] = _user("user", user)
    return _attach(sampling_params, named, read_headers(headers))


def _attach(sampling_params: Any, weaker: dict[str, Any], stronger: dict[str, Any]) -> Any:
    if isinstance(sampling_params, (list, tuple)):
        return [_attach(one, weaker, stronger) for one in sampling_params]
    params = sampling_params or {}
    custom = params.get("custom_params") or {}
    if not isinstance(custom, Mapping):
        if weaker or stronger:
            field = next(iter({**stronger, **weaker}))
            raise ValueError(f"custom_params={custom!r}: give an object to send {field} with")
        return sampling_params
    body = read_fields(f"custom_params.{FIELD}", custom[FIELD]) if FIELD in custom else {}
    fields = {**weaker, **body, **stronger}
    if not fields:
        return sampling_params
    return {**params, "custom_params": {**custom, FIELD: fields}}


def _fields_of(custom_params: Any) -> dict[str, Any]:
    if not isinstance(custom_params, Mapping) or FIELD not in custom_params:
        return {}
    return read_fields(f"custom_params.{FIELD}", custom_params[FIELD])


def _class_of(fields: Mapping[str, Any], classes: Mapping[str, Any]) -> str:
    name = fields.get("slo_class")
    if name is not None:
        known = dict.fromkeys((*classes, DEFAULT_CLASS))
        if name not in known:
            raise ValueError(
                f"slo_class={name!r} (custom_params.{FIELD} or header {CLASS_HEADER}): unknown "
                f"class, give one of {', '.join(known)}"
            )
        return name
    tier = fields.get("service_tier")
    return tier if tier in classes and tier not in DEFAULT_TIERS else DEFAULT_CLASS


def resolve_slo(custom_params: Any, classes: Mapping[str, Mapping[str, float]]) -> tuple[str, Slo]:
    """The SLO of a request that reached the scheduler, by its class and its own objectives.

    ``slo_class`` wins over ``service_tier``. A tier that is no class, ``auto`` and ``default`` mean
    class ``default``: OpenAI's clients send tiers to any server.

    Args:
        custom_params: the request's ``custom_params``.
        classes: objectives in milliseconds by class, from ``read_classes``.

    Returns:
        The class's name, and the objectives in seconds: the class's, where the request has none of
        its own.

    Raises:
        ValueError: ``slo_class`` is unknown, a field is unknown, or a value is out of range.
    """
    fields = _fields_of(custom_params)
    name = _class_of(fields, classes)
    limits = {**classes.get(name, {}), **fields}
    seconds = {key.removesuffix("_ms") + "_s": limits[key] / 1e3 for key in NAMES if key in limits}
    return name, Slo(**seconds)


def expected_tokens_of(custom_params: Any) -> int | None:
    """The response length that a request's sender expects.

    Args:
        custom_params: the request's ``custom_params``.

    Returns:
        Its ``expected_tokens``, or ``None``.

    Raises:
        ValueError: a field is unknown, or a value is out of range.
    """
    return _fields_of(custom_params).get("expected_tokens")


def user_of(custom_params: Any) -> str:
    """Whom a request comes from.

    Args:
        custom_params: the request's ``custom_params``.

    Returns:
        The ``user`` that it states, empty without one.

    Raises:
        ValueError: a field is unknown, or a value is out of range.
    """
    return _fields_of(custom_params).get("user", "")


def complete_report(
    report: dict[str, Any], first_token_s: float, finished_s: float, streamed: bool
) -> dict[str, Any]:
    """Add what the caller saw to the scheduler's report, and judge the SLO.

    Args:
        report: the scheduler's part, with ``slo`` (milliseconds or ``None``) and
            ``output_tokens``; its ``decode_ms``, first token to last, is used and left out. With
            ``retry_after_s`` the request was refused, which meets no SLO.
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
        kept = (seen[name] is None or seen[name] <= limit for name, limit in slo.items())
        met = report.get("retry_after_s") is None and all(kept)
    rounded = {name: None if value is None else round(value, 3) for name, value in seen.items()}
    return {**report, **rounded, "slo_met": met}
