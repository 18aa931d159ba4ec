"""What boards of two makers tell beyond what every Linux does: a Raspberry Pi's firmware and a Jetson's power modes.

Files are read and programs asked that only read; nothing is set. What is not there stays empty.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import sysfs

_THROTTLED = "sys/devices/platform/soc*/soc*:firmware/get_throttled"
_VCGENCMD = "usr/bin/vcgencmd"
"""Asks a Raspberry Pi's firmware what newer systems no longer show as a file (raspberrypi.com, computers/os)."""
_NVPMODEL = "usr/sbin/nvpmodel"
_GPU_CLOCKS = ("sys/class/devfreq/*.gpu", "sys/class/devfreq/*.g[avp]1[01]*")
"""The GPU of a Jetson: 17000000.gpu on newer systems, before that by the chip: .gp10b, .gv11b, .ga10b."""


def raspberry_pi(board: str) -> bool:
    """Is a board of that name (the device tree's ``model``) one whose firmware can be asked?"""
    return board.startswith("Raspberry Pi")


def jetson(board: str) -> bool:
    return "NVIDIA" in board or "Jetson" in board


def throttled(root: Path) -> str:
    """What a Raspberry Pi's firmware says of throttling, in hexadecimal; empty elsewhere."""
    told = [sysfs.text(path).strip() for path in root.glob(_THROTTLED)]
    if not any(told):
        told = re.findall(r"^throttled=0x([0-9a-f]+)$", _said(root / _VCGENCMD, "get_throttled"), re.MULTILINE)
    return next(filter(None, told), "")


def firmware_temperature(root: Path) -> float | None:
    """A Raspberry Pi's firmware answers as ``temp=48.3'C``."""
    found = re.search(r"^temp=(-?[0-9]+(?:\.[0-9]+)?)'C$", _said(root / _VCGENCMD, "measure_temp"), re.MULTILINE)
    return float(found.group(1)) if found else None


def _said(program: Path, *arguments: str) -> str:
    """What a program prints that only reads; nothing where it is missing, fails to start or does not come back."""
    if not program.is_file():
        return ""
    try:
        done = subprocess.run(
            [str(program), *arguments], capture_output=True, text=True, errors="replace", timeout=2, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def power_mode(root: Path) -> str:
    """A Jetson's power mode, as ``MAXN_SUPER (2)``; empty elsewhere.

    nvpmodel keeps the number of what was set last as ``pmode:0002``, and its configuration has the names as
    ``< POWER_MODEL ID=2 NAME=MAXN_SUPER >``. Asked with -q it says ``NV Power Mode: MAXN_SUPER`` and, in the next line,
    the number.
    """
    kept = re.search(r"^pmode:([0-9]+)", sysfs.text(root / "var/lib/nvpmodel/status"), re.MULTILINE)
    if kept:
        number = int(kept.group(1))
        models = sysfs.text(root / "etc/nvpmodel.conf")
        name = re.search(rf"^\s*<\s*POWER_MODEL\s+ID=0*{number}\s+NAME=(\S+)\s*>", models, re.MULTILINE)
        return f"{name.group(1)} ({number})" if name else str(number)
    asked = re.search(r"^NV Power Mode:[ \t]*(\S.*?)\s*\n\s*([0-9]+)\s*$", _said(root / _NVPMODEL, "-q"), re.MULTILINE)
    return f"{asked.group(1)} ({asked.group(2)})" if asked else ""


def clocks_held(root: Path, cores: Sequence[Path]) -> bool | None:
    """Do all clocks of a Jetson's processor and GPU have their lowest frequency at their highest, as jetson_clocks sets
    them? None elsewhere, and where no clock can be read (``jetson_clocks --show`` would need root)."""
    if "nvidia,tegra" not in sysfs.text(root / "proc/device-tree/compatible"):
        return None
    gpus = [folder for pattern in _GPU_CLOCKS for folder in root.glob(pattern)]
    bounds = [(sysfs.number(core / "scaling_min_freq"), sysfs.number(core / "scaling_max_freq")) for core in cores]
    bounds += [(sysfs.number(gpu / "min_freq"), sysfs.number(gpu / "max_freq")) for gpu in gpus]
    known = [lowest == highest for lowest, highest in bounds if lowest is not None and highest is not None]
    return all(known) if known else None
