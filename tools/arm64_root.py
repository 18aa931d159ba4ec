"""arm64 Debian userlands in `.cache/arm64`, run by QEMU's user mode: no board, container engine or root is needed.

`qemu-aarch64 -L ROOT` looks up every path in ROOT first and then on this machine, so nothing is mounted and nothing has
to be taken down again: /proc, /sys, /dev and /tmp, which a root here does not have, are this machine's own (QEMU makes
up those files of /proc that tell of the processor). Processes that the guest starts are started by this machine's
kernel, which cannot run arm64 programs. Python starts others through `sys.executable`; that is therefore a shell script
which calls QEMU again, and environments of `venv` point to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "arm64"
RECIPE = 1
"""Raised when a root is made in another way: older ones are then made again."""


@dataclass(frozen=True, slots=True)
class Suite:
    """A Debian release, with the Python it has and the newest wheels its C library takes."""

    name: str
    python: str
    glibc_minor: int


SUITES = {suite.name: suite for suite in (Suite("trixie", "3.13", 41), Suite("bookworm", "3.11", 36))}
"""The two that 64-bit Raspberry Pi OS is made from."""

# Folders that a root must not have, so that this machine's show through, and what nobody reads.
_DROPPED = ("dev", "proc", "sys", "tmp", "run", "debootstrap", "var/cache/apt", "usr/share/doc", "usr/share/locale")


@dataclass(frozen=True, slots=True)
class Userland:
    """A finished root. ``made_seconds`` is what making it took, whenever that was."""

    suite: Suite
    folder: Path
    made_seconds: float

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def python(self) -> Path:
        """Runs the guest's Python; lies where that Python looks for its library."""
        return self.root / "usr" / "bin" / "emulated-python3"

    def run(
        self, python: Path, *arguments: str | Path, cpu: str, path: str = "", timeout_s: float = 1800
    ) -> subprocess.CompletedProcess[str]:
        """Run the guest's Python (or one of a venv made with it) as the processor ``cpu``, with modules of ``path``.

        Nothing of this machine's environment gets in: its own pip and Python settings would.
        """
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            "QEMU_CPU": cpu,
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONNOUSERSITE": "1",
            **({"PYTHONPATH": path} if path else {}),
        }
        return subprocess.run(
            [python, *arguments], env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )


def emulator() -> str | None:
    """QEMU's program for arm64; distributions call it by either name."""
    return shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def debootstrap() -> str | None:
    return shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def lacking() -> list[str]:
    """The packages whose programs are needed to make and run a userland and are not here."""
    needed = {"debootstrap": debootstrap(), "dpkg": shutil.which("dpkg-deb"), "qemu-user": emulator()}
    if os.geteuid() != 0:
        needed["fakeroot"] = shutil.which("fakeroot")  # debootstrap insists on root
    return [package for package, program in needed.items() if program is None]


def ensure(name: str) -> Userland:
    """The userland of a suite, made if it is not there. A killed run leaves a folder that the next one throws away."""
    if packages := lacking():
        sys.exit(f"programs that arm64 userlands need are missing: apt-get install {' '.join(packages)}")
    suite, folder = SUITES[name], CACHE / name
    with alone(name):
        made = _read(folder / "userland.json")
        if made.get("recipe") != RECIPE:
            started = time.monotonic()
            print(f"making the arm64 userland of {name} (half a minute and 300 MB, once)", flush=True)
            _make(suite, fresh(folder))
            made = {"recipe": RECIPE, "seconds": round(time.monotonic() - started, 1)}
            (partial(folder) / "userland.json").write_text(json.dumps(made), encoding="utf-8")
            finish(folder)
        userland = Userland(suite, folder, made["seconds"])
        _write_launcher(userland)
    return userland


@contextlib.contextmanager
def alone(what: str) -> Iterator[None]:
    """One run at a time makes a thing; a second one waits, and then finds it made."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def fresh(folder: Path) -> Path:
    """An empty folder in which to make what shall become ``folder``."""
    shutil.rmtree(partial(folder), ignore_errors=True)
    partial(folder).mkdir(parents=True)
    return partial(folder)


def finish(folder: Path) -> None:
    """What was made becomes ``folder``, in one step."""
    shutil.rmtree(folder, ignore_errors=True)
    partial(folder).rename(folder)


def _make(suite: Suite, folder: Path) -> None:
    root = folder / "root"
    program = debootstrap()
    assert program is not None
    # the first stage only fetches and unpacks, so that no arm64 program has to run; fakeroot is enough for it
    command = [program, "--arch=arm64", "--foreign", "--variant=minbase", "--include=python3,python3-venv"]
    _call([*([] if os.geteuid() == 0 else ["fakeroot"]), *command, suite.name, str(root)])
    # in place of the second stage: unpack the rest too, and configure nothing
    for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):
        _call(["dpkg-deb", "-x", str(package), str(root)])
    for name in _DROPPED:
        shutil.rmtree(root / name, ignore_errors=True)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed: {' | '.join((done.stderr or done.stdout).strip().splitlines()[-3:])}")


def _write_launcher(userland: Userland) -> None:
    """Written each time: it holds absolute paths, and a checkout may be moved."""
    root, version = userland.root, userland.suite.python
    # -0 hands over the name it was called by: Python finds itself, and the venv it stands for, by that
    text = f'#!/bin/sh\nexec {emulator()} -L "{root}" -0 "$0" "{root}/usr/bin/python{version}" "$@"\n'
    launcher = userland.python
    if not launcher.is_file() or launcher.read_text(encoding="utf-8") != text:
        launcher.write_text(text, encoding="utf-8")
        launcher.chmod(0o755)


def _read(marker: Path) -> Mapping[str, float]:
    try:
        made: Mapping[str, float] = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return made
