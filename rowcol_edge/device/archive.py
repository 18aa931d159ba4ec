"""Unpacking a bundle's ``.zip`` without trusting it."""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from pathlib import Path

from ..errors import BundleError
from .manifest import MANIFEST_NAME, safe_path

LIMIT_BYTES = 8 << 30
LIMIT_FILES = 10_000
_PIECE_BYTES = 1 << 20


def unpack(source: Path, folder: Path) -> Path:
    """Unpack into an empty folder; the returned path is the one that holds the manifest.

    BundleError, before anything is written: not a zip; a path that leaves the folder or occurs twice; a link; an
    encrypted entry; more than ``LIMIT_FILES`` entries or ``LIMIT_BYTES`` bytes or than the disk can hold.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            entries = _checked(source, archive.infolist())
            need_bytes = sum(entry.file_size for entry in entries)
            free_bytes = shutil.disk_usage(folder).free
            if need_bytes > min(LIMIT_BYTES, free_bytes):
                raise BundleError(
                    str(source),
                    expected=f"at most {min(LIMIT_BYTES, free_bytes)} bytes unpacked",
                    got=f"{need_bytes} bytes",
                    hint="unzip it yourself and open the folder, or set TMPDIR to a disk with more space",
                )
            for entry in entries:
                _extract(archive, entry, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as e:
        hint = "copy the file again" if isinstance(e, (zipfile.BadZipFile, zlib.error, EOFError)) else ""
        raise BundleError(str(source), expected="a bundle folder or .zip", got=str(e), hint=hint) from e
    return folder / _root(source, entries)


def _checked(source: Path, entries: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    if len(entries) > LIMIT_FILES:
        raise BundleError(str(source), expected=f"at most {LIMIT_FILES} entries", got=str(len(entries)))
    seen: set[str] = set()
    for entry in entries:
        name = entry.filename.rstrip("/")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if not safe_path(name) or name in seen:
            got = "a path that occurs twice" if name in seen else "a path that leaves it"
            raise BundleError(f"{source}: {name!r}", expected="paths inside the archive, each once", got=got)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or entry.flag_bits & 0x1:
            got = "an encrypted entry" if entry.flag_bits & 0x1 else "a link or special file"
            raise BundleError(f"{source}: {name!r}", expected="plain files and folders only", got=got)
        seen.add(name)
    return [entry for entry in entries if not entry.is_dir()]


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> None:
    path = folder / entry.filename
    path.parent.mkdir(parents=True, exist_ok=True)
    left = entry.file_size
    with archive.open(entry) as packed, path.open("xb") as file:
        while piece := packed.read(_PIECE_BYTES):
            left -= len(piece)
            if left < 0:
                raise zipfile.BadZipFile(f"{entry.filename} holds more than the {entry.file_size} bytes it declares")
            file.write(piece)
    if left:
        raise zipfile.BadZipFile(f"{entry.filename} holds less than the {entry.file_size} bytes it declares")


def _root(source: Path, entries: list[zipfile.ZipInfo]) -> str:
    """The manifest may lie at the top or in the archive's one folder (as a zip of the bundle folder has it)."""
    names = [entry.filename for entry in entries]
    if MANIFEST_NAME in names:
        return ""
    tops = {name.split("/")[0] for name in names}
    top = tops.pop() if len(tops) == 1 else ""
    if f"{top}/{MANIFEST_NAME}" in names:
        return top
    raise BundleError(
        str(source), expected=f"a bundle ({MANIFEST_NAME} at the top or in its one folder)", got=f"no {MANIFEST_NAME}"
    )
