"""What the build side has and lacks on this machine, in general or for one target: ``rowcol-edge doctor``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from .backends import BACKENDS
from .device import installed, system
from .device.doctor import GOOD, NOTE, STOP, TOLD, Diagnosis, Finding, state
from .targets import RuntimeSpec, Target, install_lines

_PROJECT = "rowcol-edge"
_EXTRAS = ("build", "openvino", "tflite")
"""Of the extras, those that a build may need; without the first there is none."""
_BUILD_BYTES = 2 << 30
_TIMEOUT_S = 120


def diagnose(target: Target | None = None) -> Diagnosis:
    """Look at this machine; with a target, at what its runtimes need here, and say what they need on the board."""
    findings = [*_packages(target), *_backends(target), *_machine()]
    findings += [_on_the_board(runtime) for runtime in (target.runtimes if target else ())]
    return Diagnosis(f"building for {target.name}" if target else "building", tuple(findings))


def _packages(target: Target | None) -> Iterator[Finding]:
    """The packages of each extra, against the versions that are known to work together."""
    wanted = {"build", *(spec.name for spec in target.runtimes)} if target else set(_EXTRAS)
    for extra in _EXTRAS:
        if extra not in wanted:
            continue
        lacking, found = [], []
        wanted_here = requirements(extra)
        if not wanted_here:
            yield Finding(
                NOTE, f"extra {extra}", "unknown: this checkout was not installed", "python -m pip install -e ."
            )
        for requirement in wanted_here:
            version = installed.version(requirement.name)
            fits = bool(version) and requirement.specifier.contains(version, prereleases=True)
            if fits:
                found.append(f"{requirement.name} {version}")
            else:
                lacking.append(f"{requirement.name} {version or 'missing'} ({requirement.specifier})")
        do = f"python -m pip install '{_PROJECT}[{extra}]'"
        if found and not lacking:
            yield Finding(GOOD, f"extra {extra}", ", ".join(found))
        elif lacking:
            yield Finding(STOP if extra == "build" else NOTE, f"extra {extra}", ", ".join(lacking), do)


def requirements(extra: str) -> list[Requirement]:
    """What this installation says that an extra needs here; empty if it was not installed by pip."""
    try:
        texts = metadata.requires(_PROJECT) or []
    except metadata.PackageNotFoundError:
        return []
    found = [Requirement(text) for text in texts]
    return [
        r for r in found if r.marker and not r.marker.evaluate({"extra": ""}) and r.marker.evaluate({"extra": extra})
    ]


def _backends(target: Target | None) -> Iterator[Finding]:
    """Which backends load; each in a process of its own, because what they import may end it."""
    names = [spec.name for spec in target.runtimes] if target else list(BACKENDS)
    failures = {name: _failure(name) for name in names}
    usable = any(not failure for failure in failures.values())
    for name, failure in failures.items():
        what = f"backend {name}"
        if not failure:
            yield Finding(GOOD, what, "can be used")
        else:
            said, _, do = failure.partition(" – ")
            yield Finding(NOTE if usable else STOP, what, said, do or "install its packages again")


def _failure(backend: str) -> str:
    """Why a backend does not load, in its own words; empty if it does."""
    code = f"from rowcol_edge.backends import load_backend; load_backend({backend!r})"
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=environment, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"importing it took longer than {_TIMEOUT_S} s"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    # a traceback's last line, without the name of the exception
    return lines[-1].partition(": ")[2] or lines[-1] if lines else f"importing it ended with {done.returncode}"


def _machine() -> Iterator[Finding]:
    host = system.environment()
    yield Finding(GOOD, "machine", ", ".join(filter(None, (host.cpu_model, host.machine, host.virtual))))
    free = shutil.disk_usage(tempfile.gettempdir()).free
    room = free >= _BUILD_BYTES
    do = "" if room else f"a build wants {_BUILD_BYTES >> 30} GiB there: set TMPDIR to a disk with room"
    yield Finding(GOOD if room else NOTE, tempfile.gettempdir(), f"{free >> 20:,} MiB free", do)
    pip = installed.version("pip")
    do = "" if pip else "only --wheelhouse needs it: python -m ensurepip"
    yield Finding(GOOD if pip else NOTE, "pip", pip or "missing", do)
    yield from state(host, 0)


def _on_the_board(runtime: RuntimeSpec) -> Finding:
    reads = "" if runtime.opset is None else f", opset {runtime.opset}, IR {runtime.ir_version}"
    lines = f"on the board:\n{install_lines(runtime)}"
    return Finding(TOLD, f"board {runtime.name}", f"≥ {runtime.oldest}{reads}", lines)
