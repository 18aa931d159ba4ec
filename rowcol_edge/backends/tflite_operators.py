"""The operators of a TFLite file, see `operators`: each by the name of what it gives, such as ``blocks.0.norm;3``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..device.layers import MODEL
from . import tflite_files
from .operators import Operator, OperatorGraph

_WITH_WEIGHT = {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "TRANSPOSE_CONV": 1, "FULLY_CONNECTED": 1}
"""Which of their inputs is the weight."""
_WHOLE = "model"
"""What the model itself is called, see `tflite_worker`."""
_QUANTIZERS = ("QUANTIZE", "DEQUANTIZE")


def operators(path: Path) -> OperatorGraph | None:
    """At the shapes that the file holds, which are those of one sample; None for several graphs in one file."""
    model = tflite_files.read(path)
    if len(model.subgraphs) > 1:
        return None
    graph = model.subgraphs[0]
    ports = {int(index) for index in (*graph.inputs, *graph.outputs)}  # have names of their own
    found = []
    for op in graph.operators:
        kind = tflite_files.kind(model, op)
        inputs = [int(index) for index in op.inputs if index >= 0]
        shapes = [_shape(graph.tensors[index]) for index in inputs]
        gives = graph.tensors[op.outputs[0]]
        name = tflite_files.text(gives.name)
        weight = tflite_files.text(graph.tensors[op.inputs[_WITH_WEIGHT[kind]]].name) if kind in _WITH_WEIGHT else ""
        known = [each for each in (weight, "" if op.outputs[0] in ports else name) if each]
        module = "" if kind in _QUANTIZERS or not known else _module(known[0])
        macs = _macs(kind, op, shapes, math.prod(_shape(gives)))
        found.append(Operator(name, kind, module, tuple(map(str, inputs)), tuple(map(str, op.outputs)), macs))
    sizes = {str(index): tflite_files.size_bytes(tensor) for index, tensor in enumerate(graph.tensors)}
    return OperatorGraph(tuple(found), sizes, tuple(map(str, graph.inputs)), tuple(map(str, graph.outputs)))


def _module(name: str) -> str:
    """Of ``0+0.conv;2``, which became one operator, the innermost."""
    found = max(name.partition(";")[0].rstrip("'").split("+"), key=len)
    return MODEL if found == _WHOLE else found


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in (() if tensor.shape is None else tensor.shape))


def _macs(kind: str, op: Any, shapes: list[tuple[int, ...]], out: int) -> int:
    """Multiply-accumulates of products and convolutions; 0 for all else."""
    if kind == "CONV_2D":
        return out * math.prod(shapes[1][1:])
    if kind == "DEPTHWISE_CONV_2D":
        return out * math.prod(shapes[1][1:3])
    if kind == "TRANSPOSE_CONV":  # which takes the shape of its output first
        return math.prod(shapes[2]) * math.prod(shapes[1][:3])
    if kind == "FULLY_CONNECTED":
        return out * shapes[1][-1]
    if kind == "BATCH_MATMUL":
        return out * shapes[0][-2 if op.builtinOptions.adjX else -1]
    return 0
