"""The operators of an ONNX file, see `operators`. Quantizers count as fused: what a ``DequantizeLinear`` makes is read
as the integers it is made of."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx

from ..device.layers import MODEL
from . import onnx_files
from .onnx_liveness import inferred, size_bytes
from .operators import Operator, OperatorGraph, module_of

_DEQUANTIZE = "DequantizeLinear"
_QUANTIZERS = ("QuantizeLinear", _DEQUANTIZE)
_PRODUCTS = ("Gemm", "MatMul")
_SIMPLIFIERS = (*_PRODUCTS, "Reshape", "Split", "Transpose")
"""What onnxsim makes linear layers of. It names its operators as the export names those of the whole model, but its
values by themselves."""
_SIMPLIFIERS_VALUE = re.compile(r"_v_\d")
_Shapes = Mapping[str, tuple[int, ...]]


def operators(path: Path) -> OperatorGraph:
    """At one sample, where the batch is free. Operators within operators (If, Loop, Scan) count as the outer one."""
    graph = inferred(onnx_files.load(path)).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    values = (*graph.input, *graph.value_info, *graph.output)
    shapes: dict[str, tuple[int, ...]] = {name: tuple(tensor.dims) for name, tensor in constants.items()}
    shapes |= {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in values}
    sizes: dict[str, int | None] = {value.name: size_bytes(value) for value in values}
    sizes |= {name: _stored(tensor) for name, tensor in constants.items()}
    reads = Counter(name for node in graph.node for name in set(node.input))
    found = []
    for node in graph.node:
        if node.op_type == _DEQUANTIZE and sizes.get(node.output[0]):
            sizes[node.output[0]] = sizes.get(node.input[0])
        name = node.name or node.output[0]
        inputs, outputs = tuple(filter(None, node.input)), tuple(filter(None, node.output))
        found.append(
            Operator(name, node.op_type, _module(node, constants, reads), inputs, outputs, _macs(node, shapes))
        )
    fed = tuple(value.name for value in graph.input if value.name not in constants)
    return OperatorGraph(tuple(found), sizes, fed, tuple(value.name for value in graph.output))


def _module(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], reads: Mapping[str, int]) -> str:
    """By its name; or by its weight, where the quantizer has named the layer after that (see `qdq`). Of what the
    simplifier has made by the weight or bias that it alone reads, empty if neither has kept its name."""
    if node.op_type in _QUANTIZERS:
        return ""
    if node.name and any(name.startswith(f"{node.name}.") for name in node.input[1:]):
        return str(node.name)
    module = module_of(node.name, node.op_type)
    if module != MODEL or node.op_type not in _SIMPLIFIERS:
        return module
    if node.op_type in _PRODUCTS:
        for name in node.input[1:]:
            holder, _, parameter = name.rpartition(".")
            # two equal biases are stored as one, under the name of the first
            if holder and parameter in ("weight", "bias") and reads[name] == 1:
                return str(holder)
    values = (name for name in (*node.input, *node.output) if name not in constants)
    return "" if any(map(_SIMPLIFIERS_VALUE.match, values)) else MODEL


def _stored(tensor: onnx.TensorProto) -> int:
    """Bytes of a constant; two of four bits share one."""
    halves = 1 if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4) else 2
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims)) * itemsize * halves // 2


def _macs(node: onnx.NodeProto, shapes: _Shapes) -> int:
    """Multiply-accumulates of products and convolutions; 0 for all else, and where a shape is not known."""
    inputs = [shapes.get(name, ()) for name in node.input]
    out = math.prod(shapes.get(node.output[0], (0,))) if shapes.get(node.output[0]) else 0
    attributes = {each.name: each for each in node.attribute}
    if node.op_type == "Conv":
        return out * math.prod(inputs[1][1:])
    if node.op_type == "ConvTranspose":
        return math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if node.op_type == "Gemm":
        turned = "transA" in attributes and attributes["transA"].i
        return out * (inputs[0][0 if turned else -1] if inputs[0] else 0)
    if node.op_type == "MatMul":
        return out * (inputs[0][-1] if inputs[0] else 0)
    if node.op_type == "MatMulNBits":
        return out * int(attributes["K"].i)
    return 0
