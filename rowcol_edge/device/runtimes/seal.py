"""The checksum at the end of a ``.tflite`` file: a damaged one is refused before the interpreter sees it.

The interpreter follows the offsets of a file without checking them, and divides by sizes it finds there: one flipped
bit can end the process. So the build closes the file with a CRC-32 of all that stands before, as the comment of the
zip archive that TFLite's metadata convention puts behind the model. It finds every damage of up to 32 bits in a row;
against an author of harmful files it is no protection, and the digests of the manifest are not either.
"""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path

MARK = b"rowcol-edge crc32 "
BLANK = b"00000000"
_MODEL = b"TFL3"  # the identifier of a TFLite flatbuffer, behind the offset of its root


def sealed(content: bytes) -> bytes:
    """``content``, which ends in MARK and BLANK, with its checksum."""
    body = content[: -len(BLANK)]
    assert content.endswith(MARK + BLANK)
    return body + _checksum(body)


def damage(path: Path) -> str:
    """What is wrong with the file, in words; empty if it is as it was written."""
    if path.stat().st_size < len(_MODEL) + 4 + len(MARK + BLANK):
        return f"{path.stat().st_size} bytes"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[4:8] != _MODEL:
            return "another kind of file"
        end = len(content) - len(BLANK)
        if content[end - len(MARK) : end] != MARK:
            return "a file that is cut short, or was not written by rowcol-edge"
        with memoryview(content) as view, view[:end] as body:
            return "" if content[end:] == _checksum(body) else "a file whose checksum does not match"


def _checksum(body: bytes | memoryview) -> bytes:
    return b"%08x" % zlib.crc32(body)
