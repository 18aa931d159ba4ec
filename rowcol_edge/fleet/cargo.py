"""What a board is given: the device program, the bundle as one file, and before that its manifest alone."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..device.bundle import Bundle
from ..device.digests import sha256_file
from ..device.manifest import MANIFEST_NAME
from ..device_archive import device_archive_bytes
from ..errors import IntegrityError
from ..package import zip_bundle
from .connection import Connection
from .keeper import PROGRAM

BUNDLE = "bundle.zip"
SPARE_BYTES = 16 << 20
"""Room on the board for the program, a profile, and what a runtime writes."""

_PIECE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class File:
    """A file here and its name on the board, which never is one that came from outside."""

    name: str
    path: Path
    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, name: str, path: Path) -> File:
        return cls(name, path, *sha256_file(path))

    def copy(self, connection: Connection, folder: str, progress: Callable[[int, int], None]) -> None:
        """Copy what is not there yet, by its digest; ``progress`` gets the bytes that are there and all.

        IntegrityError: what lies on the board afterwards is not what was sent.
        """
        held = connection.ask("held", folder=folder, name=self.name)
        offset = int(held["size"])
        if offset > self.size_bytes or held["sha256"] != self._digest_of_first(offset):
            offset = 0
        elif offset == self.size_bytes:
            return
        connection.request_put(folder=folder, name=self.name, offset=offset, size=self.size_bytes)
        for piece in self._pieces(offset):
            progress(offset, self.size_bytes)
            connection.send(piece)
            offset += len(piece)
        progress(offset, self.size_bytes)
        if (got := connection.answer()["sha256"]) != self.sha256:
            raise IntegrityError(
                f"{self.name} as it lies on the board", expected=self.sha256, got=str(got),
                hint="its disk or memory loses data: check it before you measure anything",
            )  # fmt: skip

    def _pieces(self, offset: int, end: int | None = None) -> Iterator[bytes]:
        left = (self.size_bytes if end is None else end) - offset
        with self.path.open("rb") as file:
            file.seek(offset)
            while left and (piece := file.read(min(left, _PIECE_BYTES))):
                left -= len(piece)
                yield piece

    def _digest_of_first(self, count: int) -> str:
        if not count:
            return ""  # what the board says of a file that it does not have
        digest = hashlib.sha256()
        for piece in self._pieces(0, count):
            digest.update(piece)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Cargo:
    """``program`` and ``manifest`` are enough to ask the board what it lacks; ``bundle`` is what may be large.

    ``need_bytes`` is the room that all of it takes on the board, with the bundle packed and unpacked.
    """

    program: File
    manifest: File
    bundle: File
    need_bytes: int

    @classmethod
    def pack(cls, bundle: Bundle, folder: Path) -> Cargo:
        """From an open bundle; what has to be made for it is written into ``folder``. OSError names that."""
        program = folder / PROGRAM
        try:
            program.write_bytes(device_archive_bytes())
            packed = bundle.source if bundle.source.is_file() else zip_bundle(bundle.root, folder / BUNDLE, "bundle")
        except OSError as e:  # a disk that is full has no name
            raise OSError(e.errno, e.strerror, e.filename or str(folder)) from e
        with zipfile.ZipFile(packed) as archive:
            unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
        need_bytes = packed.stat().st_size + unpacked_bytes + SPARE_BYTES
        return cls(
            File.of(PROGRAM, program),
            File.of(MANIFEST_NAME, bundle.root / MANIFEST_NAME),
            File.of(BUNDLE, packed),
            need_bytes,
        )
