"""Settings for every test: no model from the network, and hypothesis quick and repeatable.

Shrinking a failing example can take minutes: ask for it with ``--hypothesis-profile=shrink``.
"""

import os

from hypothesis import HealthCheck, Phase, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("shrink", deadline=None)
settings.register_profile(
    "quick",
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    # A machine that is busy draws slowly, too.
    suppress_health_check=(HealthCheck.too_slow,),
)
settings.load_profile("quick")
