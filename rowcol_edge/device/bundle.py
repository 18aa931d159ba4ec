"""A bundle on disk: opened, checked against its manifest, and handed out file by file."""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from ..errors import BundleError, IntegrityError
from .digests import Stamp, sha256_bytes, sha256_file, stamp
from .manifest import MANIFEST_NAME, PROFILES_FOLDER, ArmEntry, FileEntry, Manifest, TensorSpec
from .npz import read_npz

Arrays = dict[str, np.ndarray]

_MANIFEST_LIMIT_BYTES = 16 << 20


class Bundle:
    """An open bundle, a folder or an unpacked ``.zip``; use it as a context manager, or :meth:`close` it.

    ``root`` is the folder that holds ``manifest.json``, ``digest`` the sha256 of that file: it stands for the whole
    bundle, since the manifest holds the sha256 of every other file. ``source`` is the path that was opened.

    No file is handed out whose digest was not compared with the manifest since it was last written.
    """

    def __init__(self, root: Path, source: Path, temporary: Path | None = None) -> None:
        self.root = root
        self.source = source
        # also runs when the object is dropped or the process ends
        self._remove = weakref.finalize(self, _remove, temporary)
        data = _manifest_bytes(root)
        self.digest = sha256_bytes(data)
        self.manifest = Manifest.from_json(data)
        self._checked: dict[str, Stamp] = {}
        if not self.manifest.files:
            raise BundleError("manifest.files", expected="every file of the bundle", got="none")

    @classmethod
    def open(cls, path: str | Path, *, check: bool = True) -> Bundle:
        """Open a bundle folder or ``.zip`` (unpacked to a temporary folder that :meth:`close` removes).

        ``check`` compares every file with the manifest, see :meth:`check`; without it each file is compared when it is
        handed out. BundleError: not a bundle, damaged or of another schema.
        """
        source = Path(path)
        if source.is_dir():
            bundle = cls(source.resolve(), source)
        elif source.is_file():
            import tempfile  # only a .zip needs it: a fraction of the start-up time of every run

            from .archive import unpack

            temporary = Path(tempfile.mkdtemp(prefix="rowcol-edge-"))
            try:
                bundle = cls(unpack(source, temporary), source, temporary)
            except BaseException:
                _remove(temporary)
                raise
        else:
            raise BundleError(str(path), expected="a bundle folder or .zip", got="no such file or folder")
        if check:
            try:
                bundle.check()
            except BaseException:
                bundle.close()
                raise
        return bundle

    def check(self) -> None:
        """Compare the folder with the manifest.

        IntegrityError: a file that is missing, changed, a link, or not listed.
        Only ``profiles/`` may hold files that the manifest does not list: measurements are added there after the build.
        """
        found = _files(self.root)
        listed = {entry.path for entry in self.manifest.files} | {MANIFEST_NAME}
        unlisted = sorted(path for path in found - listed if path.split("/")[0] != PROFILES_FOLDER)
        if unlisted:
            hint = f"move it out of the bundle; only {PROFILES_FOLDER}/ may hold files that are not part of the build"
            raise IntegrityError(
                f"{self.source}: {unlisted[0]}",
                expected="only files that the manifest lists",
                got="an extra file",
                hint=hint,
            )
        for entry in self.manifest.files:
            if entry.path not in found:
                raise IntegrityError(
                    f"{self.source}: {entry.path}", expected="a file", got="it is missing", hint="copy the bundle again"
                )
            self._compare(entry)

    def arm(self, name: str | None = None) -> ArmEntry:
        """The arm of that name, or the default one."""
        return self.manifest.arm(name)

    def artifact(self, arm: ArmEntry | str | None = None) -> Path:
        """The file a runtime opens for an arm; checked, like those that belong to it. IntegrityError: changed."""
        entry = arm if isinstance(arm, ArmEntry) else self.arm(arm)
        for file in self.manifest.files:
            if entry.owns(file.path):
                self.file(file.path)
        return self.root / entry.artifact

    def stamps(self, arm: ArmEntry) -> dict[str, Stamp]:
        """By path, what a process that runs the arm opens, as it was when it was checked."""
        paths = [file.path for file in self.manifest.files if arm.owns(file.path)] + [self.manifest.golden_inputs]
        return {str(self.file(path)): self._checked[path] for path in paths}

    def golden(self, arm: ArmEntry | str | None = None) -> tuple[Arrays, Arrays]:
        """Golden inputs and an arm's outputs for them, by name, stacked along the first axis (see :meth:`feeds`)."""
        entry = arm if isinstance(arm, ArmEntry) else self.arm(arm)
        inputs = _load_npz(self.file(self.manifest.golden_inputs), self.manifest.inputs)
        outputs = _load_npz(self.file(self.manifest.golden_outputs[entry.name]), self.manifest.outputs)
        return inputs, outputs

    def feeds(self, inputs: Arrays) -> Iterator[Arrays]:
        """Cut stacked inputs into what one run takes: the model's fixed batch, or one sample where it is free."""
        return split_feeds(self.manifest.inputs, inputs)

    def close(self) -> None:
        self._remove()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _compare(self, entry: FileEntry) -> None:
        # before it is read: what is written meanwhile is noticed the next time
        seen = stamp(self.root / entry.path)
        sha256, size_bytes = sha256_file(self.root / entry.path)
        if size_bytes != entry.size_bytes:
            raise _changed(self.source, entry.path, f"{entry.size_bytes} bytes", f"{size_bytes} bytes")
        if sha256 != entry.sha256:
            raise _changed(self.source, entry.path, f"sha256 {entry.sha256[:16]}…", f"{sha256[:16]}…")
        self._checked[entry.path] = seen

    def file(self, path: str) -> Path:
        """A file of the bundle, compared with the manifest unless it is still what it was when that was done."""
        file = self.root / path
        if not file.is_file():
            raise IntegrityError(
                f"{self.source}: {path}", expected="a file", got="it is missing", hint="copy the bundle again"
            )
        if self._checked.get(path) != stamp(file):
            self._compare(next(entry for entry in self.manifest.files if entry.path == path))
        return file


def split_feeds(specs: tuple[TensorSpec, ...], inputs: Arrays) -> Iterator[Arrays]:
    """Stacked inputs → one feed a run.

    A size of None on the first axis counts as 1; an input of rank 0 goes to every run whole.
    BundleError if the inputs do not hold the same number of whole batches.
    """
    sizes = {spec.name: (spec.shape[0] or 1) if spec.shape else 0 for spec in specs}
    counts = {name: len(inputs[name]) // size for name, size in sizes.items() if size}
    even = all(len(inputs[name]) % size == 0 for name, size in sizes.items() if size)
    if len(set(counts.values())) > 1 or not even or not all(counts.values()):
        shapes = ", ".join(f"{name} {inputs[name].shape}" for name in sizes)
        raise BundleError("golden inputs", expected="the same number of whole batches for every input", got=shapes)
    for i in range(next(iter(counts.values()), 1)):
        yield {name: inputs[name][i * size : (i + 1) * size] if size else inputs[name] for name, size in sizes.items()}


def _manifest_bytes(root: Path) -> bytes:
    path = root / MANIFEST_NAME
    if path.is_symlink() or not path.is_file():
        raise BundleError(str(root), expected=f"a bundle (a folder with {MANIFEST_NAME})", got=f"no {MANIFEST_NAME}")
    size_bytes = path.stat().st_size
    if size_bytes > _MANIFEST_LIMIT_BYTES:
        raise BundleError(str(path), expected=f"at most {_MANIFEST_LIMIT_BYTES} bytes", got=f"{size_bytes} bytes")
    return path.read_bytes()


def _files(root: Path) -> set[str]:
    """Relative POSIX paths of all files; IntegrityError for a link or a device."""
    found: set[str] = set()
    folders = [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                path = Path(entry.path).relative_to(root).as_posix()
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    folders.append(Path(entry.path))
                elif stat.S_ISREG(mode):
                    found.add(path)
                else:
                    got = "a symbolic link" if stat.S_ISLNK(mode) else "a special file"
                    raise IntegrityError(
                        path, expected="plain files and folders only", got=got, hint="copy the file itself"
                    )
    return found


def _changed(source: Path, path: str, expected: str, got: str) -> IntegrityError:
    return IntegrityError(
        f"{source}: {path}", expected=expected, got=got, hint="the file was changed or cut short: copy the bundle again"
    )


def _load_npz(path: Path, specs: tuple[TensorSpec, ...]) -> Arrays:
    arrays = read_npz(path, BundleError)
    if sorted(arrays) != sorted(spec.name for spec in specs):
        expected = ", ".join(sorted(spec.name for spec in specs))
        raise BundleError(str(path), expected=f"arrays named {expected}", got=", ".join(sorted(arrays)) or "none")
    for spec in specs:
        array = arrays[spec.name]
        # the first axis holds the samples, so only the other sizes are the model's
        rest = all(b is None or a == b for a, b in zip(array.shape[1:], spec.shape[1:], strict=False))
        if array.dtype.name != spec.dtype or array.ndim != len(spec.shape) or not rest:
            raise BundleError(
                f"{path.name}: {spec.name}",
                expected=f"{spec.dtype} {spec.shape}",
                got=f"{array.dtype.name} {array.shape}",
            )
    return {spec.name: arrays[spec.name] for spec in specs}


def _remove(folder: Path | None) -> None:
    if folder is not None:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
