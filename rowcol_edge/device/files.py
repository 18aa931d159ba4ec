"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8; a file that is there is replaced in one step, and stays as it is where this fails (OSError).

    A link stays a link to what is replaced. A device or pipe, such as ``/dev/stdout``, is written to, never replaced.
    """
    data = text.encode("utf-8", errors="replace")  # a lone surrogate, which JSON may hold, becomes a question mark
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            stream.write(data)
        return
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as e:
        e.filename, e.filename2 = str(path), None  # not the name of a file that nobody asked for
        raise
    finally:
        with suppress(OSError):  # which would hide why it failed
            temporary.unlink(missing_ok=True)
