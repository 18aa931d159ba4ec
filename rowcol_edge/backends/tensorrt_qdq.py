"""Explicit int8 for TensorRT: QuantizeLinear/DequantizeLinear where TensorRT turns them into int8 kernels.

Placement follows NVIDIA's guide ("Explicit Quantization", Q/DQ layer-placement recommendations,
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html):

- all inputs of weighted operators (Conv, ConvTranspose, Gemm, MatMul), none of their outputs: what follows is fused
  into them and may need a finer input;
- the residual branch of a sum that follows a convolution, and not the branch that comes straight from it: convolution,
  sum and activation then become one kernel with an int8 output. Of two convolutions one branch is enough;
- nothing simulates the fusion of batch norms and activations.

Symmetric everywhere (TensorRT knows no zero point), one scale a tensor for activations and one an output channel for
weights, which are stored as int8; biases stay float. Products of two activations stay float as well: see `qdq`. The
quantizer is onnxruntime's, with the options that NVIDIA's own Model Optimizer gives it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnxruntime.quantization import QDQQuantizer, QuantType

from . import onnx_ties, qdq
from .base import Batch, QuantSpec

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CONVOLUTIONS = ("Conv", "ConvTranspose")


def quantize(source: Path, quant: QuantSpec, feeds: Iterator[Batch]) -> onnx.ModelProto:
    """The model in the file with Q/DQ pairs; nothing else of it changes.

    Raises:
        StageError: an activation that is NaN or infinite on the calibration data.
        ConfigError: a layer to keep in float that the model does not have.
    """
    with tempfile.TemporaryDirectory(prefix="rowcol-tensorrt-") as work:
        model = prepare(source)
        qdq.check_names(model, quant.keep_float)
        prepared = Path(work) / "prepared.onnx"
        onnx.save(model, str(prepared))
        kept, residuals = [*qdq.kept_float(model.graph), *quant.keep_float], _residuals(model.graph)
        wanted = qdq.becoming_int8(model.graph, kept).union(residuals)
        ranges = qdq.calibrate(prepared, Path(work) / "observed.onnx", feeds, wanted)
        quantizer = QDQQuantizer(
            model,
            quant.per_channel,
            quant.reduce_range,
            QuantType.QInt8,
            QuantType.QInt8,
            ranges,
            [],
            kept,
            list(WEIGHTED),
            {
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "QDQDisableWeightAdjustForInt32Bias": True,
                "OpTypesToExcludeOutputQuantization": list(WEIGHTED),
            },
        )
        for tensor in residuals:
            quantizer.quantize_activation_tensor(tensor)
        quantizer.quantize_model()
        quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def prepare(source: Path) -> onnx.ModelProto:
    """The float model that is quantized, with its shapes and its layers named after their modules.

    Nothing is fused: TensorRT does that itself, and a Gemm would bring reshapes around it. Each use of a tied weight
    has a constant of its own, with a scale for each of its output channels.
    """
    model = qdq.prepare(source, fuse=False)
    onnx_ties.separate(model)
    onnx_ties.part(model)
    return model


def _residuals(graph: onnx.GraphProto) -> list[str]:
    """For each Add that can be fused into a convolution: the tensor of its other branch."""
    producers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    constants = {tensor.name for tensor in graph.initializer}
    found: dict[str, None] = {}
    for node in graph.node:
        if node.op_type != "Add" or constants & set(node.input):
            continue
        fused = [
            name
            for name in node.input
            if name in producers and producers[name].op_type in _CONVOLUTIONS and readers[name] == 1
        ]
        if fused:
            found.setdefault(next((name for name in node.input if name not in fused), node.input[1]))
    return list(found)
