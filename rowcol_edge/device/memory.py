"""Memory of this process as Linux counts it.

``VmRSS`` is what lies in memory now, pages of mapped files (the interpreter, the runtime's libraries) included.
``VmHWM`` is the highest value it ever had; writing 5 to ``/proc/self/clear_refs`` sets it back to the present value,
so that the import of the runtime does not count as the model's peak (proc(5)).
"""

from __future__ import annotations

from pathlib import Path

_PROCESS = Path("/proc/self")


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


def _status(process: Path, key: str) -> int | None:
    try:
        lines = (process / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, rest = line.partition(":")
        parts = rest.split()
        if name == key and len(parts) == 2 and parts[1] == "kB" and parts[0].isdigit():
            return int(parts[0]) * 1024
    return None
