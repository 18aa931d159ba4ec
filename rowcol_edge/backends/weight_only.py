"""Weight-only int8 and int4 for ONNX Runtime: linear layers as MatMulNBits, their weights stored in blocks.

Each block of weights along the inputs of a layer has a scale and a zero point; activations and sums stay float32. The
choices were made by trying the others on a small transformer:

- Zero points: a few more bytes bring the error at 4 bits down, since a block's weights do not lie evenly around 0.
- Blocks of 32: narrow layers fill no larger block, which wastes bytes, and smaller ones store more scales.
- No ``accuracy_level``: products stay float32, which no level beat in time there; int8 products add their own error.

So this precision saves bytes, not time. Embedding tables (Gather) stay float: their int4 form needs opset 21.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from . import onnx_files

BLOCK_SIZE = 32


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """The module imported below turns on logging to stderr for the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


with _root_logger_kept():
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer


def quantize(model: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    """``model``, changed in place, with the constant weights of its linear layers in ``bits`` bits."""
    for graph in onnx_files.graphs(model.graph):
        _split_gemms(graph)
    quantizer = MatMulNBitsQuantizer(model, bits, BLOCK_SIZE, is_symmetric=False)
    quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    for graph in onnx_files.graphs(quantized.graph):
        _once(graph)
    return quantized


def _split_gemms(graph: onnx.GraphProto) -> None:
    """Linear layers as MatMul and Add, in place: MatMulNBits stands for a MatMul only."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Gemm" and node.input[1] in weights and _is_plain(attributes):
            nodes += _split(node, _upright(graph, weights, node.input[1], bool(attributes.get("transB"))))
        else:
            # a copy: the nodes are views into the list that is emptied below
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(nodes)


def _is_plain(attributes: Mapping[str, Any]) -> bool:
    """Whether a Gemm scales and transposes nothing but its weight."""
    return attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA")


def _upright(graph: onnx.GraphProto, weights: dict[str, onnx.TensorProto], name: str, transposed: bool) -> str:
    """Name of the weight as inputs × outputs; a transposed one gets a copy, and is dropped if nothing else reads it."""
    if not transposed:
        return name
    upright = f"{name}_transposed"
    if upright not in weights:
        array = np.ascontiguousarray(numpy_helper.to_array(weights[name]).T)
        weights[upright] = numpy_helper.from_array(array, upright)
        graph.initializer.append(weights[upright])
    return upright


def _split(gemm: onnx.NodeProto, weight: str) -> list[onnx.NodeProto]:
    bias = list(gemm.input[2:])
    product = f"{gemm.output[0]}_product" if bias else gemm.output[0]
    nodes = [helper.make_node("MatMul", [gemm.input[0], weight], [product], name=gemm.name)]
    if bias:
        nodes.append(helper.make_node("Add", [product, *bias], gemm.output, name=f"{gemm.name}_bias"))
    return nodes


def _once(graph: onnx.GraphProto) -> None:
    """Each constant once: the quantizer writes a weight again for every layer that shares it."""
    unique = {tensor.name: tensor for tensor in graph.initializer}
    if len(unique) < len(graph.initializer):
        copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in unique.values()]
        del graph.initializer[:]
        graph.initializer.extend(copies)
