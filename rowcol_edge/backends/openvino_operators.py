"""The operators of an OpenVINO IR, see `operators`. What a ``FakeQuantize`` makes counts a byte a value."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .openvino_liveness import gives_bytes, of_one_sample, port_name, size_bytes
from .operators import Operator, OperatorGraph, module_of

_PASSING = ("MaxPool", "Reshape", "ShuffleChannels", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""What gives values that it takes: openvino moves a quantizer in front of it behind it."""


def operators(path: Path) -> OperatorGraph | None:
    """At one sample, where the batch is free; None where the graph takes no single one."""
    model = of_one_sample(path)
    if model is None:
        return None
    sizes: dict[str, int | None] = {}
    found, fed, given = [], [], []
    bytes_alone: set[str] = set()
    for op in model.get_ordered_ops():
        kind, name = op.get_type_name(), op.get_friendly_name()
        outputs = [port_name(port) for port in op.outputs()]
        inputs = [port_name(port.get_source_output()) for port in op.inputs()]
        if gives_bytes(op) or (kind in _PASSING and inputs[0] in bytes_alone):
            bytes_alone.update(outputs)
        sizes |= {out: size_bytes(port, out in bytes_alone) for port, out in zip(op.outputs(), outputs, strict=True)}
        if kind == "Result":
            given += inputs
        elif kind == "Parameter":
            fed += outputs
        elif kind != "Constant":
            module = "" if kind == "FakeQuantize" else module_of(name, kind)
            found.append(Operator(name, kind, module, tuple(inputs), tuple(outputs), _macs(op, kind)))
    return OperatorGraph(tuple(found), sizes, tuple(fed), tuple(given))


def _macs(op: Any, kind: str) -> int:
    """Multiply-accumulates of products and convolutions; 0 for all else, and where a shape is not known."""
    given = [port.get_source_output().partial_shape for port in op.inputs()]
    if any(not shape.is_static for shape in (*given, *(port.partial_shape for port in op.outputs()))):
        return 0
    taken = [tuple(shape.to_shape()) for shape in given]
    out = math.prod(op.output(0).partial_shape.to_shape())
    if kind == "Convolution":
        return int(out * math.prod(taken[1][1:]))
    if kind == "GroupConvolution":
        return int(out * math.prod(taken[1][2:]))
    if kind == "ConvolutionBackpropData":
        return int(math.prod(taken[0]) * math.prod(taken[1][1:]))
    if kind == "GroupConvolutionBackpropData":
        return int(math.prod(taken[0]) * math.prod(taken[1][2:]))
    if kind == "MatMul":
        turned = op.get_attributes()["transpose_a"]
        return int(out * taken[0][-2 if turned and len(taken[0]) > 1 else -1])
    if kind == "ScaledDotProductAttention":
        keys, depth = taken[1][-2:]
        return int(math.prod(taken[0][:-1]) * keys * (depth + taken[2][-1]))
    return 0
