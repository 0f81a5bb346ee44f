"""``python -m benchmark.paper``."""

from benchmark.paper.run import main

if __name__ == "__main__":
    main()
