"""The machine a benchmark ran on, as its result names it, and waiting until it is quiet."""

from __future__ import annotations

import os
import time
from typing import Any

from rowcol_edge.device.system import environment

_FIELDS = (
    "machine",
    "cpu_model",
    "isa",
    "cores",
    "cores_usable",
    "memory_bytes",
    "virtual",
    "kernel",
    "python",
    "caps",
)


def machine() -> dict[str, Any]:
    """What decides a figure, without what identifies the host."""
    found = environment()
    return {name: getattr(found, name) for name in _FIELDS}


def settle(limit: float = 0.5, seconds: float = 240.0) -> None:
    """Wait until what ran before has left the load average: the profiler takes load for other work."""
    until = time.monotonic() + seconds
    while os.getloadavg()[0] > limit and time.monotonic() < until:
        time.sleep(5)
