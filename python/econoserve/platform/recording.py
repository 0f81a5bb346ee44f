"""Records what a computation does and does it again without the Python that led there.

What a CUDA graph is to a GPU: the same operators on the same addresses. The recorded function must
do the same whatever its inputs hold; the caller changes the inputs' contents, never their place.
Owns all memory that the recorded operators allocate; what they were given by address, the caller
keeps. A value that reaches Python by ``tolist()`` or ``numpy()`` is not noticed.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
_DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NotRecordable(Exception):
    """The computation depends on the contents of its inputs; the message says where."""


class TooLarge(NotRecordable):
    """The computation needs more memory than its recording may keep."""


class Recording:
    """A sequence of operators and kernels on fixed memory.

    Args:
        most_bytes: memory that it may keep.

    Attributes:
        memory_bytes: memory that it keeps.
    """

    def __init__(self, most_bytes: float = math.inf) -> None:
        self._most_bytes = most_bytes
        self._steps: list[Callable[[], object]] = []
        self._kept: list[object] = []
        self._owned: dict[int, torch.Tensor] = {}
        self._problem: str | None = None
        self.memory_bytes = 0

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record what runs in the block, while it runs.

        Raises:
            NotRecordable: before or at the end of the block, if it cannot be repeated.
            TooLarge: within it, as soon as it needs too much memory.
        """
        if torch.is_inference_mode_enabled():
            raise NotRecordable("in inference mode copies cannot be told from views")
        with _Operators(self), observed(self._add_kernel):
            yield
        if self._problem is not None:
            raise NotRecordable(self._problem)

    def spoil(self) -> None:
        """Fill all floating-point memory that it owns with NaN: a replay has to write it again."""
        for tensor in self._owned.values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)

    def replay(self) -> None:
        """Run everything again."""
        for step in self._steps:
            step()

    def _add_kernel(self, kernel: Kernel, arguments: np.ndarray, items: int) -> None:
        self._steps.append(lambda: kernel.run(arguments, items))

    def _add_operator(
        self, operator: torch._ops.OpOverload, arguments: tuple, keywords: dict, result: object
    ) -> None:
        if _depends_on_contents(operator, arguments):
            self._problem = f"{operator} depends on the contents of a tensor"
        self._kept.append(result)
        if operator._schema.is_mutable:
            self._steps.append(lambda: operator(*arguments, **keywords))
            return
        sources = {
            tensor.untyped_storage().data_ptr()
            for tensor in _tensors(arguments, keywords)
            if not tensor.is_mkldnn  # packed weights have no storage
        }
        made = [t for t in _tensors(result) if t.untyped_storage().data_ptr() not in sources]
        if not made:
            return  # views of memory that is kept anyway
        self._own(made)
        if operator in _UNINITIALISED:
            return
        if not isinstance(result, torch.Tensor):
            self._problem = f"{operator} returns {type(result).__name__}"
        elif operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            into = operator.overloadpacket.out
            self._steps.append(lambda: into(*arguments, **keywords, out=result))
        else:
            self._steps.append(lambda: result.copy_(operator(*arguments, **keywords)))

    def _own(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._owned:
                self.memory_bytes += storage.nbytes()
                if self.memory_bytes > self._most_bytes:
                    raise TooLarge(f"it needs more than {self._most_bytes} bytes")
                self._owned[storage.data_ptr()] = tensor


def _tensors(*values: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _depends_on_contents(operator: torch._ops.OpOverload, arguments: tuple) -> bool:
    """Whether values decide what an operator returns to Python, or in what shape."""
    if operator is torch.ops.aten.index.Tensor:  # tagged, but only a mask's ones are counted
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(arguments[1]))
    return not _DEPENDS_ON_VALUES.isdisjoint(operator.tags)


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
