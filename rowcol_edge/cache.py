"""What a stage of a build made, kept on disk under a digest of everything that decides it.

An entry is a folder named by its key, with the files of the stage and ``digests.json``, their sha256. It is written
beside its place and renamed, so that a killed build leaves no half entry and two builds cannot mix theirs. A file that
is not what its digest says is made anew. Nothing is unpickled. Entries that were used longest ago make room for others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .device.npz import read_npz
from .errors import ConfigError, StageError

SCHEMA = 1
"""Part of every key: entries of another schema are not found. History: 1 – first version."""

Arrays = dict[str, npt.NDArray[Any]]
_Made = TypeVar("_Made")

FOLDER = "ROWCOL_CACHE"
LIMIT = "ROWCOL_CACHE_BYTES"
OFF = "off"
LIMIT_BYTES = 4 * 2**30
_DIGESTS = "digests.json"
_UNFINISHED = ".writing-"
_ABANDONED_SECONDS = 24 * 3600.0
_CHUNK = 1 << 20
_NAMED = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Cache:
    """Attributes:
    folder: where the entries lie; None keeps nothing.
    limit_bytes: all entries together; one that is larger by itself is not kept.
    """

    folder: Path | None
    limit_bytes: int = LIMIT_BYTES

    @classmethod
    def of_user(cls) -> Cache:
        """The folder that ``ROWCOL_CACHE`` names (``off``: none), else the one XDG gives caches; a limit by
        ``ROWCOL_CACHE_BYTES``."""
        named, limit = os.environ.get(FOLDER, ""), os.environ.get(LIMIT, str(LIMIT_BYTES))
        if named == OFF:
            return cls(None)
        if not limit.isdecimal():
            raise ConfigError(LIMIT, expected="a number of bytes", got=repr(limit))
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(Path(named).expanduser() if named else home / "rowcol-edge", int(limit))

    def get(self, key: str, into: Path, make: Callable[[Path], None]) -> None:
        """Fill the new folder ``into`` with what ``make`` writes there, or wrote there under this key before.

        A cache that cannot be written costs time, not the build.
        """
        into.mkdir(parents=True)
        if self.folder is None:
            make(into)
            return
        entry = self.folder / key
        if not _restored(entry, into):
            make(into)
            with contextlib.suppress(OSError):
                _store(self.folder, entry, into, self.limit_bytes)
                _make_room(self.folder, self.limit_bytes)

    def put(self, key: str, write: Callable[[Path], None]) -> None:
        """Keep what ``write`` leaves in the folder it is given, instead of what was there under this key."""
        if self.folder is None:
            return
        with tempfile.TemporaryDirectory(prefix="rowcol-cache-") as work:
            write(Path(work))
            with contextlib.suppress(OSError):
                _store(self.folder, self.folder / key, Path(work), self.limit_bytes)
                _make_room(self.folder, self.limit_bytes)

    def restored(self, key: str, into: Path) -> bool:
        """Whether there was a whole entry under this key; its files are in the new folder ``into`` then."""
        into.mkdir(parents=True)
        return self.folder is not None and _restored(self.folder / key, into)

    def drop(self, key: str) -> None:
        """Forget an entry, if it is there."""
        if self.folder is not None:
            shutil.rmtree(self.folder / key, ignore_errors=True)

    def text(self, key: str, make: Callable[[], str]) -> str:
        """`get` for a stage that makes text."""
        return self._value(key, make, _write_text, _read_text)

    def arrays(self, key: str, make: Callable[[], Mapping[str, npt.NDArray[Any]]]) -> Arrays:
        """`get` for a stage that makes named arrays."""
        return self._value(key, lambda: dict(make()), write_arrays, read_arrays)

    def _value(
        self,
        key: str,
        make: Callable[[], _Made],
        write: Callable[[Path, _Made], None],
        read: Callable[[Path], _Made],
    ) -> _Made:
        if self.folder is None:
            return make()
        with tempfile.TemporaryDirectory(prefix="rowcol-cache-") as work:
            entry = Path(work) / "entry"
            self.get(key, entry, lambda folder: write(folder, make()))
            return read(entry)


def key(parts: object) -> str:
    """A digest of values that JSON can hold; paths of this machine have no part in one."""
    return hashlib.sha256(json.dumps([SCHEMA, parts], sort_keys=True).encode()).hexdigest()


def write_arrays(folder: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Named arrays as two files; a name may be any text, which an ``.npz`` by itself does not allow."""
    np.savez(folder / "arrays.npz", *arrays.values())
    (folder / "names.json").write_text(json.dumps(list(arrays)), encoding="utf-8")


def read_arrays(folder: Path) -> Arrays:
    names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    stored = read_npz(folder / "arrays.npz", StageError)
    return {name: stored[f"arr_{i}"] for i, name in enumerate(names)}


def _write_text(folder: Path, text: str) -> None:
    (folder / "text").write_text(text, encoding="utf-8")


def _read_text(folder: Path) -> str:
    return (folder / "text").read_text(encoding="utf-8")


def _restored(entry: Path, into: Path) -> bool:
    """Whether ``into`` now holds the entry's files, each with the digest it had when it was stored."""
    try:
        digests = json.loads((entry / _DIGESTS).read_bytes())
        whole = bool(digests) and all(
            _copied(entry / name, into / Path(name).name) == digest for name, digest in digests.items()
        )
    except (OSError, ValueError, AttributeError):  # not there, going just now, or damaged
        whole = False
    if whole:
        with contextlib.suppress(OSError):  # a shared cache may be read-only
            os.utime(entry)  # used now
    else:
        for file in into.iterdir():
            file.unlink()
    return whole


def _copied(source: Path, target: Path) -> str:
    """Copy a file and return its sha256."""
    sha = hashlib.sha256()
    with source.open("rb") as read, target.open("xb") as write:
        while chunk := read.read(_CHUNK):
            sha.update(chunk)
            write.write(chunk)
    return sha.hexdigest()


def _store(folder: Path, entry: Path, made: Path, limit_bytes: int) -> None:
    files = sorted(made.iterdir())
    if sum(file.stat().st_size for file in files) > limit_bytes:
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        digests = {file.name: _copied(file, writing / file.name) for file in files}
        (writing / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        writing.rename(entry)
    finally:
        shutil.rmtree(writing, ignore_errors=True)  # where another build was first, or the disk is full


def _make_room(folder: Path, limit_bytes: int) -> None:
    """Remove the entries that were used longest ago until the others fit, and what killed builds left."""
    entries: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another build removes entries too
            used = path.stat().st_mtime
            if path.name.startswith(_UNFINISHED):
                if time.time() - used > _ABANDONED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            if _NAMED.fullmatch(path.name) and (path / _DIGESTS).is_file():  # the folder may hold what is not ours
                entries.append((used, sum(file.stat().st_size for file in path.iterdir()), path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit_bytes:
            break
        shutil.rmtree(path, ignore_errors=True)
        total -= size
