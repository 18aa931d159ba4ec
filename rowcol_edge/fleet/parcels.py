"""Bundles on the machine of a worker: found by their digest, or received in pieces and kept.

A bundle may be hundreds of MB, and a scheduler is no place to keep that. So a job names path and digest. Where that
very bundle lies at that path – the same machine, a shared disk – nothing is sent. Else the worker says that it lacks
it, and is sent it once, in pieces that nobody keeps in memory; what has arrived is checked and lies under its digest,
for every worker of that machine and user.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from pathlib import Path

from ..device.bundle import Bundle
from ..device.digests import sha256_bytes
from ..device.manifest import MANIFEST_NAME
from ..errors import BundleError, IntegrityError

PIECE_BYTES = 8 << 20
_UNUSED_SECONDS = 7 * 24 * 3600.0
_SILENT_SECONDS = 3600.0
"""A delivery of which nothing has come for so long has ended: a piece takes seconds, on a slow line minutes."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


def find(path: str, digest: str) -> str | None:
    """The path of that bundle here: where it was named, or where it was received."""
    for place in (Path(path), _place(digest)):
        if _is(place, digest):
            if place.parent == _folder():
                place.touch()
            return str(place)
    return None


def receive(digest: str, name: str, offset: int, piece: bytes, last: bool) -> None:
    """Take a piece of a bundle's .zip; ``name`` tells this delivery from others at the same time.

    A delivery that begins again under its name takes the place of what has arrived of it. One that fails here – a full
    disk, what arrived is another bundle – leaves nothing.
    """
    place = _place(digest)
    arriving = place.with_name(f"{place.name}.{re.sub('[^0-9a-z]', '', name)}")
    if not offset:
        _make_room(place.parent)
    try:
        with arriving.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(piece)
        if last:
            with Bundle.open(arriving) as bundle:
                if bundle.digest != digest:
                    raise IntegrityError(f"bundle {name}", expected=digest, got=bundle.digest)
            arriving.replace(place)
    except BaseException:
        arriving.unlink(missing_ok=True)
        raise


def _is(place: Path, digest: str) -> bool:
    try:
        if place.is_dir():
            return sha256_bytes((place / MANIFEST_NAME).read_bytes()) == digest
        with Bundle.open(place, check=False) as bundle:
            return bundle.digest == digest
    except (BundleError, OSError):
        return False


def _place(digest: str) -> Path:
    assert _DIGEST.fullmatch(digest)
    return _folder() / f"{digest}.zip"


def _folder() -> Path:
    """A folder that only this user can write."""
    folder = Path(tempfile.gettempdir(), f"rowcol-edge-bundles-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise BundleError(str(folder), expected="a folder of this user", got="another's")
    return folder


def _make_room(folder: Path) -> None:
    """Remove what nobody has used for a week, and what has arrived of deliveries whose sender is gone."""
    for path in folder.iterdir():
        kept_seconds = _UNUSED_SECONDS if path.suffix == ".zip" else _SILENT_SECONDS
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > kept_seconds:
                path.unlink()
