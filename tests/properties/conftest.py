"""Makes the reference machine importable, and keeps hypothesis quick and repeatable.

Shrinking a failing schedule can take minutes: ask for it with ``--hypothesis-profile=shrink``.
"""

import sys
from pathlib import Path

from hypothesis import Phase, settings

sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("shrink", deadline=None)
settings.register_profile(
    "quick",
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
)
settings.load_profile("quick")
