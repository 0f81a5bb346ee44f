"""Where prefills and decodes run: how many instances of each, over how many GPUs.

Owns the notation ``prefill=TPxPPxN,decode=TPxPPxN``.
"""

import re
from dataclasses import dataclass

from econoserve.core.checks import check_least


@dataclass(frozen=True, slots=True, order=True)
class Parallelism:
    """How an instance is spread over GPUs.

    Attributes:
        tensor: GPUs that share each layer.
        pipeline: stages that share the layers.

    Raises:
        ValueError: a value is below 1.
    """

    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        check_least(self, tensor=1, pipeline=1)

    @property
    def gpus(self) -> int:
        """GPUs of an instance."""
        return self.tensor * self.pipeline


@dataclass(frozen=True, slots=True, order=True)
class Phase:
    """Equal instances for one phase.

    Attributes:
        parallelism: of each.
        instances: how many.

    Raises:
        ValueError: there is none.
    """

    parallelism: Parallelism
    instances: int

    def __post_init__(self) -> None:
        check_least(self, instances=1)

    @property
    def gpus(self) -> int:
        """GPUs of all."""
        return self.parallelism.gpus * self.instances

    def __str__(self) -> str:
        return f"{self.parallelism.tensor}x{self.parallelism.pipeline}x{self.instances}"


@dataclass(frozen=True, slots=True, order=True)
class Placement:
    """Separate instances for prefills and decodes.

    Attributes:
        prefill: instances that compute prompts.
        decode: instances that generate.
    """

    prefill: Phase
    decode: Phase

    @property
    def gpus(self) -> int:
        """GPUs of all instances."""
        return self.prefill.gpus + self.decode.gpus

    def times(self, copies: int) -> "Placement":
        """So many times the instances of both phases.

        Args:
            copies: how many times, at least 1.

        Returns:
            The placement.
        """
        prefill, decode = (
            Phase(phase.parallelism, phase.instances * copies)
            for phase in (self.prefill, self.decode)
        )
        return Placement(prefill, decode)

    def __str__(self) -> str:
        return f"prefill={self.prefill},decode={self.decode}"


def parse_placement(text: str) -> Placement:
    """Read a placement such as ``prefill=2x1x3,decode=1x1x1``.

    Args:
        text: for each phase tensor parallelism, pipeline stages and number of instances.

    Returns:
        The placement.

    Raises:
        ValueError: it is something else.
    """
    number = r"([1-9]\d*)"
    phase = f"{number}x{number}x{number}"
    found = re.fullmatch(f"prefill={phase},decode={phase}", text.replace(" ", ""))
    if found is None:
        raise ValueError(
            f"disaggregate {text!r}: give prefill=TPxPPxN,decode=TPxPPxN, as in "
            "prefill=2x1x1,decode=1x1x1"
        )
    values = [int(value) for value in found.groups()]
    prefill, decode = (
        Phase(Parallelism(tensor, pipeline), instances)
        for tensor, pipeline, instances in (values[:3], values[3:])
    )
    return Placement(prefill, decode)
