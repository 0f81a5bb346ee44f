"""EconoServe: SGLang with a scheduler that uses both compute and KV cache in every iteration.

``from econoserve import Engine`` gives SGLang's offline engine with our scheduler; the server is
``python -m econoserve.launch_server``. Importing this package starts nothing and imports SGLang
only when ``Engine`` is asked for.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from econoserve.engine import Engine

__all__ = ["Engine", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "Engine":
        from econoserve.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
