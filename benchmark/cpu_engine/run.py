"""``python -m benchmark.cpu_engine.run``, or ``python benchmark/cpu_engine/run.py``.

Owns only that both spellings work; ``command`` has the rest.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run the command line.

    Returns:
        The exit status.
    """
    if not __package__:  # started as a script: its folder must not hide other modules
        sys.path[0] = str(ROOT)
    from benchmark.cpu_engine.command import main as command_line

    return command_line()


if __name__ == "__main__":
    sys.exit(main())
