"""What a compiled ONNX file really holds, held against what its precision claims."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx

from ..errors import StageError
from .onnx_files import dtype_name, graphs

_INT8_SHARE = 0.90
_FP16_SHARE = 0.95
_DYNAMIC_SHARE = 0.50
"""Below this share of int8 weights a file is not what people expect of ``int8-dynamic`` (see `_dynamic`)."""

_WEIGHTED = {"Conv": (1,), "ConvInteger": (1,), "Gemm": (0, 1), "MatMul": (0, 1), "MatMulInteger": (0, 1)}
"""Operators that can be quantized → which of their inputs may be a weight."""
_INT8 = ("int8", "uint8")


def weight_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the file's constants by numpy dtype name, largest first."""
    total: Counter[str] = Counter()
    for tensor in _constants(proto):
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        total[dtype_name(tensor.data_type)] += math.prod(tensor.dims) * itemsize
    return dict(total.most_common())


def check_types(proto: onnx.ModelProto, precision: str, kept_float: Collection[str] = ()) -> None:
    """StageError unless the file holds the types that ``precision`` claims, nodes in ``kept_float`` left out.

    fp32: no quantizer, no narrower weights. fp16: 95 % of the floating constants. int8: quantizers, and 90 % of the
    weight values of Conv, Gemm and MatMul. int8-dynamic: the same for Gemm and MatMul, which hold most weights.
    """
    if precision == "int8":
        _static(proto, kept_float)
    else:
        {"fp32": _fp32, "fp16": _fp16, "int8-dynamic": _dynamic}[precision](proto)


def _fp32(proto: onnx.ModelProto) -> None:
    types = weight_types(proto)
    narrow = [name for name in (*_INT8, "float16") if name in types and _is_weight_type(proto, name)]
    quantizers = _operators(proto) & {"QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}
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
    found = _counts(proto, set(_WEIGHTED), kept_float)
    if found.share < _INT8_SHARE or not found.total:
        raise _claim("int8", f"{_INT8_SHARE:.0%} of the weights of Conv, Gemm and MatMul in int8", f"{found.share:.1%}")


def _dynamic(proto: onnx.ModelProto) -> None:
    """Convolutions stay float: with ConvInteger a ResNet-18 takes 3.5 times its fp32 time (x86-64 with VNNI)."""
    linear = _counts(proto, {"Gemm", "MatMul", "MatMulInteger"})
    if "DynamicQuantizeLinear" not in _operators(proto) or linear.share < _INT8_SHARE:
        raise _claim(
            "int8-dynamic", f"{_INT8_SHARE:.0%} of the weights of Gemm and MatMul in int8", f"{linear.share:.1%}"
        )
    found = _counts(proto, set(_WEIGHTED))
    if found.share < _DYNAMIC_SHARE:
        raise _claim(
            "int8-dynamic",
            f"{_DYNAMIC_SHARE:.0%} of the weights in int8",
            f"{found.share:.1%}, the rest are convolutions, which stay float in this precision",
            hint="use int8 for a convolutional network",
        )


@dataclass(frozen=True, slots=True)
class _Counts:
    int8: int
    total: int

    @property
    def share(self) -> float:
        return self.int8 / self.total if self.total else 0.0


def _counts(proto: onnx.ModelProto, operators: set[str], without: Collection[str] = ()) -> _Counts:
    """Weight values of these operators, int8 and in all; a tensor that two operators share counts once."""
    sizes = {name: math.prod(tensor.dims) for tensor, name in _weights(proto, operators, without)}
    int8 = {name for tensor, name in _weights(proto, operators, without) if dtype_name(tensor.data_type) in _INT8}
    return _Counts(sum(sizes[name] for name in int8), sum(sizes.values()))


def _weights(
    proto: onnx.ModelProto, operators: set[str], without: Collection[str] = ()
) -> Iterator[tuple[onnx.TensorProto, str]]:
    """Constant operands, directly or through a DequantizeLinear, with their names."""
    for graph in graphs(proto.graph):
        constants = {tensor.name: tensor for tensor in graph.initializer}
        behind = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        for node in graph.node:
            if node.op_type not in operators or node.name in without:
                continue
            for index in _WEIGHTED[node.op_type]:
                if index < len(node.input):
                    name = behind.get(node.input[index], node.input[index])
                    if name in constants:
                        yield constants[name], name


def _is_weight_type(proto: onnx.ModelProto, name: str) -> bool:
    return any(dtype_name(tensor.data_type) == name for tensor, _ in _weights(proto, set(_WEIGHTED)))


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
