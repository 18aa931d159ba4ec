"""The packages a board's Python gets, for a userland: which ones its target asks for, and a folder that holds them."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import arm64_root
from arm64_root import Suite, Userland
from rowcol_edge.targets import RuntimeSpec


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to install a runtime. ``label``: ``first`` choice, ``alternative``, or ``oldest`` promised version."""

    label: str
    requirements: tuple[str, ...]


def choices(spec: RuntimeSpec, suite: Suite, *, oldest: bool = False) -> list[Choice]:
    """What a target says to install for a runtime, on a board with this Debian; with ``oldest`` its oldest too."""
    first = spec.requirements
    found = [Choice("first", first)]
    found += [Choice("alternative", a.requirements) for a in spec.alternatives if suite.python in a.pythons]
    # the oldest versions have wheels for the older Python only, and were built against numpy 1
    if oldest and suite.name == "bookworm" and any(_name(text) == spec.name for text in first):
        pinned = tuple(f"{spec.name}=={spec.oldest}" if _name(text) == spec.name else text for text in first)
        found.append(Choice("oldest", (*pinned, "numpy<2")))
    return found


def installed(userland: Userland, requirements: tuple[str, ...]) -> Path:
    """A folder for the guest's PYTHONPATH that holds the wheels, fetched and unpacked by this machine, once."""
    key = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:12]
    folder = userland.folder / "packages" / key
    with arm64_root.alone(userland.suite.name):
        if not folder.is_dir():
            made = arm64_root.fresh(folder)
            with tempfile.TemporaryDirectory(dir=userland.folder) as wheels:
                fetch(userland.suite, requirements, Path(wheels))
                for wheel in Path(wheels).glob("*.whl"):
                    with zipfile.ZipFile(wheel) as archive:
                        archive.extractall(made)
            arm64_root.finish(folder)
    return folder


def fetch(suite: Suite, requirements: tuple[str, ...], folder: Path) -> None:
    """Wheels for a suite's Python on arm64, with all that they need, into ``folder``.

    `pip install --target` would also take them for another machine, but asks this machine's Python what it may install.
    """
    tags = [f"manylinux_2_{minor}_aarch64" for minor in range(suite.glibc_minor, 16, -1)] + ["manylinux2014_aarch64"]
    wanted = ["--only-binary=:all:", "--implementation", "cp", "--python-version", suite.python]
    wanted += [word for tag in tags for word in ("--platform", tag)]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *quiet, "--dest", str(folder), *wanted, *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        sys.exit(f"pip found no wheels for the userland: {' | '.join(lines[:3])}")


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
