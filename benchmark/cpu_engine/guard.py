"""Runs a server for as long as standard input stays open, so that none outlives the benchmark.

Owns one child process. Standard library only. Started by ``processes``: when the benchmark ends,
however it ends, the pipe closes and the server is stopped.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_S = 8.0


def main() -> int:
    """Run the command given as arguments.

    Returns:
        The command's exit status, if it ends by itself.
    """
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

    def stop_at_end_of_input() -> None:
        while os.read(0, 4096):
            pass
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE_S)
        os.killpg(0, signal.SIGKILL)  # what the server left behind, and this process

    threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    return server.wait()


if __name__ == "__main__":
    sys.exit(main())
