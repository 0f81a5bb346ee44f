"""Records what a computation does and does it again without the Python that led there.

What a CUDA graph is to a GPU: the same operators on the same addresses. The recorded function must
do the same whatever its inputs hold; the caller changes the inputs' contents, never their place.
Owns the memory of everything the recorded operators touch.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from econoserve.platform.kernels.launch import Kernel, observed

_UNINITIALISED = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    }
)
_READS_VALUES = frozenset(
    {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
    }
)


class NotRecordable(Exception):
    """The computation depends on the contents of its inputs; the message says where."""


class Recording:
    """A sequence of operators and kernels on fixed memory.

    Attributes:
        memory_bytes: memory that it keeps.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []
        self._kept: list[object] = []
        self._problem: str | None = None
        self.memory_bytes = 0

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record what runs in the block, while it runs.

        Raises:
            NotRecordable: at the end of the block, if it cannot be repeated.
        """
        with _Operators(self), observed(self._add_kernel):
            yield
        if self._problem is not None:
            raise NotRecordable(self._problem)

    def replay(self) -> None:
        """Run everything again."""
        for step in self._steps:
            step()

    def _add_kernel(self, kernel: Kernel, arguments: np.ndarray, items: int) -> None:
        self._steps.append(lambda: kernel.run(arguments, items))

    def _add_operator(
        self, operator: torch._ops.OpOverload, arguments: tuple, keywords: dict, result: object
    ) -> None:
        if operator in _READS_VALUES:
            self._problem = f"{operator} reads the contents of a tensor"
        self._kept.append(result)
        aliases = [value.alias_info for value in operator._schema.returns]
        if operator in _UNINITIALISED or any(a is not None and not a.is_write for a in aliases):
            return  # memory without contents, or a view of memory that is kept anyway
        if operator._schema.is_mutable:
            self._steps.append(lambda: operator(*arguments, **keywords))
            return
        if not isinstance(result, torch.Tensor):
            self._problem = f"{operator} returns {type(result).__name__}"
            return
        self.memory_bytes += result.untyped_storage().nbytes()
        into = getattr(operator.overloadpacket, "out", None)
        if operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self._steps.append(lambda: into(*arguments, **keywords, out=result))
        else:
            self._steps.append(lambda: result.copy_(operator(*arguments, **keywords)))


class _Operators(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: tuple,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self._recording._add_operator(func, args, kwargs or {}, result)
        return result
