"""What TensorRT 10.3 or newer accepts of an ONNX graph, checked without it.

A graph that passes was never run: the check knows the rules that NVIDIA publishes, not the parser. Sources:

- operators, opsets and types: the support matrix of its ONNX parser (onnx-tensorrt, docs/operators.md) as of TensorRT
  8.5 with what docs/Changelog.md adds up to 10.3; the matrix of 10.15 still lists each of them. The range of opsets is
  that of the 10.0 matrix.
- Q/DQ: "Working with Quantized Types" and "Explicit Quantization" in the TensorRT documentation, and the matrix's
  remarks on QuantizeLinear and DequantizeLinear (zero points must be 0; the quantized type is int8).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from ..errors import StageError
from .onnx_files import dtype_name, graphs, opset

OPSETS = range(9, 21)
OPERATORS = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "AveragePool",
    "BatchNormalization", "Cast", "Ceil", "Celu", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv",
    "ConvTranspose", "Cos", "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Dropout", "Einsum", "Elu",
    "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gemm",
    "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample", "GRU",
    "HardSigmoid", "HardSwish", "Identity", "If", "InstanceNormalization", "IsNaN", "LeakyRelu", "Less",
    "LessOrEqual", "Log", "LogSoftmax", "Loop", "LpNormalization", "LpPool", "LRN", "LSTM", "MatMul", "Max",
    "MaxPool", "Mean", "MeanVarianceNormalization", "Min", "Mod", "Mul", "Neg", "NonMaxSuppression", "NonZero",
    "Not", "OneHot", "Or", "Pad", "Pow", "PRelu", "QuantizeLinear", "RandomNormal", "RandomNormalLike",
    "RandomUniform", "RandomUniformLike", "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu",
    "Reshape", "Resize", "ReverseSequence", "RNN", "RoiAlign", "Round", "Scan", "Scatter", "ScatterElements",
    "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Slice", "Softmax",
    "Softplus", "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tan", "Tanh",
    "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Upsample", "Where", "Xor",
    "GroupNormalization", "LayerNormalization", "IsInf", "Hardmax", "DeformConv",
})  # fmt: skip
"""The last line is what the changelog adds: 8.6 the first three, 9.2 and 10.1 the others."""

_OUTPUT_AXIS = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}
"""Weighted operator → axis of its weight's output channels. Gemm's depends on transB."""
_BIAS_INPUT = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}


def check(model: onnx.ModelProto) -> None:
    """StageError for the first thing TensorRT would refuse, would not run as int8 although it is quantized, or would
    calculate with fewer scales than it could."""
    if opset(model) not in OPSETS:
        raise _refused("opset", f"{OPSETS.start} to {OPSETS.stop - 1}", str(opset(model)), "lower the target's opset")
    _check_ports(model.graph)
    for graph in graphs(model.graph):
        view = _Graph(graph)
        for node in graph.node:
            _check_operator(node)
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                _check_quantizer(node, view)
            elif node.op_type in (*_OUTPUT_AXIS, "Gemm"):
                _check_weighted(node, view)
            _check_bias(node, view)


@dataclass(frozen=True)
class _Graph:
    proto: onnx.GraphProto

    @cached_property
    def constants(self) -> dict[str, onnx.TensorProto]:
        found = {tensor.name: tensor for tensor in self.proto.initializer}
        for node in self.proto.node:
            if node.op_type == "Constant":
                found.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
        return found

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        return {output: node for node in self.proto.node for output in node.output}

    def dequantizer(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that a tensor comes from, if it does."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def stored(self, quantizer: onnx.NodeProto) -> onnx.TensorProto | None:
        """The constant that a DequantizeLinear reads, directly or through a QuantizeLinear."""
        name = quantizer.input[0]
        before = self.producers.get(name)
        if before is not None and before.op_type == "QuantizeLinear":
            name = before.input[0]
        return self.constants.get(name)


def _check_ports(graph: onnx.GraphProto) -> None:
    constants = {tensor.name for tensor in graph.initializer}
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            if value.name in constants:
                continue
            tensor, what = value.type.tensor_type, f"{kind} {value.name}"
            free = [i for i, size in enumerate(tensor.shape.dim) if not size.HasField("dim_value")]
            if not tensor.HasField("shape") or set(free) - {0}:
                got = f"axis {free[-1]}" if free else "no shape"
                raise _refused(what, "only its first size, the batch, to be free", got, "export it with fixed sizes")
            _check_port_type(what, tensor.elem_type, readers.get(value.name, set()) if kind == "input" else set())


def _check_port_type(what: str, elem_type: int, readers: set[str]) -> None:
    known = (
        TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL,
        TensorProto.UINT8,
    )  # fmt: skip
    if elem_type not in known:
        raise _refused(what, ", ".join(dtype_name(kind) for kind in known), dtype_name(elem_type))
    if elem_type == TensorProto.UINT8 and readers - {"Cast"}:
        raise _refused(what, "uint8 to be cast before anything else", f"read by {min(readers - {'Cast'})}")


def _check_operator(node: onnx.NodeProto) -> None:
    if node.domain not in ("", "ai.onnx"):
        raise _refused(_name(node), "an operator of ONNX itself", f"{node.domain}.{node.op_type}")
    if node.op_type not in OPERATORS:
        raise _refused(_name(node), "an operator that TensorRT's ONNX parser has", node.op_type)
    if node.op_type in ("MaxPool", "LayerNormalization") and any(node.output[1:]):
        raise _refused(_name(node), "its first output only", f"{node.op_type} with {', '.join(node.output)}")


def _check_quantizer(node: onnx.NodeProto, view: _Graph) -> None:
    """Constant positive scales, zero points 0, int8; a scale a channel on weights only."""
    if node.input[1] not in view.constants:
        raise _refused(_name(node), "a constant scale", f"one calculated as {node.input[1]}")
    scale = numpy_helper.to_array(view.constants[node.input[1]])
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise _refused(_name(node), "scales > 0", str(scale.min()))
    _check_zero_point(node, view)
    if scale.size > 1:
        weight = view.stored(node) if node.op_type == "DequantizeLinear" else view.constants.get(node.input[0])
        if weight is None:
            raise _refused(_name(node), "one scale for an activation", f"{scale.size} scales on {node.input[0]}")


def _check_zero_point(node: onnx.NodeProto, view: _Graph) -> None:
    if len(node.input) < 3 or not node.input[2]:
        if node.op_type == "QuantizeLinear":  # without one its output is uint8
            raise _refused(_name(node), "an int8 zero point, which makes it int8", "none: uint8")
        stored = view.constants.get(node.input[0])
        if stored is not None and stored.data_type != TensorProto.INT8:
            raise _refused(_name(node), "int8", dtype_name(stored.data_type))
        return
    zero = view.constants.get(node.input[2])
    if zero is None:
        raise _refused(_name(node), "a constant zero point", f"one calculated as {node.input[2]}")
    if zero.data_type != TensorProto.INT8:
        raise _refused(_name(node), "int8", dtype_name(zero.data_type))
    values = numpy_helper.to_array(zero)
    if values.any():
        raise _refused(_name(node), "zero points 0 (symmetric)", str(values.flat[np.flatnonzero(values)[0]]))


def _check_weighted(node: onnx.NodeProto, view: _Graph) -> None:
    """A quantized weight with a quantized activation, and a scale for each of its output channels: TensorRT would take
    one for all of them, which costs quality and saves no time.

    The other way round is a layer kept in float that reads what other layers need quantized.
    """
    pairs = [view.dequantizer(name) for name in node.input[:2]]
    for index, pair in enumerate(pairs):
        if pair is None or (weight := view.stored(pair)) is None:
            continue
        if pairs[1 - index] is None:
            got = f"{node.input[1 - index]} is not"
            raise _refused(_name(node), "an activation that is quantized as the weight is", got)
        scales = numpy_helper.to_array(view.constants[pair.input[1]]).size
        axis, expected = _attribute(pair, "axis", 1), _output_axis(node, len(weight.dims))
        wanted = f"a scale an output channel (axis {expected})"
        if scales > 1 and axis % len(weight.dims) != expected:
            raise _refused(_name(pair), wanted, f"axis {axis}")
        # a product's left side has its channels along its rows, which no quantizer gives scales of their own
        if index == 1 and scales != weight.dims[expected]:
            raise _refused(_name(pair), wanted, f"{scales} for {weight.dims[expected]}")


def _output_axis(node: onnx.NodeProto, rank: int) -> int:
    if node.op_type == "Gemm":
        return 0 if _attribute(node, "transB", 0) else 1
    return _OUTPUT_AXIS[node.op_type] % rank


def _check_bias(node: onnx.NodeProto, view: _Graph) -> None:
    names = list(_biases(node))
    if node.op_type == "Add" and any(_weighted(view, name) for name in node.input):
        names = [name for name in node.input if not _weighted(view, name)]
    for name in names:
        pair = view.dequantizer(name)
        if pair is not None and view.stored(pair) is not None:
            raise _refused(_name(node), "a bias that is not quantized", f"{pair.op_type} {pair.name or name}")


def _biases(node: onnx.NodeProto) -> Iterator[str]:
    index = _BIAS_INPUT.get(node.op_type)
    if index is not None and index < len(node.input) and node.input[index]:
        yield node.input[index]


def _weighted(view: _Graph, name: str) -> bool:
    node = view.producers.get(name)
    return node is not None and node.op_type in (*_OUTPUT_AXIS, "Gemm")


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _name(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"


def _refused(what: str, expected: str, got: str, hint: str = "") -> StageError:
    hint = hint or "another runtime of the target may take this model"
    return StageError(f"graph for TensorRT: {what}", expected=expected, got=got, hint=hint)
