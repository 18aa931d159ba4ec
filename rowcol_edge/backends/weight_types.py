"""What a compiled ONNX file really holds, held against what its precision claims."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import onnx

from ..errors import StageError
from .onnx_files import dtype_name, graphs

_INT8_SHARE = 0.90
_FP16_SHARE = 0.95
_LINEAR_SHARE = 0.50
"""Below this share of narrow weights a file is not what people expect of a precision that leaves convolutions float."""

_WEIGHTED = {
    "Conv": (1,), "ConvInteger": (1,), "Gemm": (0, 1), "MatMul": (0, 1), "MatMulInteger": (0, 1), "MatMulNBits": (1,),
}  # fmt: skip
"""Operators that can be quantized → which of their inputs may be a weight."""
_LINEAR = {"Gemm", "MatMul", "MatMulInteger", "MatMulNBits"}
_INT8 = ("int8", "uint8")
_UINT4 = ("uint4",)
_QUANTIZERS = {"QuantizeLinear", "DynamicQuantizeLinear"}


def weight_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the file's constants by numpy dtype name, largest first; 4-bit weights, which are packed in bytes, as
    ``uint4``."""
    total: Counter[str] = Counter()
    packed = {weight.name for weight in _weights(proto, {"MatMulNBits"}) if weight.dtype in _UINT4}
    for tensor in _constants(proto):
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        dtype = "uint4" if tensor.name in packed else dtype_name(tensor.data_type)
        total[dtype] += math.prod(tensor.dims) * itemsize
    return dict(total.most_common())


def check_types(proto: onnx.ModelProto, precision: str, kept_float: Collection[str] = ()) -> None:
    """StageError unless the file holds the types that ``precision`` claims, nodes in ``kept_float`` left out.

    fp32: no quantizer, no narrower weights. fp16: 95 % of the floating constants. int8: quantizers, and 90 % of the
    weight values of Conv, Gemm and MatMul. int8-dynamic: the same for Gemm and MatMul, which hold most weights.
    int8-weights and int4-weights: those of Gemm and MatMul in blocks of that width, and no quantizer.
    """
    checks: dict[str, Callable[[], None]] = {
        "fp32": lambda: _fp32(proto),
        "fp16": lambda: _fp16(proto),
        "int8": lambda: _static(proto, kept_float),
        "int8-dynamic": lambda: _dynamic(proto),
        "int8-weights": lambda: _only_weights(proto, precision, _INT8),
        "int4-weights": lambda: _only_weights(proto, precision, _UINT4),
    }
    checks[precision]()


def _fp32(proto: onnx.ModelProto) -> None:
    types = weight_types(proto)
    narrow = [name for name in (*_INT8, *_UINT4, "float16") if name in types and _is_weight_type(proto, name)]
    quantizers = _operators(proto) & {*_QUANTIZERS, "MatMulInteger", "ConvInteger"}
    if narrow or quantizers:
        raise _claim("fp32", "float32 weights and no quantizer", ", ".join([*narrow, *sorted(quantizers)]))


def _fp16(proto: onnx.ModelProto) -> None:
    types = weight_types(proto)
    half = types.get("float16", 0) / 2
    floating = half + types.get("float32", 0) / 4 + types.get("float64", 0) / 8
    if half < _FP16_SHARE * floating or not half:
        share = half / floating if floating else 0.0
        raise _claim("fp16", f"{_FP16_SHARE:.0%} of the floating constants in float16", f"{share:.1%}")


def _static(proto: onnx.ModelProto, kept_float: Collection[str]) -> None:
    missing = {"QuantizeLinear", "DequantizeLinear"} - _operators(proto)
    if missing:
        raise _claim("int8", "QuantizeLinear and DequantizeLinear", f"no {' and no '.join(sorted(missing))}")
    found = _counts(proto, set(_WEIGHTED), without=kept_float)
    if found.share < _INT8_SHARE or not found.total:
        raise _claim("int8", f"{_INT8_SHARE:.0%} of the weights of Conv, Gemm and MatMul in int8", f"{found.share:.1%}")


def _dynamic(proto: onnx.ModelProto) -> None:
    """Convolutions stay float: with ConvInteger a ResNet-18 takes 3.5 times its fp32 time (x86-64 with VNNI)."""
    if "DynamicQuantizeLinear" not in _operators(proto):
        raise _claim("int8-dynamic", "DynamicQuantizeLinear", "no such operator")
    _linear_layers(proto, "int8-dynamic", _INT8)


def _only_weights(proto: onnx.ModelProto, precision: str, kinds: tuple[str, ...]) -> None:
    if found := _operators(proto) & {*_QUANTIZERS, "DequantizeLinear"}:
        raise _claim(precision, "float activations", ", ".join(sorted(found)))
    _linear_layers(proto, precision, kinds)


def _linear_layers(proto: onnx.ModelProto, precision: str, kinds: tuple[str, ...]) -> None:
    """The weights of linear layers are of these types, and are most of what the model has."""
    linear = _counts(proto, _LINEAR, kinds)
    if linear.total and linear.share < _INT8_SHARE:
        raise _claim(
            precision, f"{_INT8_SHARE:.0%} of the weights of Gemm and MatMul in {kinds[0]}", f"{linear.share:.1%}"
        )
    found = _counts(proto, set(_WEIGHTED), kinds)
    if found.share < _LINEAR_SHARE:
        raise _claim(
            precision,
            f"{_LINEAR_SHARE:.0%} of the weights in {kinds[0]}",
            f"{found.share:.1%}, the rest are convolutions, which stay float in this precision",
            hint="use int8 for a convolutional network",
        )


@dataclass(frozen=True, slots=True)
class _Weight:
    """A constant operand; ``values`` counts its weights, of which packed ones have several in a byte."""

    name: str
    dtype: str
    values: int


@dataclass(frozen=True, slots=True)
class _Counts:
    narrow: int
    total: int

    @property
    def share(self) -> float:
        return self.narrow / self.total if self.total else 0.0


def _counts(
    proto: onnx.ModelProto, operators: set[str], kinds: tuple[str, ...] = _INT8, without: Collection[str] = ()
) -> _Counts:
    """Weight values of these operators, those of the types and all; one that two operators share counts once."""
    weights = {weight.name: weight for weight in _weights(proto, operators, without)}.values()
    return _Counts(sum(w.values for w in weights if w.dtype in kinds), sum(w.values for w in weights))


def _weights(proto: onnx.ModelProto, operators: set[str], without: Collection[str] = ()) -> Iterator[_Weight]:
    """Constant operands, directly or through a DequantizeLinear, or a Transpose of a matrix that is used both ways."""
    for graph in graphs(proto.graph):
        constants = {tensor.name: tensor for tensor in graph.initializer}
        turned, behind = (
            {node.output[0]: node.input[0] for node in graph.node if node.op_type == kind}
            for kind in ("Transpose", "DequantizeLinear")
        )
        for node in graph.node:
            if node.op_type not in operators or node.name in without:
                continue
            for index in _WEIGHTED[node.op_type]:
                if index < len(node.input):
                    name = behind.get(node.input[index], node.input[index])
                    name = turned.get(name, name)
                    if name in constants:
                        yield _weight(node, constants[name], name)


def _weight(node: onnx.NodeProto, tensor: onnx.TensorProto, name: str) -> _Weight:
    if node.op_type != "MatMulNBits":
        return _Weight(name, dtype_name(tensor.data_type), math.prod(tensor.dims))
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    return _Weight(name, f"uint{attributes.get('bits', 4)}", attributes["K"] * attributes["N"])


def _is_weight_type(proto: onnx.ModelProto, name: str) -> bool:
    return any(weight.dtype == name for weight in _weights(proto, set(_WEIGHTED)))


def _operators(proto: onnx.ModelProto) -> set[str]:
    return {node.op_type for graph in graphs(proto.graph) for node in graph.node}


def _constants(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in graphs(proto.graph):
        yield from graph.initializer
        for node in graph.node:
            if node.op_type == "Constant":
                yield from (attribute.t for attribute in node.attribute if attribute.name == "value")


def _claim(precision: str, expected: str, got: str, hint: str = "") -> StageError:
    return StageError(
        f"the compiled file does not hold what {precision} claims",
        expected=expected,
        got=got or "none",
        hint=hint or "use another precision for this model",
    )
