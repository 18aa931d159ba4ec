"""The memory of the activations of a TFLite file, see `liveness`."""

from __future__ import annotations

from pathlib import Path

from . import tflite_files
from .liveness import Step, peak_bytes

_IN_PLACE = ("EXPAND_DIMS", "RESHAPE", "SQUEEZE")


def activation_bytes(path: Path) -> int | None:
    """At the shapes that the file holds, which are those of one sample; None for several graphs in one file."""
    model = tflite_files.read(path)
    if len(model.subgraphs) > 1:
        return None
    graph = model.subgraphs[0]
    sizes = {str(i): tflite_files.size_bytes(tensor) for i, tensor in enumerate(graph.tensors)}
    steps = [
        Step(tuple(map(str, op.inputs)), tuple(map(str, op.outputs)), tflite_files.kind(model, op) in _IN_PLACE)
        for op in graph.operators
    ]
    return peak_bytes(steps, sizes, map(str, graph.inputs), map(str, graph.outputs))
