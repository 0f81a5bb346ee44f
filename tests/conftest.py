"""Settings for every test: nothing may reach the network for a model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
