"""The runtimes a bundle can be opened with: one module each, found by name in this table.

What needs numpy loads on first use, so that the table alone costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ...errors import BundleError, did_you_mean

if TYPE_CHECKING:
    from .base import Runtime, RuntimeOptions, Session

RUNTIMES: dict[str, str] = {
    "onnxruntime": "rowcol_edge.device.runtimes.onnxruntime",
    "openvino": "rowcol_edge.device.runtimes.openvino",
    "tensorrt": "rowcol_edge.device.runtimes.tensorrt",
    "tflite": "rowcol_edge.device.runtimes.tflite",
}
"""Name in the manifest → module, whose ``RUNTIME`` is the :class:`Runtime`."""

ENGINE_BUILDERS = frozenset({"tensorrt"})
"""Those that build an engine the first time they open an artifact, which takes minutes: see `EngineBuilder`."""

__all__ = ["ENGINE_BUILDERS", "RUNTIMES", "Runtime", "RuntimeOptions", "Session", "load_runtime"]


def load_runtime(name: str) -> Runtime:
    """Import a runtime. BundleError: no such name. MissingDependencyError: its package is not installed."""
    if name not in RUNTIMES:
        raise BundleError(
            "runtime",
            expected=f"one of {', '.join(sorted(RUNTIMES))}",
            got=repr(name),
            hint=did_you_mean(name, RUNTIMES),
        )
    runtime: Runtime = import_module(RUNTIMES[name]).RUNTIME
    return runtime


def __getattr__(name: str) -> Any:
    if name not in ("Runtime", "RuntimeOptions", "Session"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.base"), name)
