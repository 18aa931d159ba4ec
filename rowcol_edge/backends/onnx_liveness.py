"""The memory of the activations of an ONNX file, see `liveness`.

Quantizers count as fused, which is what they are for: a tensor that only a ``QuantizeLinear`` reads is made as
integers, and one that a ``DequantizeLinear`` makes is read as them.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import onnx

from . import onnx_files
from .liveness import Step, peak_bytes

_IN_PLACE = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def activation_bytes(path: Path) -> int | None:
    """For one sample, where the batch is free; None where a size follows from values, from an operator that is not
    ONNX's own, or from a graph inside a node."""
    proto = onnx_files.load(path)
    if len(list(onnx_files.graphs(proto.graph))) > 1:
        return None
    graph = inferred(proto).graph
    constants = {tensor.name for tensor in graph.initializer}
    fed = [value.name for value in graph.input if value.name not in constants]
    given = {value.name for value in graph.output}
    sizes = {value.name: size_bytes(value) for value in (*graph.input, *graph.value_info, *graph.output)}
    readers = Counter(name for node in graph.node for name in node.input)
    steps = []
    for node in graph.node:
        shares = node.op_type in _IN_PLACE or (node.op_type == _DEQUANTIZE and node.output[0] not in given)
        if node.op_type == _QUANTIZE and readers[node.input[0]] == 1 and node.input[0] not in {*fed, *given}:
            sizes[node.input[0]] = 0
        steps.append(Step(tuple(node.input), tuple(filter(None, node.output)), shares))
    return peak_bytes(steps, sizes, fed, given)


def inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """With every shape that follows from one sample."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in constants and dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = 1
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def size_bytes(value: onnx.ValueInfoProto) -> int | None:
    tensor = value.type.tensor_type
    if not tensor.elem_type or not tensor.HasField("shape"):
        return None
    sizes = [dim.dim_value for dim in tensor.shape.dim if dim.HasField("dim_value")]
    if len(sizes) < len(tensor.shape.dim):
        return None
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    return itemsize * math.prod(int(size) for size in sizes)
