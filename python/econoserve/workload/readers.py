"""Reads the requests of trace files: times, lengths, and where there are any, prefix hashes.

Owns the files' formats. A file without times gives all requests at 0 s: who replays it draws
arrivals (``workload.arrivals``).
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from econoserve.prediction.request import CUTS, RequestFeatures, fingerprint, mixed
from econoserve.workload.trace import CAP_TOKENS, TraceError, TraceRequest, from_zero

COLUMNS = (
    ("ContextTokens", "GeneratedTokens"),
    ("num_prefill_tokens", "num_decode_tokens"),
    ("prompt_tokens", "output_tokens"),
    ("input_tokens", "output_tokens"),
    ("input_length", "output_length"),
)
"""Names that the columns of prompt and output tokens may have: Azure's, vidur's, and others'."""

TIMES: dict[str, Callable[[str], float]] = {
    # The seventh digit of Azure's seconds is more than Python reads.
    "TIMESTAMP": lambda text: datetime.fromisoformat(text[:26]).timestamp(),
    "arrived_at": float,
    "arrival_s": float,
}
"""Columns with the time of arrival, and what makes seconds of it; Azure's, vidur's, and our own."""

TICK_S = 3.0
"""Mooncake's time stamps are rounded to ticks of about 3 s; arrivals are spread within theirs."""

MOONCAKE_SEED = 7

MOONCAKE_BLOCK_TOKENS = 512

BLOCK_TOKENS = 16
"""Block of the prefix cache where a trace has the prompts themselves; vLLM's size."""


def read_csv(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """Read a CSV file with a header: Azure's traces, vidur's and Splitwise's, lists of lengths.

    Args:
        path: the file. Two columns are named as in ``COLUMNS``, and one may be as in ``TIMES``.
        limit: most requests, the first ones; all if ``None``.

    Returns:
        The requests by arrival; all at 0 s if no column has times.

    Raises:
        TraceError: a column is missing, or a cell cannot be read; names file, line and cell. Or
            the file is not UTF-8.
        OSError: the file cannot be opened.
    """
    requests: list[TraceRequest] = []
    with _text(path, "utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        lengths = next((pair for pair in COLUMNS if set(pair) <= set(header)), None)
        if lengths is None:
            known = "; or ".join(" and ".join(pair) for pair in COLUMNS)
            found = ", ".join(header) or "none"
            raise TraceError(f"{path.name}, line 1: columns {found}; give {known}")
        time = next((name for name in TIMES if name in header), None)
        for row in reader:
            if limit is not None and len(requests) == limit:
                break
            place = f"{path.name}, line {reader.line_num}"
            prompt, output = (_tokens(place, name, row[name]) for name in lengths)
            at_s = 0.0 if time is None else _seconds(place, time, row[time])
            features = RequestFeatures(prompt, CAP_TOKENS)
            requests.append(TraceRequest(at_s, features, output))
    return _named(path, requests)


def read_jsonl(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """Read a file with a JSON object in each line: Mooncake's, or LLMServingSim's workloads.

    Mooncake: ``timestamp`` in ms, ``input_length``, ``output_length`` and ``hash_ids`` of the
    prompt's blocks of 512 tokens; arrivals are spread evenly within their tick (``TICK_S``) with a
    fixed seed. LLMServingSim: ``arrival_time_ns``, ``input_toks``, ``output_toks`` and
    ``input_tok_ids``.

    Args:
        path: the file.
        limit: most requests, the first ones; all if ``None``.

    Returns:
        The requests by arrival.

    Raises:
        TraceError: a line cannot be read; names file, line and field. Or the file is not UTF-8.
        OSError: the file cannot be opened.
    """
    draw = np.random.default_rng(MOONCAKE_SEED)
    requests: list[TraceRequest] = []
    for place, row in _json_lines(path):
        if limit is not None and len(requests) == limit:
            break
        if "input_toks" in row:
            requests.append(_servingsim(place, row))
        else:
            requests.append(_mooncake(place, row, draw))
    return _named(path, requests)


@contextmanager
def _text(path: Path, encoding: str, newline: str | None = None) -> Iterator[TextIO]:
    """An open file; while it is read, an error of its encoding names it."""
    with path.open(newline=newline, encoding=encoding) as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise TraceError(
                f"{path.name}: byte {byte:#04x} is not UTF-8 ({error.reason}); give a file in UTF-8"
            ) from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _text(path, "utf-8") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path.name}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TraceError(f"{place}: {error}; give a JSON object in each line") from None
            if not isinstance(row, dict):
                raise TraceError(f"{place}: {line.strip()[:40]!r}; give a JSON object")
            yield place, row


def _mooncake(place: str, row: dict[str, Any], draw: np.random.Generator) -> TraceRequest:
    prompt = _tokens(place, "input_length", row.get("input_length"))
    output = _tokens(place, "output_length", row.get("output_length"))
    at_s = _seconds(place, "timestamp", row.get("timestamp")) / 1e3 + draw.uniform(0.0, TICK_S)
    blocks = row.get("hash_ids", [])
    if not _whole_numbers(blocks):
        raise TraceError(f"{place}: hash_ids={blocks!r}; give a list of whole numbers")
    names = _chain(blocks)
    features = RequestFeatures(prompt, CAP_TOKENS, _hashes(names, prompt))
    whole = prompt // MOONCAKE_BLOCK_TOKENS
    return TraceRequest(
        at_s, features, output, blocks=names[:whole], block_tokens=MOONCAKE_BLOCK_TOKENS
    )


def _servingsim(place: str, row: dict[str, Any]) -> TraceRequest:
    prompt = _tokens(place, "input_toks", row.get("input_toks"))
    output = _tokens(place, "output_toks", row.get("output_toks"))
    at_s = _seconds(place, "arrival_time_ns", row.get("arrival_time_ns")) / 1e9
    ids = row.get("input_tok_ids")
    if ids is not None and not _whole_numbers(ids):
        raise TraceError(f"{place}: input_tok_ids={str(ids)[:40]}; give a list of whole numbers")
    if ids is None or len(ids) != prompt:
        return TraceRequest(at_s, RequestFeatures(prompt, CAP_TOKENS), output)
    features = RequestFeatures.of_prompt(ids, CAP_TOKENS)
    whole = (ids[end - BLOCK_TOKENS : end] for end in range(BLOCK_TOKENS, prompt + 1, BLOCK_TOKENS))
    blocks = _chain(fingerprint(",".join(map(str, block))) for block in whole)
    return TraceRequest(at_s, features, output, blocks=blocks, block_tokens=BLOCK_TOKENS)


def _chain(blocks: Iterable[int]) -> tuple[int, ...]:
    """A name for each block that stands for those before it, too."""
    chain, names = 0, []
    for number, block in enumerate(blocks, start=1):
        chain = mixed(block + 1, chain + number)
        names.append(chain)
    return tuple(names)


def _hashes(names: tuple[int, ...], prompt_tokens: int) -> tuple[int, ...]:
    """Hashes at those of our cut points that are ends of blocks."""
    ends = {MOONCAKE_BLOCK_TOKENS * number: name for number, name in enumerate(names, start=1)}
    return tuple(ends[cut] for cut in CUTS if cut in ends and cut <= prompt_tokens)


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, int) for value in values)


def _tokens(place: str, name: str, value: object) -> int:
    """A length; 0 counts as 1, since no pass is without a token."""
    try:
        tokens = float(str(value))
    except ValueError:
        tokens = -1.0
    if not math.isfinite(tokens) or tokens < 0 or tokens != int(tokens):
        raise TraceError(f"{place}: {name} is {value!r}; give a whole number of tokens")
    return max(int(tokens), 1)


def _seconds(place: str, name: str, value: object) -> float:
    read = TIMES.get(name, float)
    try:
        at_s = read(str(value))
    except (ValueError, OverflowError):
        at_s = math.nan
    if not math.isfinite(at_s):
        raise TraceError(f"{place}: {name} is {value!r}; give a time of arrival")
    return at_s


def _named(path: Path, requests: list[TraceRequest]) -> list[TraceRequest]:
    if not requests:
        raise TraceError(f"{path.name}: no requests; give a file with a request or more")
    return from_zero(requests)
