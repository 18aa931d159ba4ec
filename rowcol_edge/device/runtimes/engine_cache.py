"""Engines that were built on this board, kept outside the bundle, whose files are fixed.

An engine fits what it was built from, by and for: all of that is its key. Beside each engine lies a ``.json`` with the
key in plain words and the engine's digest, so that a file cut short or changed is built again instead of being handed
to native code. Timings of kernels depend on the GPU and the version only: models share one cache of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

FOLDER_VARIABLE = "ROWCOL_ENGINE_CACHE"


@dataclass(frozen=True)
class EngineKey:
    """``settings`` are those of the builder that change what it builds, the largest batch among them."""

    model_sha256: str
    version: str
    gpu: str
    capability: str
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return _digest(json.dumps(asdict(self), sort_keys=True).encode())[:16]

    @property
    def timing_digest(self) -> str:
        return _digest(json.dumps([self.version, self.gpu, self.capability]).encode())[:16]


class EngineCache:
    """A folder: ``$ROWCOL_ENGINE_CACHE``, or ``rowcol-edge/engines`` in the user's cache folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or _default_folder(os.environ)

    def path(self, stem: str, key: EngineKey) -> Path:
        return self.folder / f"{stem}-{key.digest}.engine"

    def load(self, stem: str, key: EngineKey) -> bytes | None:
        """The engine, if it is there and whole."""
        path = self.path(stem, key)
        try:
            engine = path.read_bytes()
            known = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            whole = known["engine_sha256"] == _digest(engine)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return engine if whole else None

    def store(self, stem: str, key: EngineKey, engine: bytes) -> Path:
        """OSError: the folder cannot be written."""
        path = self.path(stem, key)
        self._write(path, engine)
        known = {**asdict(key), "engine_sha256": _digest(engine)}
        self._write(path.with_suffix(".json"), json.dumps(known, indent=2).encode())
        return path

    def subfolder(self, name: str) -> Path:
        """A folder in it for what a runtime keeps itself; OSError: it cannot be made."""
        folder = self.folder / name
        _own(folder)
        return folder

    def timings(self, key: EngineKey) -> bytes:
        """Empty if there are none yet."""
        try:
            return self._timing_path(key).read_bytes()
        except OSError:
            return b""

    def store_timings(self, key: EngineKey, timings: bytes) -> None:
        self._write(self._timing_path(key), timings)

    def _timing_path(self, key: EngineKey) -> Path:
        return self.folder / f"timing-{key.timing_digest}.cache"

    def _write(self, path: Path, content: bytes) -> None:
        _own(self.folder)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def warn_unkept(error: OSError) -> None:
    """An engine that cannot be kept still runs: it is only built again the next time."""
    sys.stderr.write(f"warning: the engine cannot be kept: {error}; name another folder in {FOLDER_VARIABLE}\n")


def _own(folder: Path) -> None:
    """Make it for the user alone: an engine is code that the runtime runs."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def _default_folder(variables: Mapping[str, str]) -> Path:
    if variables.get(FOLDER_VARIABLE):
        return Path(variables[FOLDER_VARIABLE])
    base = variables.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "rowcol-edge" / "engines"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
