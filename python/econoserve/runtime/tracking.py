"""Calls of the policy that may raise without ending the server.

Owns the ``with`` statement around them; what an error means is the host's.
"""

from collections.abc import Callable


class Tracking:
    """Keeps an error from going further, if the host says so.

    Entered several times in an iteration: a class costs a fifth of ``contextlib``'s generator.

    Args:
        failed: is told of an error; returns whether the server goes on.
        state: what it is told with it.
    """

    __slots__ = ("_failed", "_state")

    def __init__(self, failed: Callable[[object], bool], state: object) -> None:
        self._failed, self._state = failed, state

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, Exception) and self._failed(self._state)


def readable(state: Callable[[], object]) -> object:
    """What a function says, for a message about an error.

    Args:
        state: the function.

    Returns:
        Its answer, or a sentence if it fails, too.
    """
    try:
        return state()
    except Exception as error:
        return f"not readable: {error!r}"
