"""Memory of this process, and what is left of the machine's, as Linux counts it.

``VmRSS`` is what lies in memory now, pages of mapped files (the interpreter, the runtime's libraries) included.
``VmHWM`` is the highest value it ever had; writing 5 to ``/proc/self/clear_refs`` sets it back to the present value,
so that the import of the runtime does not count as the model's peak (proc(5)).

``smaps_rollup`` (Linux 4.14 or newer) tells the pages apart: PSS counts one that n processes share for 1/n, private are
those that no other process has (``Private_Clean`` and ``Private_Dirty``), which is what the end of the process would
free (kernel.org, filesystems/proc): the runtime's libraries too, unless another process has them.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from . import sysfs

_PROCESS = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of a process now; each is None where the system does not tell."""

    resident_bytes: int | None
    proportional_bytes: int | None
    private_bytes: int | None


STAGES = ("imported", "loaded", "first", "steady")
"""Of a process that runs a model: the runtime is imported, the artifact open, one inference done, all of them done."""


@dataclass(frozen=True, slots=True)
class Curve:
    """RSS of a process over time, in ns since it was started; only changes are kept, each with the last reading before
    it.

    ``marks_ns`` are the times of STAGES.
    """

    times_ns: tuple[int, ...]
    resident_bytes: tuple[int, ...]
    marks_ns: tuple[int, ...]

    def at(self, time_ns: int) -> int:
        """The reading before that time; the first one where there is none."""
        return self.resident_bytes[max(0, bisect_right(self.times_ns, time_ns) - 1)]


def usage(process: Path = _PROCESS) -> Usage:
    """RSS, PSS and private bytes of ``smaps_rollup``; RSS alone, from ``status``, where there is none."""
    rollup = sysfs.text(process / "smaps_rollup")
    private = [_kilobytes(rollup, f"Private_{kind}") for kind in ("Clean", "Dirty")]
    resident = _kilobytes(rollup, "Rss")
    return Usage(
        resident_bytes(process) if resident is None else resident,
        _kilobytes(rollup, "Pss"),
        None if None in private else sum(filter(None, private)),
    )


def resident_bytes(process: Path = _PROCESS) -> int | None:
    """Memory in use now, in bytes (VmRSS); None where /proc does not tell."""
    return _status(process, "VmRSS")


def peak_bytes(process: Path = _PROCESS) -> int | None:
    """Most memory in use since the start or :func:`reset_peak`, in bytes (VmHWM); None where /proc does not tell."""
    return _status(process, "VmHWM")


def reset_peak(process: Path = _PROCESS) -> bool:
    """Set the peak back to the present value; False where that is not allowed (the peak then holds the imports too)."""
    try:
        (process / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def available_bytes(proc: Path = Path("/proc")) -> int:
    """What can be had without swapping, the page cache included (MemAvailable); free pages where /proc tells none."""
    found = _kilobytes(sysfs.text(proc / "meminfo"), "MemAvailable")
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if found is None else found


def _status(process: Path, key: str) -> int | None:
    return _kilobytes(sysfs.text(process / "status"), key)


def _kilobytes(text: str, key: str) -> int | None:
    """The bytes of a line such as ``VmRSS:	  123 kB``."""
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        parts = rest.split()
        if name == key and len(parts) == 2 and parts[1] == "kB" and parts[0].isascii() and parts[0].isdigit():
            return int(parts[0]) * 1024
    return None
