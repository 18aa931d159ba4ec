"""Putting a finished folder in the place of another, so that a process killed on the way leaves one of them."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BUILDING = "building"
_REPLACED = "replaced"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process publishes in this folder. A killed process frees its lock; there is no lock file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def temporary(out: Path) -> Path:
    """A free path beside ``out``, where its successor can be built."""
    return _name(out, _BUILDING)


def publish(building: Path, out: Path, zipped: Path | None = None, archive: Path | None = None) -> None:
    """Rename ``building`` to ``out`` and ``zipped`` to ``archive``, in the place of what is there.

    The old archive goes first: a kill between two steps must not leave it beside a newer folder.
    """
    if archive is not None:
        archive.unlink(missing_ok=True)
    if out.exists():
        out.rename(_name(out, _REPLACED))
    building.rename(out)
    if zipped is not None and archive is not None:
        zipped.replace(archive)
    flush(out.parent)


def clean(out: Path) -> None:
    """Remove what an interrupted build of ``out`` left beside it; put the old folder back if only that is left.

    To be called under :func:`locked`: then no living process owns any of it.
    """
    replaced = _leftovers(out, _REPLACED)
    if replaced and not os.path.lexists(out):
        replaced.pop().rename(out)
    for path in _leftovers(out, _BUILDING) + replaced:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(out: Path, kind: str) -> Path:
    return out.with_name(f".{out.name}.{kind}-{secrets.token_hex(4)}")


def _leftovers(out: Path, kind: str) -> list[Path]:
    prefix = f".{out.name}.{kind}-"
    return sorted(path for path in out.parent.iterdir() if path.name.startswith(prefix))
