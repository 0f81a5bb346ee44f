"""``python -m benchmark.serving``."""

import sys

from benchmark.serving.command import main

if __name__ == "__main__":
    sys.exit(main())
