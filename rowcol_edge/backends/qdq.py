"""Static int8 for ONNX Runtime: which operators, their ranges from streamed calibration, QuantizeLinear pairs.

What is quantized was chosen by measurement (onnxruntime 1.32, x86-64 with VNNI, one thread; relative error against
fp32 on smooth random images, random weights):

- ResNet-18, 1×224×224: Conv, Relu and Add together give an int8 path without gaps, 9.5 ms against 32.4 ms in fp32,
  error 2.2 %. With Conv alone it is 9.9 ms and 2.6 %.
- ViT (dim 128, 50 tokens, 6 blocks): the linear layers as Gemm with float outputs, 1.25 ms against 2.02 ms, error
  3 %. int8 outputs cost accuracy (3.9 %) and time (1.42 ms), the products of activations in the attention time
  (1.33 ms); int8 sums on the residual stream bring the error to 21 %.

So sums and concatenations are int8 only between feature maps of convolutions, products of two activations, Softmax,
LayerNormalization and GELU stay float, and Gemm and MatMul give float unless an int8 operator reads them.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, create_calibrator, quant_pre_process

from ..errors import ConfigError, StageError, did_you_mean
from . import onnx_bias, onnx_gemm, onnx_ties
from .base import Batch, QuantSpec
from .onnx_errors import WEIGHTED

_QUANTIZED = "_quantized"
"""What onnxruntime adds to the name of a weight."""
_FUSED = ("gemm_input_", "gemm_output_")
_JOINS = ("Add", "Concat")
_FOLLOW = ("Relu", "Clip", "LeakyRelu", "MaxPool", "AveragePool", "Resize")
"""Operators that keep a convolution's feature map a feature map."""
OPERATORS = ("Conv", "Gemm", "MatMul", "GlobalAveragePool", "Flatten", "Reshape", "Transpose", *_JOINS, *_FOLLOW)


def quantize(source: Path, quant: QuantSpec, feeds: Iterator[Batch]) -> onnx.ModelProto:
    """The model in the file with QuantizeLinear/DequantizeLinear pairs.

    Raises:
        StageError: an activation that becomes int8 and is NaN or infinite on the calibration data.
        ConfigError: a layer to keep in float that the model does not have.
    """
    with tempfile.TemporaryDirectory(prefix="rowcol-qdq-") as work:
        model = prepare(source)
        check_names(model, quant.keep_float)
        onnx_ties.part(model)
        found = onnx_ties.find(model)
        prepared = Path(work) / "prepared.onnx"
        onnx.save(model, str(prepared))
        kept = [*kept_float(model.graph), *quant.keep_float]
        ranges = calibrate(prepared, Path(work) / "observed.onnx", feeds, becoming_int8(model.graph, kept))
        quantizer = QDQQuantizer(
            model,
            quant.per_channel,
            quant.reduce_range,
            QuantType.QInt8,
            QuantType.QInt8 if quant.signed_activations else QuantType.QUInt8,
            ranges,
            [],
            kept,
            list(OPERATORS),
            {
                "ActivationSymmetric": False,
                "WeightSymmetric": True,
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
            },
        )
        quantizer.quantize_model()
        quantized: onnx.ModelProto = quantizer.model.model
        onnx_ties.share_scales(quantized, found, {name: f"{name}{_QUANTIZED}" for t in found for name in t.names})
    return quantized


def corrected(source: Path, quantized: onnx.ModelProto, feeds: Iterable[Batch]) -> onnx.ModelProto:
    """A copy of what `quantize` made of the file, with corrected biases."""
    return onnx_bias.correct(prepare(source), quantized, feeds)


def prepare(source: Path, *, fuse: bool = True) -> onnx.ModelProto:
    """The float model that is quantized, its layers named after the module that holds their weight or bias.

    The basic graph optimizations of onnxruntime turn MatMul + Add into Gemm, the linear layer that runtimes have int8
    kernels for; `onnx_gemm` those that they leave. Left to the runtime, that rewrite happens after the weights are int8
    and brings them back to float.
    """
    with tempfile.TemporaryDirectory(prefix="rowcol-prepare-") as work:
        prepared = Path(work) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_optimization=not fuse, skip_symbolic_shape=True)
        model = onnx.load(str(prepared))
    _rename_fused(model.graph)
    if fuse:
        onnx_gemm.fuse(model.graph)
    taken = {node.name for node in model.graph.node}
    for node in model.graph.node:
        module = _module(node) if node.op_type in WEIGHTED else ""
        if module and module not in taken:
            node.name = module
            taken.add(module)
    return model


def _rename_fused(graph: onnx.GraphProto) -> None:
    """In place: other names for the tensors that onnxruntime's fusion of MatMul and Add has made.

    It makes the same names again when it loads the file, and may then refuse it: "Attempt to replace the existing
    tensor" (seen with 1.32 and a narrowed BERT).
    """
    outer = {value.name for value in (*graph.input, *graph.output)}

    def name(old: str) -> str:
        return f"fused_{old}" if old.startswith(_FUSED) and old not in outer else old

    for holder in (*graph.initializer, *graph.value_info):
        holder.name = name(holder.name)
    for node in graph.node:
        node.input[:] = [name(old) for old in node.input]
        node.output[:] = [name(old) for old in node.output]


def _module(node: onnx.NodeProto) -> str:
    """``conv1`` for a layer that reads ``conv1.weight`` or ``conv1.bias``; empty if neither has kept its name."""
    for name in node.input[1:]:
        module, _, parameter = name.rpartition(".")
        if module and parameter in ("weight", "bias"):
            return str(module)
    return ""


def check_names(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """ConfigError for a name that no layer has."""
    layers = {node.name for node in model.graph.node if node.op_type in WEIGHTED}
    for name in names:
        if name not in layers:
            raise ConfigError(
                "layer to keep in float",
                expected="a layer of the model",
                got=repr(name),
                hint=did_you_mean(name, layers),
            )


class _Once:
    """The calibrator's reader interface around one feed."""

    def __init__(self, feed: Batch) -> None:
        self._feeds = [feed]

    def get_next(self) -> Batch | None:
        return self._feeds.pop() if self._feeds else None


def becoming_int8(graph: onnx.GraphProto, kept: Iterable[str]) -> set[str]:
    """Tensors of the nodes that are quantized."""
    left = set(kept)
    nodes = [node for node in graph.node if node.op_type in OPERATORS and node.name not in left]
    return {name for node in nodes for name in (*node.input, *node.output)}


def calibrate(model: Path, observed: Path, feeds: Iterator[Batch], wanted: Container[str]) -> Any:
    """Smallest and largest value of each tensor (onnxruntime's TensorsData), without those that nobody wants and that
    are not finite, such as scores with a mask of infinities.

    The reductions run inside the model, so no activation leaves it. The calibrator keeps what it reads until it is
    asked; here it is asked after each feed, so memory does not grow with their number.
    """
    calibrator = create_calibrator(
        model, list(OPERATORS), augmented_model_path=str(observed), calibrate_method=CalibrationMethod.MinMax
    )
    for feed in feeds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's on NaN, which is raised below
            calibrator.collect_data(_Once(feed))
    ranges = calibrator.compute_data()
    for name, data in list(ranges.items()):
        if all(np.isfinite(edge).all() for edge in data.range_value):
            continue
        if name in wanted:
            raise StageError(
                "calibration",
                expected="finite activations on the calibration data",
                got=f"NaN or infinity in tensor {name}",
                hint="the model overflows on these inputs in float32 already",
            )
        del ranges.data[name]
    return ranges


def stacked(graph: onnx.GraphProto) -> list[str]:
    """Names of weights that hold several matrices: onnxruntime's int8 product takes the scales of one only."""
    return [tensor.name for tensor in graph.initializer if len(tensor.dims) > 2]


def kept_float(graph: onnx.GraphProto) -> list[str]:
    """Names of nodes that are not quantized although their operator is in `OPERATORS`."""
    constants = {tensor.name for tensor in graph.initializer if math.prod(tensor.dims) > 0}
    stacks = set(stacked(graph))
    maps: set[str] = set()
    excluded = []
    for node in graph.node:
        if node.op_type == "Conv" or (node.op_type in _FOLLOW and node.input[0] in maps):
            maps.update(node.output)
        elif node.op_type in _JOINS:
            if maps.issuperset(node.input):
                maps.update(node.output)
            else:
                excluded.append(node.name)
        elif node.op_type == "MatMul" and (constants.isdisjoint(node.input) or not stacks.isdisjoint(node.input)):
            excluded.append(node.name)
    return excluded
