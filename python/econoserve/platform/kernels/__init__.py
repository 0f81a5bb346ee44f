"""CPU kernels in Numba: attention over the paged KV pool, and the small operators around it.

They read and write plain memory by address and know nothing of SGLang. ``launch`` runs them on
torch's own OpenMP threads, ``lowlevel`` holds what Numba lacks, the other modules are the kernels.
Numba compiles each for the CPU it runs on and keeps the result on disk, so no compiler is needed.
"""

import hashlib
from pathlib import Path

import torch

SOURCES = int.from_bytes(
    hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    ).digest()[:6]
)
"""A number for the kernels' sources. Numba's cache looks only at the file of the function that it
compiles; every kernel closes over this, so that a change of any of them compiles anew."""

ELEMENTS = {torch.float32: "float32", torch.bfloat16: "uint16"}
"""Numpy's name of each element type that the kernels take; bfloat16 travels as its bits."""
