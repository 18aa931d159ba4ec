"""The machine a benchmark ran on, as its result names it."""

from __future__ import annotations

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
