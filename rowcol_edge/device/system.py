"""The machine a measurement is taken on, and what its figures are worth for a target.

Everything is read from /proc and /sys where they are, and a Raspberry Pi's firmware is asked for what it has throttled;
what a system does not tell stays empty, never guessed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from . import boards, power, sysfs

TARGET = "target"
PROXY = "proxy"
EMULATED = "emulated"
PREDICTED = "predicted"
EVIDENCE = (TARGET, PROXY, EMULATED, PREDICTED)
"""From strong to weak: measured on that board; on a host standing in for it; under an emulator; not measured at all."""

ISA_FLAGS = (
    "sse4_1", "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "fphp", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip
"""Instruction sets that change what an inference costs, as /proc/cpuinfo of Linux names them (x86, then Arm)."""
INT8_FLAGS = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
"""Of these, the ones that make int8 fast."""
_VNNI = ("avx_vnni", "avx512_vnni")
"""What x86 int8 that does not saturate rests on: a target that says so counts on one of them."""

CAP_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "OPENBLAS_CORETYPE", "OMP_NUM_THREADS", "QEMU_CPU")
"""Environment variables that hold a runtime to fewer instructions or threads than the processor has."""

EMULATED_VARIABLE = "ROWCOL_EMULATED"
"""Set by whoever starts this under an emulator that gives itself no sign."""

_ARM_PARTS = {
    "0xd03": "Cortex-A53", "0xd04": "Cortex-A35", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57", "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73", "0xd0a": "Cortex-A75", "0xd0b": "Cortex-A76", "0xd0c": "Neoverse-N1", "0xd0d": "Cortex-A77",
    "0xd40": "Neoverse-V1", "0xd41": "Cortex-A78", "0xd42": "Cortex-A78AE", "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
}  # fmt: skip
_MACHINES = {"arm64": "aarch64", "amd64": "x86_64"}
"""What other systems call the machines that targets name as Linux does."""
_OWN_GOVERNORS = ("intel_pstate", "amd-pstate-epp")
"""Drivers whose "powersave" is their normal governor and follows the load (kernel.org, admin-guide/pm/intel_pstate)."""
_CPUFREQ = "sys/devices/system/cpu/cpu[0-9]*/cpufreq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where a measurement was taken. ``host_id`` tells machines apart without naming them; empty texts and None: not
    told.

    ``governor`` names each governor that a core has, with the driver where the driver gives the word its own meaning;
    ``frequency_khz`` is that of the fastest core now, ``temperature_c`` the hottest zone's.
    ``throttled`` is the firmware's word on a Raspberry Pi: bits 0–3 say what holds now, 16–19 what has happened since
    boot. Elsewhere it says which cores are held below their highest frequency, by heat or a power mode.
    ``firmware_temperature_c`` is what a Raspberry Pi's firmware says. ``power_mode`` is a Jetson's, and ``clocks_held``
    says whether its clocks stand still, as ``jetson_clocks`` makes them. ``rails`` are the supplies whose power can be
    read, see :mod:`.power`; ``rails_unread`` says why others cannot.
    """

    machine: str
    system: str
    kernel: str
    host_id: str
    board: str
    cpu_model: str
    isa: tuple[str, ...]
    cores: int
    cores_usable: int
    governor: str
    frequency_khz: int | None
    temperature_c: float | None
    throttled: str
    firmware_temperature_c: float | None
    power_mode: str
    clocks_held: bool | None
    rails: tuple[str, ...]
    rails_unread: str
    memory_bytes: int | None
    load_1m: float | None
    virtual: str
    emulated: str
    caps: dict[str, str]
    python: str
    numpy: str


@dataclass(frozen=True, slots=True)
class Readings:
    """What may change while a measurement runs, as in :class:`Environment`."""

    governor: str
    frequency_khz: int | None
    temperature_c: float | None
    firmware_temperature_c: float | None
    throttled: str
    power_mode: str
    clocks_held: bool | None


class Evidence(NamedTuple):
    """One of ``EVIDENCE``, and the sentence that explains it."""

    level: str
    note: str


def environment(root: Path = Path("/"), variables: Mapping[str, str] = os.environ, machine: str = "") -> Environment:
    """Read the machine; ``root`` and ``machine`` stand in for it in tests."""
    machine = machine or platform.machine()
    cpuinfo = sysfs.text(root / "proc/cpuinfo")
    cores = sorted(root.glob(_CPUFREQ), key=lambda path: int(path.parent.name[3:]))
    rails = power.rails(root)
    return Environment(
        machine=machine,
        system=platform.system(),
        kernel=platform.release(),
        host_id=_host_id(root),
        board=sysfs.text(root / "proc/device-tree/model").strip("\0\n "),
        cpu_model=_cpu_model(cpuinfo),
        isa=_isa(cpuinfo),
        cores=os.cpu_count() or 1,
        cores_usable=_usable(),
        governor=" + ".join(dict.fromkeys(filter(None, map(_governor, cores)))),
        frequency_khz=max(filter(None, (sysfs.number(core / "scaling_cur_freq") for core in cores)), default=None),
        temperature_c=_temperature(root),
        throttled=boards.throttled(root) or _held(cores),
        firmware_temperature_c=boards.firmware_temperature(root),
        power_mode=boards.power_mode(root),
        clocks_held=boards.clocks_held(root, cores),
        rails=tuple(rail.name for rail in rails.found),
        rails_unread=rails.unread,
        memory_bytes=_memory_bytes(root),
        load_1m=_load(root),
        virtual=_virtual(root, cpuinfo),
        emulated=_emulated(root, cpuinfo, variables, machine),
        caps={name: variables[name] for name in CAP_VARIABLES if variables.get(name)},
        python=platform.python_version(),
        numpy=_version("numpy"),
    )


def readings(host: Environment) -> Readings:
    """Of what was read, that which may be another after a measurement."""
    return Readings(**{field.name: getattr(host, field.name) for field in fields(Readings)})


def evidence_for(target: Mapping[str, Any], host: Environment) -> Evidence:
    """What times taken on this host are worth for a target, which is as its manifest holds it."""
    if host.emulated:
        return Evidence(EMULATED, f"{host.emulated}: proves outputs, its times mean nothing")
    match = target.get("match") or {}
    board, cpu = match.get("device_tree_model", ""), match.get("cpu_model", "")
    lacking = [flag for flag in target.get("isa") or () if host.isa and flag not in host.isa]
    where = host.board or host.cpu_model or host.machine
    same = host.machine == match.get("machine") and board in host.board and bool(re.search(cpu, host.cpu_model))
    if same and not lacking:
        counted = {*(target.get("isa") or ()), *(() if target.get("int8_saturates", True) else _VNNI)}
        beyond = [flag for flag in INT8_FLAGS if flag in host.isa and flag not in counted]
        more = f"; it has {', '.join(beyond)}, which the target does not count on" if beyond else ""
        return Evidence(TARGET, f"measured on {where}{more}")
    wanted = board or (str(target.get("title", "")) if cpu else "") or match.get("machine", "") or "the target"
    lack = f" without {', '.join(lacking)}" if lacking and host.machine == match.get("machine") else ""
    caps = target.get("proxy_env") or {}
    cap = "capped by " + " ".join(f"{k}={v}" for k, v in sorted(caps.items())) if caps else "no instruction-set cap"
    note = " ".join(str(target.get("proxy_note") or "").split())
    return Evidence(PROXY, f"{where} ({host.machine}){lack} stands in for {wanted}, {cap}{': ' + note if note else ''}")


def saturates_only_here(target: Mapping[str, Any], root: Path = Path("/"), machine: str = "") -> bool:
    """Whether sums of 8-bit products saturate on this machine and not on the target: x86 without VNNI adds them in
    pairs to 16 bits. ``root`` and ``machine`` stand in for this one in tests."""
    if another_machine({"match": {"machine": "x86_64"}}, machine or platform.machine()):
        return False  # asked first: an emulator may show its host's flags
    isa = _isa(sysfs.text(root / "proc/cpuinfo"))
    return not target.get("int8_saturates", True) and "sse4_1" in isa and not set(_VNNI) & set(isa)


def another_machine(target: Mapping[str, Any], machine: str) -> str:
    """The kind of machine that a target is, where ``machine`` is of another kind; else empty."""
    wanted = str((target.get("match") or {}).get("machine", ""))
    return "" if wanted == _MACHINES.get(machine.lower(), machine) else wanted


def weaker(level: str, than: str) -> bool:
    """Is an evidence level weaker than another?"""
    return EVIDENCE.index(level) > EVIDENCE.index(than)


def counts(level: str) -> bool:
    """Do times, memory and energy of this evidence say anything of the target? An emulator's are its own."""
    return level not in (EMULATED, PREDICTED)


def host_warnings(host: Environment, threads: int) -> list[str]:
    """What on this machine disturbs a measurement, each with what to do about it."""
    warnings = []
    if host.load_1m is not None and host.load_1m > 0.25 * host.cores_usable + 0.25:
        warnings.append(f"load {host.load_1m:.2f} on {host.cores_usable} core(s): end other work, then measure again")
    if host.throttled not in ("", "0", "0x0"):
        warnings.append(
            f"throttling ({host.throttled}): cool the board, mind its supply and power mode, then measure again"
        )
    if slow := [one for one in host.governor.split(" + ") if one in ("powersave", "conservative")]:
        warnings.append(f"CPU governor {' + '.join(slow)}: set performance, or state that the board runs like this")
    if threads > host.cores_usable:
        warnings.append(f"{threads} threads on {host.cores_usable} usable core(s): they wait for one another")
    return warnings


def _version(package: str) -> str:
    # not by importing it: this also runs where the package is missing or does not load
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _values(cpuinfo: str, key: str) -> list[str]:
    return re.findall(rf"^{re.escape(key)}\s*:\s*(.+?)\s*$", cpuinfo, re.MULTILINE)


def _cpu_model(cpuinfo: str) -> str:
    # an Arm system may also have a "model name", which is the same for all processors
    parts = dict.fromkeys(_ARM_PARTS.get(part, f"Arm part {part}") for part in _values(cpuinfo, "CPU part"))
    if parts:
        return " + ".join(parts)  # big.LITTLE has two
    return next(iter(_values(cpuinfo, "model name")), "")


def _isa(cpuinfo: str) -> tuple[str, ...]:
    lines = _values(cpuinfo, "flags") or _values(cpuinfo, "Features")
    if not lines:
        return ()
    # cores may differ: what every one of them has
    common = set.intersection(*(set(line.split()) for line in lines))
    return tuple(flag for flag in ISA_FLAGS if flag in common)


def _usable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _governor(core: Path) -> str:
    governor, driver = sysfs.text(core / "scaling_governor").strip(), sysfs.text(core / "scaling_driver").strip()
    return f"{governor} ({driver})" if governor and driver in _OWN_GOVERNORS else governor


def _held(cores: Sequence[Path]) -> str:
    """The cores that may not go as fast as they can, such as ``cpu0 + cpu1 at 1200 of 1800 MHz``."""
    held: dict[str, list[str]] = {}
    for core in cores:
        allowed, able = sysfs.number(core / "scaling_max_freq"), sysfs.number(core / "cpuinfo_max_freq")
        if allowed and able and allowed < able:
            held.setdefault(f"{allowed // 1000} of {able // 1000} MHz", []).append(core.parent.name)
    return ", ".join(f"{' + '.join(names)} at {what}" for what, names in held.items())


def _temperature(root: Path) -> float | None:
    """That of the hottest zone; a Jetson's zone of the power management chip always says 100 °C."""
    zones = [z for z in root.glob("sys/class/thermal/thermal_zone*") if "pmic" not in sysfs.text(z / "type").lower()]
    found = [value / 1000 for zone in zones if (value := sysfs.number(zone / "temp")) is not None]
    return max(found, default=None)


def _memory_bytes(root: Path) -> int | None:
    found = re.search(r"^MemTotal:\s+(\d+) kB", sysfs.text(root / "proc/meminfo"), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _load(root: Path) -> float | None:
    parts = sysfs.text(root / "proc/loadavg").split()
    return float(parts[0]) if parts and re.fullmatch(r"\d+(\.\d+)?", parts[0]) else None


def _host_id(root: Path) -> str:
    # machine-id(5) asks that it leave the machine only hashed with something of the application
    machine_id = sysfs.text(root / "etc/machine-id").strip()
    return hashlib.sha256(f"rowcol-edge {machine_id}".encode()).hexdigest()[:12] if machine_id else ""


def _virtual(root: Path, cpuinfo: str) -> str:
    signs = []
    marked = (root / ".dockerenv").exists() or (root / "run/.containerenv").exists()
    if marked or re.search(r"docker|lxc|kubepods|containerd", sysfs.text(root / "proc/1/cgroup")):
        signs.append("container")
    if any("hypervisor" in line.split() for line in _values(cpuinfo, "flags")):
        vendor = sysfs.text(root / "sys/class/dmi/id/sys_vendor").strip()
        signs.append(f"virtual machine ({vendor})" if vendor else "virtual machine")
    return ", ".join(signs)


def _emulated(root: Path, cpuinfo: str, variables: Mapping[str, str], machine: str) -> str:
    """The sign that this runs under an emulator, or nothing.

    QEMU's user mode makes up the /proc/self/maps that its guest sees; the same file of a thread shows QEMU itself.
    """
    if variables.get(EMULATED_VARIABLE, "") not in ("", "0"):
        return f"{EMULATED_VARIABLE} is set"
    threads = sorted((root / "proc/self/task").glob("*/maps"))
    for maps in (root / "proc/self/maps", *threads[:1]):
        if re.search(r"/qemu-(aarch64|arm|x86_64|i386|riscv64)", sysfs.text(maps)):
            return "QEMU user-mode emulation"
    # an older QEMU hands its guest the host's own cpuinfo
    if (machine.startswith(("aarch64", "arm")) and _values(cpuinfo, "flags")) or (
        machine == "x86_64" and _values(cpuinfo, "CPU implementer")
    ):
        return f"{machine} on a processor of another kind"
    return ""
