"""Checks of constants, with errors that name the constant, its value and the fix."""


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
