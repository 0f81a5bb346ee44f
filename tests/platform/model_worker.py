"""Runs a worker in a process of its own, since SGLang's model runner is global."""

import json
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def rows_of(worker: str, folder: Path, most: int) -> list[dict]:
    """What a worker saw.

    Args:
        worker: name of the program beside this file.
        folder: where it may write.
        most: its second argument, the most to record.

    Returns:
        A row per pass.
    """
    output = folder / "result.json"
    done = subprocess.run(
        [sys.executable, str(FOLDER / worker), str(output), str(most)],
        env={**os.environ, "ECONOSERVE_CPU_OPS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(output.read_text())
