"""From samples to medians, ranges and ratios.

Owns what a sample is, which columns each measurement has, and which ratios are shown. It works on
plain values and must not know how they came.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmark.cpu_engine.systems import ECONOSERVE, SGLANG, TORCH_NATIVE, VLLM
from benchmark.scheduler_comparison.figures import Spread

DECODE, BURST, OPEN = "decode", "burst", "open"
MEASUREMENTS = (DECODE, BURST, OPEN)

RATIOS = ((SGLANG, VLLM), (ECONOSERVE, VLLM), (TORCH_NATIVE, SGLANG), (TORCH_NATIVE, VLLM))


@dataclass(frozen=True, slots=True)
class Column:
    """A figure of a measurement.

    Attributes:
        key: its name in a sample's values.
        title: its name for readers, with the unit.
        digits: decimals to print.
    """

    key: str
    title: str
    digits: int


LOAD_COLUMNS = (
    Column("output_tokens_per_s", "output tokens/s", 0),
    Column("mean_e2e_ms", "mean E2E (ms)", 0),
    Column("mean_ttft_ms", "mean TTFT (ms)", 1),
    Column("mean_tpot_ms", "mean TPOT (ms)", 2),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one system.

    Attributes:
        model: the model.
        measurement: one of ``MEASUREMENTS``.
        system: the system.
        repeat: its number, from 0.
        values: figures by column; a decode sample has one, its key the batch size.
        details: what else was observed.
    """

    model: str
    measurement: str
    system: str
    repeat: int
    values: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Table:
    """One measurement on one model, systems side by side.

    Attributes:
        model: the model.
        measurement: one of ``MEASUREMENTS``.
        columns: its figures.
        spreads: by system, then by column key.
        ratios: by pair of systems, then by column key; taken repeat by repeat.
    """

    model: str
    measurement: str
    columns: tuple[Column, ...]
    spreads: dict[str, dict[str, Spread]]
    ratios: dict[tuple[str, str], dict[str, Spread]]

    def medians(self, key: str) -> dict[str, float]:
        """One figure of all systems.

        Args:
            key: of a column.

        Returns:
            Medians by system.
        """
        return {
            system: spreads[key].median
            for system, spreads in self.spreads.items()
            if key in spreads
        }


def tables(samples: Sequence[Sample]) -> list[Table]:
    """Put the systems side by side.

    Args:
        samples: all samples.

    Returns:
        A table per model and measurement, in the order they were measured.
    """
    keys = dict.fromkeys((sample.model, sample.measurement) for sample in samples)
    return [
        _table(*key, [sample for sample in samples if (sample.model, sample.measurement) == key])
        for key in keys
    ]


def _table(model: str, measurement: str, samples: Sequence[Sample]) -> Table:
    values: dict[str, dict[str, dict[int, float]]] = {}
    for sample in samples:
        for key, value in sample.values.items():
            values.setdefault(sample.system, {}).setdefault(key, {})[sample.repeat] = value
    if measurement == DECODE:
        batches = sorted({int(key) for sample in samples for key in sample.values})
        columns = tuple(Column(str(batch), f"batch {batch} (ms)", 2) for batch in batches)
    else:
        columns = LOAD_COLUMNS
    return Table(
        model,
        measurement,
        columns,
        {
            system: {key: Spread.of([*repeats.values()]) for key, repeats in by_key.items()}
            for system, by_key in values.items()
        },
        {
            (over, under): {
                key: Spread.of(ratios)
                for key, repeats in values[over].items()
                if (ratios := _ratios(repeats, values[under].get(key, {})))
            }
            for over, under in RATIOS
            if over in values and under in values
        },
    )


def _ratios(over: dict[int, float], under: dict[int, float]) -> list[float]:
    return [value / under[repeat] for repeat, value in over.items() if under.get(repeat)]


def headline(samples: Sequence[Sample], model: str) -> dict[str, Any]:
    """The figures that the targets are stated in.

    Args:
        samples: all samples.
        model: whose.

    Returns:
        ``decode_ms`` by system and batch size, ``burst_tokens_per_s`` by system, and ``tpot_ms``
        by system, the last at the open loop's rate; all medians.
    """
    found = {table.measurement: table for table in tables(samples) if table.model == model}
    decode = found.get(DECODE)
    return {
        "decode_ms": {
            system: {key: spread.median for key, spread in spreads.items()}
            for system, spreads in (decode.spreads.items() if decode else ())
        },
        "burst_tokens_per_s": (
            found[BURST].medians("output_tokens_per_s") if BURST in found else {}
        ),
        "tpot_ms": found[OPEN].medians("mean_tpot_ms") if OPEN in found else {},
    }
