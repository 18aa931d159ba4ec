"""MatMul + Add of a constant matrix and bias as Gemm, where onnxruntime leaves them apart.

Its own pass (`MatMulAddFusion`) does not touch what looks like a block of attention, to keep that for a later one. Such
a layer would be int8 as a MatMul with a float bias behind it, which onnxruntime does turn into a Gemm when it loads the
file – one that runs in float and makes its weights float again at every inference: seen with 1.32 in a factored BERT,
whose int8 file took 1.9 times as long as the dense one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper


def fuse(graph: onnx.GraphProto) -> None:
    """In place, for inputs of which one size may be free; more than two axes are laid out as rows before.

    Args:
        graph: with the shapes of its tensors inferred.
    """
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    shapes = {value.name: _shape(value) for value in (*graph.input, *graph.value_info)}
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(value.name for value in graph.output)
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul" and uses[node.output[0]] == 1}
    for add in [node for node in graph.node if node.op_type == "Add"]:
        for made, bias in (add.input, reversed(add.input)):
            if (product := products.get(made)) is None:
                continue
            weight, shape = constants.get(product.input[1], []), shapes.get(product.input[0], ())
            if len(weight) == 2 and constants.get(bias) == weight[1:] and len(shape) >= 2 and shape.count(0) <= 1:
                _replace(graph, product, add, bias, weight, shape[:-1])
                break


def _replace(
    graph: onnx.GraphProto,
    product: onnx.NodeProto,
    add: onnx.NodeProto,
    bias: str,
    sizes: Sequence[int],
    leading: Sequence[int],
) -> None:
    """The two nodes by a Gemm; ``sizes`` are the weight's, ``leading`` those of the input before its last axis."""
    (rows, weight), (output,), name = product.input, add.output, product.name or add.output[0]
    if len(leading) == 1:
        nodes = [helper.make_node("Gemm", [rows, weight, bias], [output], name)]
    else:
        laid, made, before, after = (f"{name}_{what}" for what in ("rows", "linear", "rows_shape", "output_shape"))
        for key, shape in ((before, [-1, sizes[0]]), (after, [*(size or -1 for size in leading), sizes[1]])):
            graph.initializer.append(numpy_helper.from_array(np.asarray(shape, np.int64), key))
        nodes = [
            helper.make_node("Reshape", [rows, before], [laid], f"{name}_to_rows"),
            helper.make_node("Gemm", [laid, weight, bias], [made], name),
            helper.make_node("Reshape", [made, after], [output], f"{name}_from_rows"),
        ]
    place = list(graph.node).index(add)
    for node in reversed(nodes):
        graph.node.insert(place, node)
    graph.node.remove(add)
    graph.node.remove(product)


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """0 for a size that is free."""
    return tuple(size.dim_value for size in value.type.tensor_type.shape.dim)
