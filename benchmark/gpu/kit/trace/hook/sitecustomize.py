"""Python runs this at its start, in every process that has this folder in its path.

Writes the name of every module that is imported, or tried, into the folder that ``TRACE_FOLDER``
names, one file per process; also in processes that are killed later.
"""

import os
import sys

_folder = os.environ.get("TRACE_FOLDER")
if _folder:
    _file = os.open(
        os.path.join(_folder, f"{os.getpid()}.modules"), os.O_WRONLY | os.O_CREAT | os.O_APPEND
    )
    _seen: set[str] = set()

    def _note(event: str, arguments: tuple) -> None:
        if event == "import" and arguments[0] not in _seen:
            _seen.add(arguments[0])
            os.write(_file, f"{arguments[0]}\n".encode())

    sys.addaudithook(_note)
