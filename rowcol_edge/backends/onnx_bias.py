"""Bias correction of an ONNX file with QuantizeLinear pairs: the mean of what quantization adds to each channel of a
layer's output, on calibration data, is taken out of the layer's bias.

Each layer is corrected for its own rounding, as it shows when the layer reads the float model's activations.

Source: M. Nagel, M. van Baalen, T. Blankevoort and M. Welling, "Data-free quantization through weight equalization and
bias correction", ICCV 2019, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx

from .base import Batch
from .onnx_errors import Beside

Floats = npt.NDArray[np.float64]


def correct(original: onnx.ModelProto, quantized: onnx.ModelProto, feeds: Iterable[Batch]) -> onnx.ModelProto:
    """A copy of ``quantized`` with corrected biases; a layer without a bias stays as it is.

    Args:
        original: the float model that was quantized; nodes have the same names in both.
        feeds: inputs of the float model.
    """
    corrected = onnx.ModelProto()
    corrected.CopyFrom(quantized)
    biased = {node.name: node for node in corrected.graph.node if len(node.input) > 2 and node.input[2]}
    constants = {tensor.name: tensor for tensor in corrected.graph.initializer}
    maker = {node.output[0]: node for node in corrected.graph.node if node.op_type == "DequantizeLinear"}
    for name, shift in _shifts(original, quantized, feeds, biased).items():
        bias = biased[name].input[2]
        stored, scale = bias, np.ones(1, np.float32)
        if bias in maker:
            stored, scale = maker[bias].input[0], onnx.numpy_helper.to_array(constants[maker[bias].input[1]])
        if stored in constants:
            _subtract(constants[stored], shift / scale)
    return corrected


def _shifts(
    original: onnx.ModelProto, quantized: onnx.ModelProto, feeds: Iterable[Batch], biased: dict[str, onnx.NodeProto]
) -> dict[str, Floats]:
    """What quantization adds to each channel of a layer's output on average, by layer."""
    beside = Beside(original, quantized)
    layers = [layer for layer in beside.layers if layer.name in biased]
    if not layers:
        return {}
    dims = {tensor.name: len(tensor.dims) for tensor in original.graph.initializer}
    weights = {node.name: node.input[1] for node in original.graph.node if node.name in biased}
    for layer in layers:
        axes = [0, *range(2, dims.get(weights[layer.name], 2))]  # all but the channel
        beside.mean(beside.difference(layer.raw, layer.raw_twin), axes)
    total = [np.zeros(1)] * len(layers)
    samples = 0
    session = beside.session()
    for feed in feeds:
        count = max((len(array) for array in feed.values() if array.ndim), default=1)
        total = [
            sum_ + count * value.astype(np.float64) for sum_, value in zip(total, session.run(None, feed), strict=True)
        ]
        samples += count
    return {layer.name: sum_ / max(1, samples) for layer, sum_ in zip(layers, total, strict=True)}


def _subtract(tensor: onnx.TensorProto, shift: Floats) -> None:
    """In place, in the tensor's own type."""
    values = onnx.numpy_helper.to_array(tensor)
    changed = values - shift
    if values.dtype.kind == "i":
        edge = np.iinfo(values.dtype)
        changed = np.clip(np.rint(changed), edge.min, edge.max)
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed.astype(values.dtype), tensor.name))
