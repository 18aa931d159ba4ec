"""A folder beside a bundle with the wheels of its runtime, for a board that has no network.

``wheelhouse.json`` lists every file with its digest; ``requirements-py311.txt`` pins the packages of a Python by
theirs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .device.digests import sha256_file
from .errors import BundleError
from .swap import clean, flush, locked, publish, temporary
from .targets import RuntimeSpec, Target, activate
from .wheels import Interpreter, NoWheelError, Wheel, download

SCHEMA = 1
"""Of ``wheelhouse.json``. History: 1 – first version."""

LIST_NAME = "wheelhouse.json"
README_NAME = "README.md"

Progress = Callable[[str, int, int], None]


def place(bundle: Path) -> Path:
    """Where the wheelhouse of a bundle lies."""
    return bundle.with_name(f"{bundle.name}-wheelhouse")


def install_command(python: str) -> str:
    """What to type inside a wheelhouse."""
    return f"python3 -m pip install --no-index --find-links . --require-hashes -r {_requirements_name(python)}"


def is_current(folder: Path, target: Target, runtime: RuntimeSpec) -> bool:
    """Was this wheelhouse made for the same packages, Pythons and platform, and is every file as it was?"""
    listed = _read(folder)
    if listed is None or listed.get("key") != _key(target, runtime):
        return False
    try:
        return all(sha256_file(folder / path)[0] == entry["sha256"] for path, entry in listed["files"].items())
    except OSError:
        return False


def collect(target: Target, runtime: RuntimeSpec, folder: Path, progress: Progress) -> Path:
    """Download the wheels of a runtime for each Python of a target into a new folder, with list and README; the folder.

    Raises:
        StageError: a package has no wheel for one of the Pythons, or there is no network.
    """
    folder.mkdir(parents=True)
    pythons: dict[str, Any] = {}
    for done, python in enumerate(target.pythons):
        progress(f"wheels for Python {python}", done, len(target.pythons))
        packages, wheels = _wheels(target, runtime, python, folder)
        lines = [f"{w.name}=={w.version} --hash=sha256:{sha256_file(w.path)[0]}" for w in wheels]
        head = f"# {runtime.name} for {target.name}: CPython {python}, {target.platform}"
        (folder / _requirements_name(python)).write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
        pythons[python] = {"packages": list(packages), "wheels": [wheel.path.name for wheel in wheels]}
    progress("wheels", len(target.pythons), len(target.pythons))
    (folder / README_NAME).write_text(_readme(target, runtime), encoding="utf-8")
    files = {path.name: _entry(path) for path in sorted(folder.iterdir())}
    listed = {
        "schema": SCHEMA, "key": _key(target, runtime), "target": target.name, "runtime": runtime.name,
        "platform": target.platform, "pythons": pythons, "files": files,
    }  # fmt: skip
    (folder / LIST_NAME).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    return folder


def put(folder: Path, out: Path) -> None:
    """Copy a collected wheelhouse to ``out`` in one step, in the place of an older one.

    Raises:
        BundleError: something else is there, or it cannot be written; nothing is changed.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out.parent):
            clean(out)
            _check_replaceable(out)
            building = temporary(out)
            try:
                shutil.copytree(folder, building)
                for file in [*building.iterdir(), building]:
                    flush(file)
                publish(building, out)
            finally:
                clean(out)
    except OSError as e:
        raise BundleError(str(out), expected="a place where wheels can be written", got=str(e)) from e


def _wheels(target: Target, runtime: RuntimeSpec, python: str, folder: Path) -> tuple[tuple[str, ...], list[Wheel]]:
    """The first of the runtime's choices of packages that has wheels for a Python, moved into ``folder``."""
    choices = [runtime.requirements, *(a.requirements for a in runtime.alternatives if python in a.pythons)]
    failed: NoWheelError | None = None
    for packages in choices:
        downloads = folder / "downloads"
        try:
            found = download(
                packages, Interpreter(python, target.platform), downloads,
                index_url=runtime.index_url, find_links=runtime.find_links,
            )  # fmt: skip
            return packages, [_moved(wheel, folder) for wheel in found]
        except NoWheelError as e:  # not a network that fails: that would hand out another package
            failed = failed or e  # about the first choice
        finally:
            shutil.rmtree(downloads, ignore_errors=True)
    assert failed is not None
    raise failed


def _moved(wheel: Wheel, folder: Path) -> Wheel:
    return Wheel(wheel.path.replace(folder / wheel.path.name), wheel.name, wheel.version, wheel.requires)


def _entry(path: Path) -> dict[str, Any]:
    sha256, size_bytes = sha256_file(path)
    return {"sha256": sha256, "size_bytes": size_bytes}


def _key(target: Target, runtime: RuntimeSpec) -> str:
    """Digest of all that decides what is downloaded, but what the index holds that day."""
    values = target.to_dict()
    spec = next(r for r in values["runtimes"] if r["name"] == runtime.name)
    chosen = [spec[key] for key in ("requirements", "alternatives", "index_url", "find_links", "system", "venv")]
    text = json.dumps([SCHEMA, target.name, values["pythons"], values["platform"], runtime.name, chosen])
    return hashlib.sha256(text.encode()).hexdigest()


def _requirements_name(python: str) -> str:
    return f"requirements-py{python.replace('.', '')}.txt"


def _readme(target: Target, runtime: RuntimeSpec) -> str:
    commands = "\n\n".join(f"Python {p}:\n\n    {install_command(p)}" for p in target.pythons)
    before = "\n".join(f"    {line}" for line in activate(runtime))
    return (
        f"# {runtime.name} for {target.title}, without a network\n\n"
        f"Wheels for {target.platform}. Copy this folder to the board and go into it. Once (a line that downloads "
        f"something needs a network or an image that has it):\n\n{before}\n\n"
        f"Then the line of the board's Python (`python3 --version`):\n\n{commands}\n\n"
        f"pip checks each wheel against the digest in that file. `{LIST_NAME}` lists every file here with its digest.\n"
    )


def _read(folder: Path) -> Mapping[str, Any] | None:
    """The list of a wheelhouse of this schema; None if it is none."""
    try:
        values = json.loads((folder / LIST_NAME).read_text(encoding="utf-8"))
        return values if values["schema"] == SCHEMA and isinstance(values["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_replaceable(out: Path) -> None:
    """BundleError if ``out`` holds anything that is not of an older wheelhouse."""
    if not os.path.lexists(out):
        return
    listed = None if out.is_symlink() else _read(out)
    known = {LIST_NAME} if listed is None else {LIST_NAME, *listed["files"]}
    foreign = [] if listed is None else [path.name for path in out.iterdir() if path.name not in known]
    if listed is None or foreign:
        raise BundleError(
            str(out),
            expected="a free path or an older wheelhouse",
            got=f"a folder with another file: {min(foreign)}" if foreign else "something else",
            hint="choose another folder, or move that one away",
        )
