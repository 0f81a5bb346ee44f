"""Values of command-line arguments that are checked as they are read.

Owns the checks, so that an error names the flag that was typed: argparse puts it before the words.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")


def whole_number(least: int) -> Callable[[str], int]:
    """Whole numbers.

    Args:
        least: the smallest that is allowed.

    Returns:
        What reads one; raises ``argparse.ArgumentTypeError``.
    """

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: give a whole number of {least} or more")
        return value

    return read


def number(words: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """Finite numbers.

    Args:
        words: what to give.
        allowed: which are allowed.

    Returns:
        What reads one; raises ``argparse.ArgumentTypeError``.
    """

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and allowed(value)):
            raise argparse.ArgumentTypeError(f"{text}: give {words}")
        return value

    return read


def checked(check: Callable[[str], Any]) -> Callable[[str], str]:
    """Text that something else understands.

    Args:
        check: raises ``ValueError`` for what it does not understand.

    Returns:
        What reads the text and gives it as it is; raises ``argparse.ArgumentTypeError``.
    """

    def read(text: str) -> str:
        try:
            check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return read


def file_of(*suffixes: str) -> Callable[[str], Path]:
    """Files to write.

    Args:
        suffixes: what their names may end in, such as ``.csv``.

    Returns:
        What reads a path; raises ``argparse.ArgumentTypeError``.
    """

    def read(text: str) -> Path:
        path = Path(text)
        if path.suffix not in suffixes:
            known = " or ".join(suffixes)
            raise argparse.ArgumentTypeError(f"{text}: give a file that ends in {known}")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}; make it")
        return path

    return read
