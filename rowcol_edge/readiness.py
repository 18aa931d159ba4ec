"""What this machine has and lacks, in general or for one target: ``rowcol-edge doctor``.

On any machine: what builds need. Where this machine can be the target: what its bundles need, too. A board, which a
target's ``match`` tells from other machines of its kind, only runs bundles: that it cannot build is no fault of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from .backends import BACKENDS
from .device import doctor, installed, system
from .device.doctor import GOOD, NOTE, STOP, TOLD, Diagnosis, Finding, Needs
from .targets import RuntimeSpec, Target, install_lines, runtime_entry

_PROJECT = "rowcol-edge"
_EXTRAS = ("build", "openvino", "tflite")
"""Of the extras, those that a build may need; without the first there is none."""
_BUILD_BYTES = 2 << 30
_TIMEOUT_S = 120


def diagnose(target: Target | None = None, root: Path = Path("/"), machine: str = "") -> Diagnosis:
    """Look at this machine; with a target, at what its runtimes need here, and say what they need on the board.

    ``root`` and ``machine`` stand in for the machine in tests.
    """
    host, facts = system.environment(root, machine=machine), target.to_dict() if target else {}
    here = target is not None and system.evidence_for(facts, host).level == system.TARGET
    board = here and len(facts["match"]) > 1
    building = [*_packages(target), *_backends(target)]
    if board:
        building = [replace(one, level=NOTE) if one.level == STOP else one for one in building]
    findings = [*building, *_machine(host, facts if here else {}, root)]
    if target is not None:
        findings += _bundles(target, facts) if here else []
        findings += [_on_the_board(runtime, here) for runtime in target.runtimes]
    return Diagnosis(_subject(target, here, board), tuple(findings))


def _subject(target: Target | None, here: bool, board: bool) -> str:
    if target is None:
        return "building"
    if board:
        return f"running bundles of {target.name}, which this machine is"
    return f"building for {target.name}{', and running its bundles' if here else ''}"


def _bundles(target: Target, facts: Mapping[str, Any]) -> list[Finding]:
    """What the target's bundles need of this machine; one runtime that works is enough."""
    every = [Needs(spec.name, runtime_entry(target, spec), facts) for spec in target.runtimes]
    groups = [(doctor.packages(needs), doctor.runtime(needs)) for needs in every]
    enough = any(all(one.level != STOP for part in group for one in part) for group in groups)
    worst: dict[str, Finding] = {}
    for one in (one for found, _ in groups for one in found):
        worst[one.what] = max(worst.get(one.what, one), one, key=lambda f: (GOOD, NOTE, STOP).index(f.level))
    findings = dict.fromkeys((*doctor.python(facts), *worst.values(), *(one for _, found in groups for one in found)))
    return [replace(one, level=NOTE) if enough and one.level == STOP else one for one in findings]


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


def _machine(host: system.Environment, facts: Mapping[str, Any], root: Path) -> Iterator[Finding]:
    """The machine and its state; ``facts`` are those of the target that it is."""
    yield from doctor.machine_of(host, facts)
    yield from doctor.memory(facts, root)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    room = free >= _BUILD_BYTES
    do = "" if room else f"a build wants {_BUILD_BYTES >> 30} GiB there: set TMPDIR to a disk with room"
    yield Finding(GOOD if room else NOTE, tempfile.gettempdir(), f"{free >> 20:,} MiB free", do)
    pip = installed.version("pip")
    do = "" if pip else "only --wheelhouse needs it: python -m ensurepip"
    yield Finding(GOOD if pip else NOTE, "pip", pip or "missing", do)
    yield from doctor.state(host, int(facts.get("threads") or 0))


def _on_the_board(runtime: RuntimeSpec, here: bool) -> Finding:
    reads = "" if runtime.opset is None else f", opset {runtime.opset}, IR {runtime.ir_version}"
    lines = install_lines(runtime)
    return Finding(
        TOLD, f"board {runtime.name}", f"≥ {runtime.oldest}{reads}", lines if here else f"on the board:\n{lines}"
    )
