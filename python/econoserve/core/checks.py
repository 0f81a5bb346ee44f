"""Checks of constants, with errors that name the constant, its value and the fix."""

from enum import Enum
from typing import TypeVar

Choice = TypeVar("Choice", bound=Enum)


def choice_of(name: str, value: object, choices: type[Choice]) -> Choice:
    """A constant that is one of several.

    Args:
        name: the constant.
        value: a member of ``choices``, or its value.
        choices: what it may be.

    Returns:
        The member.

    Raises:
        ValueError: it is none of them; names the constant, its value and the choices.
    """
    try:
        return choices(value)
    except ValueError:
        known = ", ".join(choice.value for choice in choices)
        raise ValueError(f"{name}={value!r}: give one of {known}") from None


def check_capacity(capacity_tokens: object) -> None:
    """Refuse what is no size of a KVC.

    Args:
        capacity_tokens: its size.

    Raises:
        ValueError: it is not a whole number of 1 or more.
    """
    whole = isinstance(capacity_tokens, int) and not isinstance(capacity_tokens, bool)
    if not whole or capacity_tokens < 1:
        raise ValueError(f"capacity_tokens={capacity_tokens!r}: give a whole number of 1 or more")


def check_least(config: object, **least: float) -> None:
    """Refuse constants that are too small.

    Args:
        config: has them as attributes.
        least: their least values, by name.

    Raises:
        ValueError: names the constant, its value and the fix.
    """
    for name, limit in least.items():
        value = getattr(config, name)
        if not value >= limit:
            raise ValueError(f"{name}={value}: give {limit} or more")


def check_share(name: str, value: float) -> None:
    """Refuse what is no share of the KVC that may be kept free.

    Args:
        name: the constant.
        value: its value.

    Raises:
        ValueError: names both and the fix.
    """
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}={value}: give 0 or more, below 1")
