"""Arms and a manifest become a bundle on disk, whole or not at all."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from .board_readme import board_readme
from .device.bundle import Bundle
from .device.digests import sha256_file
from .device.fields import parse_json
from .device.manifest import MANIFEST_NAME, PROFILES_FOLDER, FileEntry, Manifest, safe_path
from .device_archive import DEVICE_ARCHIVE_NAME, device_archive_bytes
from .errors import BundleError, RowcolError
from .swap import clean, flush, locked, publish, temporary

__all__ = ["README_NAME", "board_readme", "write_bundle", "zip_bundle"]

README_NAME = "README.md"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_bundle(
    out: Path,
    *,
    manifest: Manifest,
    artifacts: Mapping[str, Path],
    golden_inputs: Mapping[str, np.ndarray],
    golden_outputs: Mapping[str, Mapping[str, np.ndarray]],
    readme: str,
    zip_too: bool = True,
    extra: Mapping[str, Path | bytes] | None = None,
) -> Path:
    """Write the bundle folder ``out`` (and ``out.zip``); the folder's path.

    ``manifest.files`` is filled in here. ``artifacts`` gives each arm its file, ``golden_inputs`` each input its
    samples stacked along the first axis, ``golden_outputs`` each arm its outputs for them (made with
    :func:`rowcol_edge.device.verify.golden_outputs`), ``extra`` further files by their path in the bundle (a plan, an
    artifact's external weights, which are named after it: ``arms/x.onnx.data``).

    Everything is built beside ``out``, flushed to disk, opened and checked, and only then renamed. An older bundle at
    ``out`` is replaced; what was measured with it stays in profiles/ (each profile names the digest it belongs to). A
    process killed at any point leaves the old bundle, the new one or none, and the next call removes what it left
    behind (or puts the old bundle back, if it was killed between two renames).

    BundleError, with nothing written: parts that do not fit each other; an ``out`` or ``out.zip`` that is not a bundle;
    an older bundle with other files in it.
    """
    out = Path(out).absolute()
    archive = out.with_name(f"{out.name}.zip")
    parts = _parts(manifest, artifacts, golden_inputs, golden_outputs, readme, extra or {})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out.parent):
            clean(out)
            _check_replaceable(out, archive)
            building = temporary(out)
            try:
                _build(building, manifest, parts, out)
                zipped = zip_bundle(building, building.with_name(f"{building.name}.zip"), out.name) if zip_too else None
                publish(building, out, zipped, archive)
            finally:
                clean(out)
    except OSError as e:
        raise BundleError(str(out), expected="a place where a bundle can be written", got=str(e)) from e
    return out


def _parts(
    manifest: Manifest,
    artifacts: Mapping[str, Path],
    golden_inputs: Mapping[str, np.ndarray],
    golden_outputs: Mapping[str, Mapping[str, np.ndarray]],
    readme: str,
    extra: Mapping[str, Path | bytes],
) -> dict[str, Path | bytes]:
    """Every file of the bundle but the manifest, by path; BundleError if they do not fit the manifest."""
    arms = sorted(arm.name for arm in manifest.arms)
    for what, given in (("artifacts", artifacts), ("golden outputs", golden_outputs)):
        if sorted(given) != arms:
            raise BundleError(
                what, expected=f"one for each arm: {', '.join(arms)}", got=", ".join(sorted(given)) or "none"
            )
    parts: dict[str, Path | bytes] = {
        README_NAME: readme.encode(),
        DEVICE_ARCHIVE_NAME: device_archive_bytes(),
        manifest.golden_inputs: _npz("golden inputs", golden_inputs),
    }
    for arm in manifest.arms:
        artifact = Path(artifacts[arm.name])
        if not artifact.is_file():
            raise BundleError(f"artifact of {arm.name}", expected="a file", got=f"no such file: {artifact}")
        for path, part in (
            (arm.artifact, artifact),
            (manifest.golden_outputs[arm.name], _npz(f"golden outputs of {arm.name}", golden_outputs[arm.name])),
        ):
            if parts.setdefault(path, part) != part:
                raise BundleError(
                    f"manifest: {path}", expected="one content for each path", got=f"another for {arm.name}"
                )
    for path, part in extra.items():
        if path in parts or path == MANIFEST_NAME or not safe_path(path) or path.split("/")[0] == PROFILES_FOLDER:
            raise BundleError(
                f"extra file {path!r}", expected="a free path inside the bundle", got="one that is taken or leaves it"
            )
        if isinstance(part, Path) and not part.is_file():
            raise BundleError(f"extra file {path!r}", expected="a file", got=f"no such file: {part}")
        parts[path] = part
    _check_sizes(manifest, parts)
    # the strict reader has the last word, before anything is written
    draft = tuple(FileEntry(path, "0" * 64, 0) for path in sorted(parts))
    Manifest.from_json(replace(manifest, files=draft).to_json())
    return parts


def _check_sizes(manifest: Manifest, parts: Mapping[str, Path | bytes]) -> None:
    """An arm's size is what its files weigh: the artifact, and external weights that are named after it."""
    for arm in manifest.arms:
        files = [path for path in parts if arm.owns(path)]
        size_bytes = sum(_size_bytes(parts[path]) for path in files)
        if size_bytes != arm.size_bytes:
            raise BundleError(
                f"size_bytes of {arm.name}", expected=f"{size_bytes} ({', '.join(files)})", got=str(arm.size_bytes)
            )


def _size_bytes(part: Path | bytes) -> int:
    return len(part) if isinstance(part, bytes) else part.stat().st_size


def _npz(what: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    """An ``.npz`` with the same bytes for the same arrays (numpy's own writer also reserves the name "file")."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            if array.dtype.kind == "O":
                raise BundleError(f"{what}: {name}", expected="numbers", got="Python objects")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise BundleError(f"{what}: {name}", expected="finite values", got="NaN or Inf")
            data = io.BytesIO()
            np.lib.format.write_array(data, np.ascontiguousarray(array) if array.ndim else array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), data.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _build(folder: Path, manifest: Manifest, parts: Mapping[str, Path | bytes], out: Path) -> None:
    """A complete bundle in a temporary folder, on disk and checked."""
    folder.mkdir()
    entries = []
    for path, part in sorted(parts.items()):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(part, bytes):
            file.write_bytes(part)
        else:
            shutil.copyfile(part, file)
        file.chmod(0o755 if path == DEVICE_ARCHIVE_NAME else 0o644)
        entries.append(FileEntry(path, *sha256_file(file)))
    text = replace(manifest, files=tuple(entries)).to_json()
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
    if (out / PROFILES_FOLDER).is_dir():
        shutil.copytree(out / PROFILES_FOLDER, folder / PROFILES_FOLDER)
    with Bundle.open(folder) as bundle:
        for arm in bundle.manifest.arms:
            inputs, _ = bundle.golden(arm)
            sum(1 for _ in bundle.feeds(inputs))  # BundleError if they are not whole batches
    for file in [*folder.rglob("*"), folder]:
        flush(file)


def zip_bundle(folder: Path, path: Path, name: str) -> Path:
    """A bundle folder as the one file ``path``, in a folder ``name``; measurements in profiles/ stay out of it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).parts[0] != PROFILES_FOLDER)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            entry = zipfile.ZipInfo(f"{name}/{file.relative_to(folder).as_posix()}", _EPOCH)
            entry.external_attr = (0o100000 | (file.stat().st_mode & 0o777)) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            with file.open("rb") as source, archive.open(entry, "w", force_zip64=True) as packed:
                shutil.copyfileobj(source, packed, 1 << 20)
    flush(path)
    return path


def _check_replaceable(out: Path, archive: Path) -> None:
    """BundleError if a path that is to be replaced holds anything that a build here did not write."""
    hint = "choose another folder, or move that one away"
    if os.path.lexists(out):
        listed = None if out.is_symlink() else _listed(out)
        if listed is None:
            raise BundleError(str(out), expected="a free path or an older bundle", got="something else", hint=hint)
        for file in sorted(out.rglob("*")):
            path = file.relative_to(out).as_posix()
            if not file.is_dir() and path not in listed and path.split("/")[0] != PROFILES_FOLDER:
                raise BundleError(str(file), expected="only files of the bundle", got="another file", hint=hint)
    if os.path.lexists(archive) and not _is_bundle_zip(archive, out.name):
        raise BundleError(str(archive), expected="a free path or an older bundle", got="something else", hint=hint)


def _listed(folder: Path) -> set[str] | None:
    """The files that a bundle of any schema says it consists of; None if it is no bundle."""
    try:
        values = parse_json((folder / MANIFEST_NAME).read_bytes(), "manifest")
        values["schema"], values["arms"]
        return {MANIFEST_NAME, *(str(entry["path"]) for entry in values["files"])}
    except (OSError, RowcolError, KeyError, TypeError):
        return None


def _is_bundle_zip(path: Path, name: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{name}/{MANIFEST_NAME}" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
