"""Hardware profiles: a model on a machine, how long its iterations take and what KVC it has.

Owns the files in ``profiles/``, each with its sources, and their format.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from importlib.resources import files
from numbers import Real
from pathlib import Path
from typing import Any

from econoserve.sim.fitted import FittedTime
from econoserve.sim.operators import OperatorTables
from econoserve.sim.regimes import TwoRegimes
from econoserve.sim.timing import DistServeFit, IterationTime

TIMES = {
    "distserve": DistServeFit.of,
    "fitted": FittedTime.of,
    "operators": OperatorTables.of,
    "regimes": TwoRegimes.of,
}
"""What makes a model of time from a profile's ``time``, by its ``kind``."""


class ProfileError(ValueError):
    """A profile that is missing or cannot be used."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What a machine's memory is used for, in bytes and all GPUs together.

    Attributes:
        gpu_bytes: memory of a GPU.
        gpus: how many hold the model together.
        usable_fraction: share of it that the engine may use, in (0, 1].
        weights_bytes: the model's weights, over all GPUs.
        activation_bytes: kept on each GPU for activations and workspaces.
        layers: attention layers.
        kv_heads: heads of keys and values in each.
        head_dim: size of a head.
        bytes_per_value: of a key or value.

    Raises:
        ProfileError: a value is out of range, or nothing is left for the KVC.
    """

    gpu_bytes: int
    gpus: int
    usable_fraction: float
    weights_bytes: int
    activation_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    bytes_per_value: int

    def __post_init__(self) -> None:
        for name in ("gpus", "layers", "kv_heads", "head_dim"):
            words = "a whole number of 1 or more"
            _check(name, getattr(self, name), words, lambda value: value >= 1 and not value % 1)
        for name in ("gpu_bytes", "bytes_per_value"):
            _check(name, getattr(self, name), "bytes, more than 0", lambda value: value > 0)
        for name in ("weights_bytes", "activation_bytes"):
            _check(name, getattr(self, name), "bytes, 0 or more", lambda value: value >= 0)
        words = "a share above 0, and 1 or less"
        _check("usable_fraction", self.usable_fraction, words, lambda share: 0 < share <= 1)
        if self.capacity_tokens < 1:
            raise ProfileError(
                f"weights_bytes={self.weights_bytes} leave no KVC in gpus={self.gpus} of "
                f"gpu_bytes={self.gpu_bytes}: give more GPUs or a larger usable_fraction"
            )

    @property
    def kvc_bytes_per_token(self) -> int:
        """Keys and values of a token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_value

    @property
    def capacity_tokens(self) -> int:
        """KVC that fits: usable memory less weights and activations."""
        usable = self.usable_fraction * self.gpu_bytes * self.gpus
        left = usable - self.weights_bytes - self.activation_bytes * self.gpus
        return int(left // self.kvc_bytes_per_token)


@dataclass(frozen=True, slots=True)
class Profile:
    """A model on a machine.

    Attributes:
        name: ``HARDWARE/MODEL``.
        source: where its numbers are from.
        memory: what decides the size of the KVC.
        context_tokens: the model's longest context.
        host_bytes_per_s: bandwidth between GPU and host memory, for KVC that is moved.
        time: how long iterations take.
        link_bytes_per_s: bandwidth between GPUs, for KVC that another instance fetches; 0 if it is
            not stated.
        tensor_times: how long iterations take with other numbers of GPUs that share each layer.

    Raises:
        ProfileError: a value is out of range.
    """

    name: str
    source: str
    memory: Memory
    context_tokens: int
    host_bytes_per_s: float
    time: IterationTime
    link_bytes_per_s: float = 0.0
    tensor_times: Mapping[int, IterationTime] = field(default_factory=dict)

    def __post_init__(self) -> None:
        words = "a whole number of 1 or more"
        _check("context_tokens", self.context_tokens, words, lambda value: value >= 1)
        words = "bytes per second, more than 0"
        _check("host_bytes_per_s", self.host_bytes_per_s, words, lambda value: value > 0)
        words = "bytes per second, 0 or more"
        _check("link_bytes_per_s", self.link_bytes_per_s, words, lambda value: value >= 0)
        for gpus in self.tensor_times:
            _check("tensor_times", gpus, "numbers of GPUs of 1 or more", lambda value: value >= 1)

    @property
    def move_s_per_token(self) -> float:
        """Time to move a token's KVC to host memory, or back."""
        return self.memory.kvc_bytes_per_token / self.host_bytes_per_s

    @property
    def tensor_choices(self) -> list[int]:
        """Numbers of GPUs that may share each layer, ascending."""
        return sorted({self.memory.gpus, *self.tensor_times})

    def on(self, tensor: int, pipeline: int = 1) -> "Profile":
        """This model on other numbers of GPUs.

        Args:
            tensor: GPUs that share each layer.
            pipeline: stages that share the layers evenly; ``time`` stays that of a pass through
                all of them.

        Returns:
            The profile.

        Raises:
            ProfileError: its times are not known there, its layers cannot be shared so, or nothing
                is left for the KVC.
        """
        if tensor not in self.tensor_choices:
            choices = ", ".join(str(choice) for choice in self.tensor_choices)
            raise ProfileError(f"profile {self.name}: tensor={tensor}: give one of {choices}")
        if self.memory.layers % pipeline:
            raise ProfileError(
                f"profile {self.name}: pipeline={pipeline}: give a divisor of its "
                f"{self.memory.layers} layers"
            )
        memory = replace(self.memory, gpus=tensor * pipeline)
        return replace(self, memory=memory, time=self.tensor_times.get(tensor, self.time))


def profile_names() -> list[str]:
    """The packaged profiles.

    Returns:
        Their names, ``HARDWARE/MODEL``, sorted.
    """
    found = files("econoserve.sim").joinpath("profiles").iterdir()
    names = (Path(file.name) for file in found)
    return sorted(name.stem.replace("_", "/", 1) for name in names if name.suffix == ".json")


def load_profile(hardware: str, model: str) -> Profile:
    """A packaged profile, or one of a file.

    Args:
        hardware: such as ``a100``; or the path of a profile that ends in ``.json``.
        model: such as ``opt-13b``; ignored where a path is given.

    Returns:
        The profile.

    Raises:
        ProfileError: there is none, or it cannot be used; names the field.
    """
    if hardware.endswith(".json"):
        path = Path(hardware)
        if not path.is_file():
            raise ProfileError(f"hardware {hardware}: no such file; give a profile or its name")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ProfileError(f"hardware {hardware}: {error}; give a file in UTF-8") from None
        return read_profile(path.stem, text)
    name = f"{hardware}/{model}"
    if name not in profile_names():
        raise ProfileError(f"no profile {name}: choose one of {', '.join(profile_names())}")
    file = files("econoserve.sim").joinpath("profiles", f"{hardware}_{model}.json")
    return read_profile(name, file.read_text(encoding="utf-8"))


def read_profile(name: str, text: str) -> Profile:
    """Read a profile.

    Args:
        name: what to call it.
        text: its JSON: ``source``, ``memory`` (the fields of ``Memory``), ``context_tokens``,
            ``host_bytes_per_s``, ``time`` with its ``kind`` and that kind's fields; where known
            ``link_bytes_per_s`` and ``tensor_times``, a ``time`` for each number of GPUs.

    Returns:
        The profile.

    Raises:
        ProfileError: it cannot be used; names the field.
    """
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ProfileError(f"profile {name}: {error}; see docs/simulator.md") from None
    return profile_of(name, fields)


def profile_of(name: str, fields: Mapping[str, Any]) -> Profile:
    """A profile from its fields.

    Args:
        name: what to call it.
        fields: as ``read_profile`` describes them.

    Returns:
        The profile.

    Raises:
        ProfileError: it cannot be used; names the field.
    """
    try:
        fields = _object("the profile", fields)
        return Profile(
            name,
            str(fields["source"]),
            _memory(_object("memory", fields["memory"])),
            _number("context_tokens", fields["context_tokens"], int),
            _number("host_bytes_per_s", fields["host_bytes_per_s"], float),
            _time("time", fields["time"]),
            _number("link_bytes_per_s", fields.get("link_bytes_per_s", 0.0), float),
            {
                _number("tensor_times", gpus, int): _time("tensor_times", time)
                for gpus, time in _object("tensor_times", fields.get("tensor_times", {})).items()
            },
        )
    except KeyError as error:
        raise ProfileError(f"profile {name}: field {error} is missing; add it") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ProfileError(f"profile {name}: {error}; see docs/simulator.md") from None


def _memory(given: Mapping[str, Any]) -> Memory:
    names = [one.name for one in fields_of(Memory)]
    for name in given:
        if name not in names:
            raise ProfileError(f"memory has a field {name!r}: give {', '.join(names)}")
    return Memory(**{name: given[name] for name in names})


def _time(name: str, given: Any) -> IterationTime:
    fields = _object(name, given)
    kind = fields["kind"]
    if kind not in list(TIMES):
        raise ProfileError(f"{name} kind {kind!r}: give one of {', '.join(TIMES)}")
    return TIMES[kind](fields)


def _object(name: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ProfileError(f"{name} is {str(given)[:40]}: give a JSON object")
    return given


def _number(name: str, given: Any, kind: Callable[[Any], Any]) -> Any:
    try:
        number = None if isinstance(given, bool) else kind(given)
    except (TypeError, ValueError, OverflowError):
        number = None
    # Keys of JSON objects are strings; a share of a token would be lost.
    if number is None or (isinstance(given, Real) and number != given):
        raise ProfileError(f"{name}={given!r}: give a {'whole ' * (kind is int)}number")
    return number


def _check(name: str, value: Any, words: str, fits: Callable[[float], bool]) -> None:
    known = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not known or not fits(value):
        raise ProfileError(f"{name}={value!r}: give {words}")
