"""Compilers, one module a runtime, found by name in this table.

backend      consumes   precisions
onnxruntime  ONNX       fp32, fp16, int8, int8-dynamic, int8-weights, int4-weights
openvino     program    fp32, fp16, int8 (nncf)
tensorrt     ONNX       fp32, fp16, int8 (the engine is built on the board)
tflite       program    fp32, fp16, int8, int8-io, int8-dynamic (litert-torch, ai-edge-quantizer)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import TargetError, did_you_mean

if TYPE_CHECKING:
    from .base import Backend

BACKENDS: dict[str, str] = {
    "onnxruntime": "rowcol_edge.backends.onnxruntime",
    "openvino": "rowcol_edge.backends.openvino",
    "tensorrt": "rowcol_edge.backends.tensorrt",
    "tflite": "rowcol_edge.backends.tflite",
}
"""Name of the runtime → module, whose ``BACKEND`` is the :class:`Backend`."""

__all__ = ["BACKENDS", "load_backend"]


def load_backend(name: str) -> Backend:
    """Import the backend of a runtime.

    Raises:
        TargetError: no such backend (with the nearest name).
        MissingDependencyError: its packages are not installed.
    """
    if name not in BACKENDS:
        raise TargetError(
            "backend",
            expected=f"one of {', '.join(sorted(BACKENDS))}",
            got=repr(name),
            hint=did_you_mean(name, BACKENDS),
        )
    backend: Backend = import_module(BACKENDS[name]).BACKEND
    return backend
