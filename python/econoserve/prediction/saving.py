"""What a predictor knows, in a file, so that a restart does not begin anew.

Owns the file's format: numpy's ``npz`` without pickled objects. It must not know any predictor.
"""

import io
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

from econoserve.prediction.predictor import Predictor, State

VERSION = 1

BROKEN = (
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a damaged file, or one of something else, raises."""


class PredictorStateError(ValueError):
    """A file that holds no usable state; its message says what to do."""


def save(state: State, name: str, path: Path) -> None:
    """Write a predictor's state; whoever reads the file sees the old or the new one.

    Args:
        state: from ``Predictor.state``.
        name: of the predictor, as on the command line.
        path: the file.

    Raises:
        OSError: it cannot be written.
    """
    arrays = {key: value for key, value in state.items() if isinstance(value, np.ndarray)}
    plain = {key: value for key, value in state.items() if key not in arrays}
    header = json.dumps({"version": VERSION, "predictor": name, "plain": plain})
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        np.savez_compressed(file, header=np.array(header), **arrays)
    new.replace(path)


def load(predictor: Predictor, name: str, content: bytes, path: Path) -> None:
    """Read a predictor's state.

    Args:
        predictor: a new one; it takes the state over.
        name: of the predictor, as on the command line.
        content: of the file.
        path: the file, for errors.

    Raises:
        PredictorStateError: the file is broken, or another predictor's; go on with a new
            predictor, since this one may have taken over a part of it.
    """
    if not content.startswith(b"PK"):
        raise PredictorStateError(
            f"{path} is no file of a predictor: name another one with --econoserve-predictor-state"
        )
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            header = json.loads(str(file["header"]))
            state = {key: file[key] for key in file.files if key != "header"}
        if header["version"] != VERSION:
            raise ValueError(f"it has version {header['version']}, not {VERSION}")
        if header["predictor"] != name:
            raise PredictorStateError(
                f"{path} is of the predictor {header['predictor']!r}, not {name!r}: set "
                f"--econoserve-predictor {header['predictor']}, or name another file"
            )
        predictor.restore(state | header["plain"])
    except PredictorStateError:
        raise
    except BROKEN as error:
        raise PredictorStateError(
            f"{path} holds no usable predictor state ({error}): delete it, or name another file"
        ) from error
