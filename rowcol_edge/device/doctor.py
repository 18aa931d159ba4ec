"""What this machine has and lacks for a bundle: ``doctor``. It works where neither numpy nor a runtime is installed.

A finding is good (✓), worth knowing (!), or something that stops a run (✗); the latter two say what to do.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BundleError
from . import installed, system
from .fields import Fields, parse_json
from .manifest import MANIFEST_NAME, RuntimeEntry, check_schema, runtime_entry
from .versions import WITH_NUMPY_2, is_at_least, name_of, numbers, satisfies

GOOD, NOTE, STOP, TOLD = "good", "note", "stop", "told"
MARKS = {GOOD: "✓", NOTE: "!", STOP: "✗", TOLD: "·"}

_HOT_C = 80.0
_SWAP_USED_BYTES = 64 << 20
_TMP_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """``level`` is GOOD, NOTE or STOP, or TOLD for what was not looked at; ``do`` says what to do."""

    level: str
    what: str
    found: str
    do: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, for ``subject``: a bundle, a target, or the machine as it is."""

    subject: str
    findings: tuple[Finding, ...]

    @property
    def stopped(self) -> bool:
        """Does something stop a build or a run?"""
        return any(finding.level == STOP for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {"subject": self.subject, "ok": not self.stopped, "findings": [asdict(f) for f in self.findings]}


@dataclass(frozen=True, slots=True)
class Needs:
    """What a bundle asks of a machine; ``unpacked_bytes`` is what opening its ``.zip`` writes to a temporary folder."""

    subject: str
    runtime: RuntimeEntry
    target: Mapping[str, Any] = field(default_factory=dict)
    unpacked_bytes: int = 0

    @property
    def requirements(self) -> tuple[tuple[str, ...], ...]:
        """What pip installs there, by the target's data: the first choice, then its alternatives."""
        for spec in _tables(self.target.get("runtimes")):
            if spec.get("name") == self.runtime.name:
                choices = [spec, *_tables(spec.get("alternatives"))]
                return tuple(tuple(map(str, choice.get("requirements") or ())) for choice in choices)
        return ()


def read_needs(path: str | Path) -> Needs:
    """Of a bundle folder or ``.zip``; only its manifest is read. BundleError: it is none, or of another schema."""
    source = Path(path)
    unpacked_bytes = 0
    try:
        if source.is_dir():
            data = (source / MANIFEST_NAME).read_bytes()
        else:
            with zipfile.ZipFile(source) as archive:
                name = min((n for n in archive.namelist() if n.split("/")[-1] == MANIFEST_NAME), key=len)
                data = archive.read(name)
                unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile, ValueError) as e:
        got = (e.strerror or str(e)) if isinstance(e, OSError) else "no manifest.json that can be read"
        raise BundleError(str(path), expected="a bundle folder or .zip", got=got) from e
    values = parse_json(data, "manifest")
    fields = Fields(values, "manifest")
    check_schema(fields.integer("schema"))
    return Needs(fields.text("name"), runtime_entry(fields.child("runtime")), fields.table("target"), unpacked_bytes)


def diagnose(needs: Needs | None, root: Path = Path("/"), machine: str = "") -> Diagnosis:
    """Look at this machine; ``root`` and ``machine`` stand in for it in tests."""
    host = system.environment(root, machine=machine)
    target = needs.target if needs else {}
    findings = [*python(target), *machine_of(host, target), *packages(needs)]
    findings += runtime(needs) if needs else _runtimes()
    findings += [*state(host, needs.runtime.threads if needs else 0), *memory(target, root), *_disk(needs)]
    return Diagnosis(needs.subject if needs else "this machine", tuple(findings))


def report(diagnosis: Diagnosis) -> str:
    """Plain text: a line a finding, and below it what to do."""
    width = max(len(finding.what) for finding in diagnosis.findings)
    lines = [f"{diagnosis.subject}:"]
    said: set[str] = set()
    for finding in diagnosis.findings:
        lines.append(f"  {MARKS[finding.level]} {finding.what:{width}}  {finding.found}")
        do = finding.do if finding.do not in said else "the same"
        said |= {finding.do} - {""}
        lines += [f"    {'':{width}}  → {line}" for line in do.splitlines()]
    return "\n".join([*lines, verdict(diagnosis)])


def verdict(diagnosis: Diagnosis) -> str:
    """The last line: does anything stop a run?"""
    stops = sum(finding.level == STOP for finding in diagnosis.findings)
    notes = sum(finding.level == NOTE for finding in diagnosis.findings)
    return f"{stops} thing(s) in the way, {notes} to know of" if stops else f"nothing in the way, {notes} to know of"


def python(target: Mapping[str, Any]) -> list[Finding]:
    """This interpreter against those that a target's bundles meet."""
    found = f"{platform.python_version()} ({sys.executable})"
    ours = f"{sys.version_info[0]}.{sys.version_info[1]}"
    pythons = [str(one) for one in target.get("pythons") or ()]
    if struct.calcsize("P") < 8:
        do = "install the 64-bit system: the runtimes have no wheels for a 32-bit one"
        return [Finding(STOP, "Python", f"{found}, 32-bit", do)]
    if pythons and ours not in pythons:
        do = f"the target lists {', '.join(pythons)}: there may be no wheels for this one"
        return [Finding(NOTE, "Python", found, do)]
    return [Finding(GOOD, "Python", found)]


def machine_of(host: system.Environment, target: Mapping[str, Any]) -> list[Finding]:
    """The machine, what its figures are worth for a target, and its C library."""
    found = ", ".join(filter(None, (host.board or host.cpu_model, host.machine, host.virtual)))
    library = _c_library(str(target.get("platform") or ""))
    if not target.get("match"):
        return [Finding(GOOD, "machine", found), *library]
    evidence = system.evidence_for(target, host)
    same = evidence.level == system.TARGET
    do = "" if same else f"figures from here are of evidence {evidence.level}: {evidence.note.partition(': ')[0]}"
    return [Finding(GOOD if same else NOTE, "machine", found, do), *library]


def _c_library(tag: str) -> list[Finding]:
    """Is the glibc as new as that of the wheels which the target counts on?"""
    name, version = platform.libc_ver()
    wanted = re.match(r"manylinux_(\d+)_(\d+)_", tag)
    if name != "glibc":
        do = "PyPI's Linux wheels of the runtimes are for glibc: use a system that has it"
        return [Finding(NOTE, "C library", name or "not glibc", do)] if platform.system() == "Linux" else []
    if wanted and numbers(version) < (int(wanted[1]), int(wanted[2])):
        do = f"the target counts on {wanted[1]}.{wanted[2]}: pip may find older wheels only"
        return [Finding(NOTE, "C library", f"glibc {version}", do)]
    return [Finding(GOOD, "C library", f"glibc {version}")]


def packages(needs: Needs | None) -> list[Finding]:
    """numpy and Pillow: there, loading, and of a version that the runtime works with."""
    install = needs.runtime.install if needs else "python3 -m pip install numpy pillow"
    findings = []
    for name, package, absent, why in (
        ("numpy", "numpy", STOP, "nothing runs without it"),
        ("Pillow", "pillow", NOTE, "image files need it"),
    ):
        version = installed.version(package)
        if not version:
            findings.append(Finding(absent, name, f"not installed: {why}", install))
            continue
        loaded = installed.load(package)
        conflict = _numpy_conflict(needs, version) if package == "numpy" else ""
        if loaded.failure:
            again = f"install it again: python3 -m pip install --force-reinstall {package}"
            findings.append(Finding(absent, name, f"{version} does not load: {loaded.failure}", again))
        elif conflict:
            findings.append(Finding(STOP, name, f"{version}, {conflict}", 'python3 -m pip install "numpy<2"'))
        else:
            findings.append(Finding(GOOD, name, version))
    return findings


def _numpy_conflict(needs: Needs | None, version: str) -> str:
    """The runtime that was built against numpy 1 and is used with a newer one."""
    if not is_at_least(version, "2"):
        return ""
    names = [needs.runtime.name] if needs else list(installed.PACKAGES)
    lite, ort = installed.version("tflite-runtime"), installed.version("onnxruntime")
    if "tflite" in names and lite and not is_at_least(lite, WITH_NUMPY_2) and _lite() == "tflite-runtime":
        return f"which tflite-runtime {lite} does not work with"
    if "onnxruntime" in names and ort and not is_at_least(ort, "1.19"):
        return f"which onnxruntime {ort} does not work with"
    return ""


def runtime(needs: Needs) -> list[Finding]:
    """The runtime that is needed: there, new enough, loading, with the device it is asked for."""
    entry = needs.runtime
    present = _present(entry.name)
    loaded = installed.load(entry.name) if entry.name in installed.PACKAGES else installed.Loaded()
    if not present and (loaded.failure or not loaded.devices):
        return [Finding(STOP, entry.name, "not installed", entry.install)]
    package, version = _used(present, loaded, entry.name)
    findings = _several(entry.name, present)
    newer = package == "ai-edge-litert"  # numbers its versions anew: any of them is newer than every tflite-runtime
    if not newer and not is_at_least(version, entry.oldest):
        reads = "" if entry.opset is None else f" that reads opset {entry.opset} and IR version {entry.ir_version}"
        found = f"{package} {version} is older than {entry.oldest}, the oldest{reads}"
        return [*findings, Finding(STOP, entry.name, found, entry.install)]
    if loaded.failure:
        found = f"{package} {version} does not load: {loaded.failure}"
        do = f"the wheel may be for another processor, C library or numpy; install it again:\n{entry.install}"
        if package == "ai-edge-litert":  # one that ends the process would do so before any other is tried
            do += f"\n# before another package: python3 -m pip uninstall -y {package}"
        return [*findings, Finding(STOP, entry.name, found, do)]
    lacking = [one for one in entry.providers if not _offered(entry.name, one, loaded.devices)]
    if lacking:
        found = f"{package} {version} offers {', '.join(loaded.devices) or 'nothing'}, not {', '.join(lacking)}"
        do = f"install the build or the driver that has it:\n{entry.install}"
        return [*findings, Finding(STOP, entry.name, found, do)]
    return [*findings, Finding(GOOD, entry.name, f"{package} {version}"), *_asked(needs, package)]


def _offered(runtime: str, provider: str, devices: Sequence[str]) -> bool:
    if runtime == "tflite" and provider != "CPU":  # the library of a delegate; without a path the loader finds it
        return "/" not in provider or Path(provider).is_file()
    return provider in devices or any(device.partition(".")[0] == provider for device in devices)


def _asked(needs: Needs, package: str) -> list[Finding]:
    """Installed packages that are outside the range that the target asks for."""
    choices = [c for c in needs.requirements if package in map(name_of, c)] or list(needs.requirements[:1])
    findings = []
    for requirement in choices[0] if choices else ():
        version = installed.version(name_of(requirement))
        if name_of(requirement) == "numpy" and _numpy_conflict(needs, version):
            continue  # said before, as what stops the run
        if version and not satisfies(version, requirement):
            do = f'python3 -m pip install "{requirement}"'
            findings.append(Finding(NOTE, name_of(requirement), f"{version}, not {requirement}", do))
    return findings


def _runtimes() -> list[Finding]:
    """Without a bundle: every runtime that is there, and how it loads."""
    findings = []
    for name in installed.PACKAGES:
        present = _present(name)
        if not present:
            continue
        loaded = installed.load(name)
        found = " and ".join(f"{package} {version}" for package, version in present)
        findings += _several(name, present)
        if loaded.failure:
            do = "the wheel may be for another processor, C library or numpy: install it again"
            findings.append(Finding(STOP, name, f"{found} does not load: {loaded.failure}", do))
        else:
            findings.append(Finding(GOOD, name, f"{found}: {', '.join(loaded.devices)}"))
    if not findings:
        do = "name the bundle, and this prints the line that installs its runtime: doctor BUNDLE"
        findings.append(Finding(STOP, "runtimes", "none is installed", do))
    return findings


def _present(runtime: str) -> list[tuple[str, str]]:
    packages = installed.PACKAGES.get(runtime, (runtime,))
    return [(package, version) for package in packages if (version := installed.version(package))]


def _used(present: Sequence[tuple[str, str]], loaded: installed.Loaded, runtime: str) -> tuple[str, str]:
    """The package that a runtime is loaded from, and its version; the first one that is there where none loads."""
    name = loaded.module.replace("_", "-")
    return next(
        (one for one in present if one[0] == name), present[0] if present else (name or runtime, loaded.version)
    )


def _lite() -> str:
    """The package that opens TFLite files here."""
    return _used(_present("tflite"), installed.load("tflite"), "tflite")[0]


def _several(runtime: str, present: Sequence[tuple[str, str]]) -> list[Finding]:
    if runtime != "onnxruntime" or len(present) < 2:
        return []
    names = [package for package, _ in present]
    do = f"uninstall all of them, then install the one you mean: python3 -m pip uninstall {' '.join(names)}"
    return [Finding(NOTE, runtime, f"{' and '.join(names)} overwrite each other's files", do)]


def state(host: system.Environment, threads: int) -> list[Finding]:
    """What disturbs a measurement: load, throttling, governor, heat."""
    findings = []
    for text in system.host_warnings(host, threads):
        found, _, do = text.partition(": ")
        findings.append(Finding(NOTE, "measuring", found, do))
    if host.temperature_c is not None:
        hot = host.temperature_c >= _HOT_C
        do = "it slows down from here on: cool it before you measure" if hot else ""
        findings.append(Finding(NOTE if hot else GOOD, "temperature", f"{host.temperature_c:.0f} °C", do))
    if not any(finding.what == "measuring" for finding in findings):
        found = f"governor {host.governor}" if host.governor else "idle"
        findings.append(Finding(GOOD, "measuring", f"{found}, nothing that disturbs"))
    return findings


def memory(target: Mapping[str, Any], root: Path = Path("/")) -> list[Finding]:
    """Free memory against what the target allows an inference, and swap in use."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    findings = []
    if "MemAvailable" in kib:
        free_mib, budget = kib["MemAvailable"] // 1024, int(target.get("memory_mb") or 0)
        short = free_mib < budget
        do = f"the target allows an inference {budget:,} MiB: end other programs" if short else ""
        findings.append(Finding(NOTE if short else GOOD, "free memory", f"{free_mib:,} MiB", do))
    used = (kib.get("SwapTotal", 0) - kib.get("SwapFree", 0)) * 1024
    if used > _SWAP_USED_BYTES:
        do = "a measurement may wait for the disk: end other programs, or sudo swapoff -a"
        findings.append(Finding(NOTE, "swap", f"{used >> 20:,} MiB in use", do))
    return findings


def _disk(needs: Needs | None) -> list[Finding]:
    """Room for what opening a ``.zip`` unpacks."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    wanted = max(_TMP_BYTES, needs.unpacked_bytes if needs else 0)
    do = "" if free >= wanted else f"{wanted >> 20:,} MiB are wanted: set TMPDIR to a disk with room, or unzip it there"
    level = GOOD if free >= wanted else STOP if needs and needs.unpacked_bytes > free else NOTE
    writable = os.access(folder, os.W_OK)
    return [Finding(level if writable else STOP, folder, f"{free >> 20:,} MiB free", do)]


def _tables(value: object) -> Iterable[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, (list, tuple)) else []
