"""Draws requests from ServeGen's clients: rates in windows of 10 minutes, distributions of lengths.

Owns the format of its archives (github.com/alibaba/ServeGen, Apache-2.0): for each client a CSV
file of windows ``start_s,rate,cv,...`` without header, and a JSON file with the distributions of
prompt and output tokens in each quarter of the day.
"""

import ast
import json
import math
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from econoserve.prediction.request import RequestFeatures, fingerprint
from econoserve.workload.trace import CAP_TOKENS, TraceError, TraceRequest, from_zero

WINDOW_S = 600.0
SPAN_S = 21_600
"""Rates hold for a window, distributions of lengths for a span."""

LEAST_CV = 0.1
"""Least coefficient of variation of the times between a client's arrivals; files have zeros."""

ServeGenRates = dict[int, list[tuple[float, float, float]]]
"""By client: start in seconds, requests per second and coefficient of variation of each window."""

Table = tuple[np.ndarray, np.ndarray]
"""Lengths and their shares."""

WHOLE = (0.0, math.inf)
"""All the time of an archive."""


def read_servegen(
    path: Path, limit: int, seed: int = 11, window_s: tuple[float, float] = WHOLE
) -> list[TraceRequest]:
    """Draw about so many requests from an archive.

    A client's arrivals are a renewal process in each window (gamma distributed, with the window's
    rate and variation), lengths independent draws from its distributions of that span. All rates
    are scaled by one factor so that ``limit`` requests are expected, spread over the whole time as
    the rates are. However few are wanted, a client's expected share of them is its share of the
    rates: each window begins in the middle of a gap, as a process that has always run does.

    Args:
        path: a ``tar.xz`` of ServeGen's files of one model.
        limit: requests that are expected, at least 1.
        seed: other seeds draw other requests.
        window_s: which part of the archive: windows that begin from the first time on, and before
            the second.

    Returns:
        The requests by arrival.

    Raises:
        TraceError: a file of the archive cannot be read, or no client sends anything.
        OSError: the archive cannot be opened.
    """
    rates, lengths = _read(path, path.stat().st_mtime_ns)
    used = [
        (client, start_s, rate, cv)
        for client in sorted(rates)
        for start_s, rate, cv in rates[client]
        if rate > 0
        and window_s[0] <= start_s < window_s[1]
        and int(start_s) // SPAN_S in lengths.get(client, {})
    ]
    if not used:
        raise TraceError(f"{path.name}: no client has a rate above 0 in this time; give another")
    scale = limit / sum(rate * WINDOW_S for _, _, rate, _ in used)
    draws = {client: np.random.default_rng((seed, client)) for client in rates}
    requests = []
    for client, start_s, rate, cv in used:
        draw, span = draws[client], int(start_s) // SPAN_S
        times_s = _renewals(draw, start_s, rate * scale, max(cv, LEAST_CV))
        if not times_s:
            continue
        prompts, outputs = (
            draw.choice(tokens, len(times_s), p=shares).clip(1).tolist()
            for tokens, shares in lengths[client][span]
        )
        user = fingerprint(f"client {client}")
        for at_s, prompt, output in zip(times_s, prompts, outputs, strict=True):
            features = RequestFeatures(prompt, CAP_TOKENS, user=user)
            requests.append(TraceRequest(at_s, features, output, (client, span)))
    return from_zero(requests)


def _renewals(
    draw: np.random.Generator, start_s: float, rate_per_s: float, cv: float
) -> list[float]:
    """Times in a window of a renewal process in equilibrium."""
    shape = 1.0 / cv**2
    mean_s = 1.0 / rate_per_s
    # Long gaps are met more often than short ones, in proportion to their length, which makes
    # the shape larger by 1; and each at any place.
    at_s = start_s + draw.uniform() * draw.gamma(shape + 1) / shape * mean_s
    times_s = []
    while at_s < start_s + WINDOW_S:
        times_s.append(at_s)
        at_s += draw.gamma(shape) / shape * mean_s
    return times_s


@lru_cache(maxsize=1)
def _read(path: Path, changed_ns: int) -> tuple[ServeGenRates, dict[int, dict[int, list[Table]]]]:
    """The archive as it is, read again when it has changed."""
    rates: ServeGenRates = {}
    lengths: dict[int, dict[int, list[Table]]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                file = archive.extractfile(member) if member.isfile() else None
                if file is None or not name.startswith("chunk-"):
                    continue
                text = file.read().decode()
                try:
                    client = int(name.split("-")[1])
                    if name.endswith("trace.csv"):
                        rates[client] = _windows(text)
                    else:
                        lengths[client] = _spans(text)
                except (ValueError, KeyError, IndexError, SyntaxError) as error:
                    raise TraceError(
                        f"{path.name}, file {name}: {error!r}; give an archive as ServeGen has it"
                    ) from None
    except tarfile.TarError as error:
        raise TraceError(f"{path.name}: {error}; give a tar archive of ServeGen's files") from None
    return rates, lengths


def _windows(text: str) -> list[tuple[float, float, float]]:
    rows = (line.split(",") for line in text.splitlines())
    return [(float(row[0]), float(row[1]), float(row[2] or 0)) for row in rows]


def _spans(text: str) -> dict[int, list[Table]]:
    return {
        int(start) // SPAN_S: [_table(span["input_tokens"]), _table(span["output_tokens"])]
        for start, span in json.loads(text).items()
        if ast.literal_eval(span["output_tokens"])
    }


def _table(text: str) -> Table:
    table = ast.literal_eval(text)
    shares = np.array(list(table.values()), float)
    return np.array(list(table), int), shares / shares.sum()
