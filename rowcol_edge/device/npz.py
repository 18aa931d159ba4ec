"""``.npz`` archives from anywhere: read whole, never unpickled, and damaged in any way one typed error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RowcolError

_ZIP, _NPY = b"PK", b"\x93N"  # what an archive and a single array begin with
_HINT = "write it with numpy.savez from arrays of numbers"


def read_npz(path: Path, error: type[RowcolError]) -> dict[str, np.ndarray]:
    """Every array by its name.

    Raises:
        error: no file, no archive, damaged, or with anything in it that is no plain array.
    """
    from zipfile import BadZipFile
    from zlib import error as ZlibError

    expected = "an .npz of plain arrays (never pickled)"
    if not path.is_file():
        raise error(
            str(path), expected=expected, got="no such file", hint="a relative path starts from the current folder"
        )
    arrays: dict[str, Any] = {}
    try:
        # opened here: numpy leaves its own file open when the archive is damaged
        with path.open("rb") as stream:
            if stream.read(len(_ZIP)) not in (_ZIP, _NPY):  # numpy would take it for a pickle and advise to trust it
                raise error(str(path), expected=expected, got="another kind of file", hint=_HINT)
            stream.seek(0)
            archive: Any = np.load(stream, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise error(str(path), expected=expected, got="a single array", hint=_HINT)
            with archive:
                arrays = {name: archive[name] for name in archive.files}
    # what numpy, zipfile and zlib raise for bytes that were changed: sizes, methods, flags and headers can all be wrong
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, BadZipFile, ZlibError) as e:
        raise error(str(path), expected=expected, got=str(e) or type(e).__name__, hint=_HINT) from e
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise error(f"{path}: {name}", expected="an array", got="other content")
    return arrays
