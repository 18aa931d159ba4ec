"""The runtimes a bundle can be opened with: one module each, found by name in this table."""

from __future__ import annotations

from importlib import import_module

from ...errors import BundleError
from .base import Runtime, RuntimeOptions, Session

RUNTIMES: dict[str, str] = {"onnxruntime": "rowcol_edge.device.runtimes.onnxruntime"}
"""Name in the manifest → module, whose ``RUNTIME`` is the :class:`Runtime`."""

__all__ = ["RUNTIMES", "Runtime", "RuntimeOptions", "Session", "load_runtime"]


def load_runtime(name: str) -> Runtime:
    """Import a runtime. BundleError: no such name. MissingDependencyError: its package is not installed."""
    if name not in RUNTIMES:
        from difflib import get_close_matches

        near = get_close_matches(name, RUNTIMES, n=1)
        raise BundleError(
            "runtime",
            expected=f"one of {', '.join(sorted(RUNTIMES))}",
            got=repr(name),
            hint=f"did you mean {near[0]}?" if near else "",
        )
    runtime: Runtime = import_module(RUNTIMES[name]).RUNTIME
    return runtime
