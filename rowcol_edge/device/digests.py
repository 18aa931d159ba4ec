"""sha256 and size of files, read in pieces so that a large artifact needs no memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PIECE_BYTES = 1 << 20


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


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
