"""sha256 and size of files, read in pieces so that a large artifact needs no memory; and how to tell that a file is
still the one that was read."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PIECE_BYTES = 1 << 20

Stamp = tuple[int, int, int]


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stamp(path: Path) -> Stamp:
    """Inode, size in bytes and time of the last change in ns: another one once the file was written again."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def sha256_file(path: Path) -> tuple[str, int]:
    """The hex digest of a file and the number of bytes it was made of."""
    digest = hashlib.sha256()
    size_bytes = 0
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size_bytes += count
    return digest.hexdigest(), size_bytes
