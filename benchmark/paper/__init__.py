"""The paper's claims on trial, in the simulator: ``python -m benchmark.paper``."""
