"""What quantization does to each layer of an ONNX file with QuantizeLinear pairs, one layer at a time.

The float model and, beside it, a copy of each quantized layer that reads the float model's activations stand in one
graph. It gives two numbers a layer, so no activation leaves the runtime and memory does not grow with the samples. A
layer answers for its weights and for the ranges of its input and its output, not for what it inherits. A range that is
at fault stands between two layers, and both show it: float on one side alone would not remove it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from ..errors import StageError
from . import onnx_files
from .base import Batch, LayerError, worst_first

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that are layers where they have a quantized weight."""
_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh")
"""Operators that belong to the layer they alone read: it is quantized behind them."""
_PAIR = ("QuantizeLinear", "DequantizeLinear")
_PREFIX = "quantized/"


def layer_errors(
    original: onnx.ModelProto, quantized: onnx.ModelProto, feeds: Iterable[Batch]
) -> tuple[LayerError, ...]:
    """Errors of all quantized layers, worst first, by the names of their nodes.

    Args:
        original: the float model that was quantized; nodes have the same names in both.
        feeds: inputs of the float model; as few as 32 samples rank the layers.

    Raises:
        StageError: the two together are too large for one file, or an error is not finite.
    """
    beside = Beside(original, quantized)
    names = [layer.name for layer in beside.layers]
    if not names:
        return ()
    for layer in beside.layers:
        beside.square(beside.difference(layer.end, layer.end_twin))
        beside.square(layer.end_twin)
    session = beside.session()
    sums = np.zeros((2, len(names)))
    for feed in feeds:
        sums += np.array(session.run(None, feed), np.float64).reshape(len(names), 2).T
    error = np.sqrt(sums[0] / np.maximum(sums[1], np.finfo(np.float32).tiny))
    return worst_first(LayerError(name, float(value)) for name, value in zip(names, error, strict=True))


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Tensor → the nodes that take it."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


@dataclass(frozen=True, slots=True)
class Copy:
    """A quantized layer beside its float twin, as tensors: what the operator itself gives, and the end of the layer,
    behind its activation and its quantizer."""

    name: str
    raw: str
    raw_twin: str
    end: str
    end_twin: str


class Beside:
    """The float model with the quantized ``layers`` beside it, as ``model``, which has no outputs until they are asked
    for."""

    def __init__(self, original: onnx.ModelProto, quantized: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(original)
        del self.model.graph.output[:]
        self._floats = {node.name: node for node in original.graph.node}
        self._constants = {tensor.name: tensor for tensor in quantized.graph.initializer}
        self._maker = {name: node for node in quantized.graph.node for name in node.output}
        self._names = {node.name for node in quantized.graph.node}
        self._readers, self._float_readers = (_readers(model.graph) for model in (quantized, original))
        self._copied: set[str] = set()
        layers = [node for node in quantized.graph.node if self._is_layer(node)]
        self.layers = tuple(self._layer(node, index) for index, node in enumerate(layers))

    def difference(self, tensor: str, twin: str) -> str:
        out = f"{tensor}/difference"
        self.model.graph.node.append(onnx.helper.make_node("Sub", [tensor, twin], [out]))
        return out

    def square(self, tensor: str) -> None:
        """Add an output: the sum of squares."""
        self._output("ReduceSumSquare", [tensor])

    def mean(self, tensor: str, axes: Sequence[int]) -> None:
        """Add an output: the mean over some axes."""
        if onnx_files.opset(self.model) < 18:  # axes became an input then
            self._output("ReduceMean", [tensor], axes=list(axes))
            return
        name = f"{tensor}/axes"
        self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(axes, np.int64), name))
        self._output("ReduceMean", [tensor, name])

    def _output(self, operator: str, inputs: Sequence[str], **attributes: Any) -> None:
        out = f"{_PREFIX}output/{len(self.model.graph.output)}"
        self.model.graph.node.append(onnx.helper.make_node(operator, inputs, [out], keepdims=0, **attributes))
        self.model.graph.output.append(onnx.helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, None))

    def session(self) -> ort.InferenceSession:
        """StageError: the two together are too large for one file."""
        if self.model.ByteSize() > onnx_files.LIMIT_BYTES:
            got = f"{self.model.ByteSize():,} bytes"
            raise StageError("layer errors", expected="a model that fits in one file twice", got=got)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # quantizers are calculated as they are written: fused kernels would round elsewhere
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return ort.InferenceSession(self.model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _is_layer(self, node: onnx.NodeProto) -> bool:
        return (
            node.op_type in WEIGHTED
            and node.name in self._floats
            and any(self._is_weight(name) for name in node.input[:2])
        )

    def _is_weight(self, name: str) -> bool:
        maker = self._maker.get(name)
        return maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in self._constants

    def _layer(self, layer: onnx.NodeProto, index: int) -> Copy:
        """Copy a layer with the quantizers around it."""
        raw = copy = self._copy(layer, [self._source(name) for name in layer.input], str(index))
        last = layer
        while len(readers := self._readers.get(last.output[0], [])) == 1 and readers[0].op_type in _ACTIVATIONS:
            last = readers[0]
            copy = self._behind(copy, last, index)
        for node in self._pair(last.output[0]):
            copy = self._behind(copy, node, index)
        return Copy(layer.name, raw, self._floats[layer.name].output[0], copy, self._end_twin(last))

    def _end_twin(self, last: onnx.NodeProto) -> str:
        """The float model's tensor at the end of a layer: also behind activations that only it has, since a quantizer
        whose range ends where they clip takes their place."""
        twin = self._floats[last.name]
        while len(readers := self._float_readers.get(twin.output[0], [])) == 1 and self._is_replaced(readers[0]):
            twin = readers[0]
        return str(twin.output[0])

    def _is_replaced(self, node: onnx.NodeProto) -> bool:
        return node.op_type in _ACTIVATIONS and node.name not in self._names

    def _pair(self, name: str) -> tuple[onnx.NodeProto, ...]:
        """The QuantizeLinear and DequantizeLinear right behind a tensor; nothing if there are none."""
        for first in self._readers.get(name, []):
            for second in self._readers.get(first.output[0], []):
                if (first.op_type, second.op_type) == _PAIR:
                    return first, second
        return ()

    def _source(self, name: str) -> str:
        """What a copied layer reads for an input: constants and quantizers are copied once, the rest is the float
        model's."""
        if not name:
            return ""  # an optional input that is left out
        maker = self._maker.get(name)
        if name in self._constants:
            return self._constant(self._constants[name])
        if maker is None:
            return name  # an input of the model
        if maker.op_type not in _PAIR:
            return str(self._floats[maker.name].output[list(maker.output).index(name)])
        out = f"{_PREFIX}{name}"
        if out not in self._copied:
            self._copied.add(out)
            self._copy(maker, [self._source(source) for source in maker.input])
        return out

    def _behind(self, copy: str, node: onnx.NodeProto, index: int) -> str:
        return self._copy(node, [copy, *(self._source(name) for name in node.input[1:])], str(index))

    def _copy(self, node: onnx.NodeProto, inputs: list[str], scope: str = "") -> str:
        """A node on other inputs; ``scope`` keeps the copies for one layer apart. Returns its output."""
        prefix = f"{_PREFIX}{scope}/" if scope else _PREFIX
        copy = self.model.graph.node.add()
        copy.CopyFrom(node)
        del copy.input[:], copy.output[:]
        copy.name = f"{prefix}{node.name}"
        copy.input.extend(inputs)
        copy.output.append(f"{prefix}{node.output[0]}")
        return str(copy.output[0])

    def _constant(self, tensor: onnx.TensorProto) -> str:
        name = f"{_PREFIX}{tensor.name}"
        if name not in self._copied:
            self._copied.add(name)
            copy = self.model.graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = name
        return name
