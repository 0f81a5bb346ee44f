"""Draws requests from ServeGen's clients: rates in windows of 10 minutes, distributions of lengths.

Owns the format of its archives (github.com/alibaba/ServeGen, Apache-2.0): for each client a CSV
file of windows ``start_s,rate,cv,...`` without header, and a JSON file with the distributions of
prompt and output tokens in each quarter of the day.
"""

import ast
import json
import tarfile
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

Table = tuple[np.ndarray, None, bool, np.ndarray]
"""Arguments of ``Generator.choice``: lengths, how many to draw, with replacement, shares."""


def read_servegen(path: Path, limit: int, seed: int = 11) -> list[TraceRequest]:
    """Draw about so many requests from an archive.

    A client's arrivals are a renewal process in each window (gamma distributed, with the window's
    rate and variation), lengths independent draws from its distributions of that span. All rates
    are scaled by one factor so that about ``limit`` requests come; where few are wanted of many
    windows, more come, since a window's first arrival does not wait for its full time.

    Args:
        path: a ``tar.xz`` of ServeGen's files of one model.
        limit: about how many requests, at least 1; see above.
        seed: other seeds draw other requests.

    Returns:
        The requests by arrival.

    Raises:
        TraceError: a file of the archive cannot be read.
        OSError: the archive cannot be opened.
    """
    rates, lengths = _read(path)
    expected = sum(rate * WINDOW_S for windows in rates.values() for _, rate, _ in windows)
    if not expected > 0:
        raise TraceError(f"{path.name}: no client has a rate above 0; give another archive")
    scale = limit / expected
    requests = []
    for client in sorted(rates):
        draw = np.random.default_rng((seed, client))
        user = fingerprint(f"client {client}")
        for start_s, rate, cv in rates[client]:
            span = int(start_s) // SPAN_S
            tables = lengths.get(client, {}).get(span)
            if rate <= 0 or tables is None:
                continue
            for at_s in _renewals(draw, start_s, rate * scale, max(cv, LEAST_CV)):
                prompt, output = (int(draw.choice(*table)) for table in tables)
                features = RequestFeatures(max(prompt, 1), CAP_TOKENS, user=user)
                requests.append(TraceRequest(at_s, features, max(output, 1), (client, span)))
    return from_zero(requests)


def _renewals(
    draw: np.random.Generator, start_s: float, rate_per_s: float, cv: float
) -> list[float]:
    shape = 1.0 / cv**2
    times_s, at_s = [], start_s + draw.uniform(0.0, 1.0) * draw.gamma(shape, 1 / shape) / rate_per_s
    while at_s < start_s + WINDOW_S:
        times_s.append(at_s)
        at_s += draw.gamma(shape, 1 / shape) / rate_per_s
    return times_s


def _read(path: Path) -> tuple[ServeGenRates, dict[int, dict[int, list[Table]]]]:
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
    return np.array(list(table), int), None, True, shares / shares.sum()
