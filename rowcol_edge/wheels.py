"""The wheels that another machine's Python needs: downloaded by pip, and checked to be all of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from .errors import MissingDependencyError, StageError

_ROUNDS = 4
_PYTHONS = tuple(f"3.{minor}" for minor in range(9, 16))
_OLDEST_GLIBC = {"aarch64": 17, "x86_64": 5}  # of any manylinux tag
_OLD_NAMES = {"aarch64": ("manylinux2014",), "x86_64": ("manylinux2014", "manylinux2010", "manylinux1")}
_NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectionError|ConnectTimeout|ProxyError|Could not fetch URL|"
    r"Max retries exceeded|Connection (?:refused|broken|timed out)|Network is unreachable|Retrying \("
)


class NoWheelError(StageError):
    """The index has answered: there is no such wheel."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A CPython on a machine: ``python`` such as ``3.11``, ``platform`` such as ``manylinux_2_36_aarch64``."""

    python: str
    platform: str

    @property
    def machine(self) -> str:
        return self.platform.split("_", 3)[3]

    def platforms(self) -> list[str]:
        """Every platform tag that its pip accepts, the newest first; ``linux_…`` is what vendors use."""
        glibc = int(self.platform.split("_")[2])
        newer = [f"manylinux_2_{minor}_{self.machine}" for minor in range(glibc, _OLDEST_GLIBC[self.machine] - 1, -1)]
        return [*newer, *(f"{name}_{self.machine}" for name in _OLD_NAMES[self.machine]), f"linux_{self.machine}"]

    def markers(self) -> dict[str, str]:
        """The values of environment markers there; pip itself takes those of the machine it runs on."""
        return {
            "implementation_name": "cpython", "implementation_version": f"{self.python}.0", "os_name": "posix",
            "platform_machine": self.machine, "platform_python_implementation": "CPython", "platform_release": "",
            "platform_system": "Linux", "platform_version": "", "python_full_version": f"{self.python}.0",
            "python_version": self.python, "sys_platform": "linux",
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel file, and what it needs besides."""

    path: Path
    name: str
    version: Version
    requires: tuple[Requirement, ...]

    @classmethod
    def read(cls, path: Path) -> Wheel:
        name, version, _, _ = parse_wheel_filename(path.name)
        with zipfile.ZipFile(path) as archive:
            inside = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
            headers = BytesHeaderParser().parsebytes(archive.read(inside))
        return cls(path, str(name), version, tuple(map(Requirement, headers.get_all("Requires-Dist", []))))


def download(
    requirements: Sequence[str], there: Interpreter, out: Path, *, index_url: str = "", find_links: str = ""
) -> list[Wheel]:
    """Put the wheels of some requirements, and of all that these need, into ``out``; sorted by name.

    Raises:
        MissingDependencyError: this Python has no pip.
        NoWheelError: there is no such wheel; names the nearest Python that has one.
        StageError: no index can be reached.
    """
    sources = ["--extra-index-url", index_url] if index_url else []
    sources += ["--find-links", find_links] if find_links else []
    wanted = [*requirements]
    missing: list[str] = []
    for _ in range(_ROUNDS):
        shutil.rmtree(out, ignore_errors=True)
        done = _pip("download", "--dest", str(out), *_selection(there), *sources, *wanted)
        if done.returncode:
            raise _refused(done.stdout + done.stderr, there, sources)
        found = [Wheel.read(path) for path in sorted(out.glob("*.whl"))]
        needed, missing = complete(found, requirements, there)
        if not missing:
            for wheel in found:
                if wheel not in needed:
                    wheel.path.unlink()  # pip follows the markers of this machine's Python
            return needed
        wanted += missing
    raise NoWheelError(
        f"wheels for Python {there.python}", expected="a set of packages that fit each other",
        got=f"{', '.join(missing)} beside {', '.join(requirements)}",
    )  # fmt: skip


def complete(wheels: Iterable[Wheel], requirements: Iterable[str], there: Interpreter) -> tuple[list[Wheel], list[str]]:
    """The wheels that requirements lead to on another machine, sorted by name, and what none of them satisfies."""
    by_name = {wheel.name: wheel for wheel in wheels}
    markers = there.markers()
    needed: dict[str, Wheel] = {}
    missing: dict[str, None] = {}
    seen: set[tuple[str, str]] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        wheel = by_name.get(name)
        if wheel is None or not one.specifier.contains(wheel.version, prereleases=True):
            missing[f"{one.name}{one.specifier}"] = None
            continue
        needed[name] = wheel
        for extra in one.extras or {""}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                todo += [r for r in wheel.requires if _applies(r, markers, extra)]
    return [needed[name] for name in sorted(needed)], sorted(missing)


def _applies(requirement: Requirement, markers: Mapping[str, str], extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**markers, "extra": extra})


def _selection(there: Interpreter) -> list[str]:
    """pip's options for wheels of another machine."""
    tags = [word for tag in there.platforms() for word in ("--platform", tag)]
    return ["--only-binary=:all:", "--implementation", "cp", "--python-version", there.python, *tags]


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    quiet = ["--disable-pip-version-check", "--no-input", "--retries", "1", "--progress-bar", "off"]
    command = [sys.executable, "-P", "-m", "pip", arguments[0], *quiet, *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if "No module named pip" in done.stderr:
        raise MissingDependencyError("downloading wheels", package="pip", hint="or: python -m ensurepip")
    return done


def _refused(output: str, there: Interpreter, sources: list[str]) -> StageError:
    """Why pip gave up, as an error that names the package."""
    what = f"wheels for Python {there.python} on {there.platform}"
    if _NO_NETWORK.search(output):
        hint = (
            "check the network, or name a mirror (pip config set global.index-url URL); or build without a wheelhouse"
        )
        return StageError(what, expected="a package index that answers", got="no connection to one", hint=hint)
    absent = re.search(r"No matching distribution found for (.+?)(?: \(from .*)?$", output, re.MULTILINE)
    if absent is None:
        errors = [line for line in output.splitlines() if line.startswith("ERROR")] or output.strip().splitlines()
        said = errors[-1].removeprefix("ERROR: ") if errors else "an error without a word"
        return StageError(what, expected="an answer of pip download", got=said)
    requirement = absent[1].strip()
    nearest = _nearest(requirement, there, sources)
    hint = (
        f"the nearest Python that has one is {nearest}: install that on the board, or leave {there.python} out of the "
        "target's pythons"
        if nearest
        else "no Python has one for this platform: the board's vendor may, see index_url and find_links of a target"
    )
    return NoWheelError(what, expected=f"a wheel of {requirement}", got="none", hint=hint)


def _nearest(requirement: str, there: Interpreter, sources: list[str]) -> str:
    """The Python nearest to one that has a wheel of a requirement, the newer of two; empty if none has."""

    def distance(python: str) -> tuple[int, int]:
        apart = int(python.partition(".")[2]) - int(there.python.partition(".")[2])
        return abs(apart), -apart

    for python in sorted(set(_PYTHONS) - {there.python}, key=distance):
        dry = ["--dry-run", "--no-deps", "--ignore-installed", "--target", "unused"]
        done = _pip("install", *dry, *_selection(Interpreter(python, there.platform)), *sources, requirement)
        if done.returncode == 0:
            return python
    return ""
