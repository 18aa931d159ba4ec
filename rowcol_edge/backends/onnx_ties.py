"""Tied weights in ONNX files: stored once, in float and in int8.

A constant that is another one's transpose becomes a Transpose of that one, which onnxruntime calculates once while it
loads the file: the file holds the weight once, the session may hold it for each use, as it would without a tie. Of a
kernel the Transpose exchanges outputs and inputs.

In int8 both uses can share the numbers only if one scale holds for rows and columns, or a scale a row is moved into
the activation that the transposed use reads. On the FFNs of the Fashion-MNIST ViT, tied in closed form, a scale a
tensor costs the first product 0.99 % instead of 0.78 %, and the second one 0.85 % instead of 1.04 %, since rows of
unlike scale spread the activation's range: one behind the other 1.14 % instead of 1.24 %. For the tied convolutions of
the ELPV ResNet-18 it is 0.96 % instead of 0.91 % (``tools/benchmark_tied_scales.py``). So it is one scale a tensor,
which needs no further operator. What batch norms and other factors have multiplied into the rows stays in the scales a
channel that it is read with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from . import onnx_files, ties

_LEAST_BYTES = 1024


def aside(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy whose tied weights are inputs, which no rewrite folds into anything; None if there are none.

    Tied are here those that are read both as they are and through a Transpose.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    turned = {node.input[0] for node in model.graph.node if node.op_type == "Transpose"} & set(constants)
    tied = turned & {name for node in model.graph.node if node.op_type != "Transpose" for name in node.input}
    if not tied:
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    left = [tensor for tensor in model.graph.initializer if tensor.name not in tied]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(left)
    for name in sorted(tied):
        tensor = constants[name]
        copy.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    return copy


def restore(model: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Make, in place, those inputs constants again that are constants in ``original``."""
    constants = {tensor.name: tensor for tensor in original.graph.initializer}
    ports = {value.name for value in original.graph.input}
    names = [value.name for value in model.graph.input if value.name in constants and value.name not in ports]
    kept = [value for value in model.graph.input if value.name not in names]
    kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(constants[name] for name in names)


def merge(model: onnx.ModelProto) -> None:
    """Store, in place, once what several constants of the graph hold, be it transposed."""
    graph = model.graph
    nodes, same, turned = [], {}, dict[str, str]()
    for kept, copy in _copies(graph):
        if list(kept.dims) == list(copy.dims) and _array(kept).tobytes() == _array(copy).tobytes():
            same[copy.name] = kept.name
        elif kept.name in turned:
            same[copy.name] = turned[kept.name]
        else:
            turned[kept.name] = copy.name
            axes = (1, 0, *range(2, len(copy.dims)))
            nodes.append(helper.make_node("Transpose", [kept.name], [copy.name], name=f"{copy.name}/tied", perm=axes))
    gone = {*same, *turned.values()}
    if not gone:
        return
    # copies: what a list holds are views into it
    left = [onnx.TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name not in gone]
    later = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(left)
    graph.node.extend([*nodes, *later])
    for inner in onnx_files.graphs(graph):
        for node in inner.node:
            node.input[:] = [same.get(name, name) for name in node.input]


def separate(model: onnx.ModelProto) -> None:
    """Undo `merge`, in place, for tools that look for constants: each transposed one is a constant of its own."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    turns = [node for node in nodes if node.op_type == "Transpose" and node.input[0] in constants]
    for node in turns:
        axes = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
        array = _array(constants[node.input[0]]).transpose(axes)
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), node.output[0]))
    if turns:
        del graph.node[:]
        graph.node.extend(node for node in nodes if node not in turns)


def _copies(graph: onnx.GraphProto) -> Iterator[tuple[onnx.TensorProto, onnx.TensorProto]]:
    """A constant and another that holds the same, be it transposed, each of the latter once."""
    ports = {value.name for value in (*graph.input, *graph.output)}
    seen: dict[tuple[int, bytes], onnx.TensorProto] = {}
    for tensor in graph.initializer:
        if len(tensor.dims) < 2 or tensor.name in ports or tensor.ByteSize() < _LEAST_BYTES:
            continue
        array = _array(tensor)
        keys = [(tensor.data_type, _form(either)) for either in (array, ties.turned(array))]
        kept = next((seen[key] for key in keys if key in seen), None)
        if kept is None:
            seen[keys[0]] = tensor
        else:
            yield kept, tensor


def _form(array: npt.NDArray[Any]) -> bytes:
    """Digest of shape and content: whole constants as keys would need the model's memory once more."""
    return hashlib.sha256(str(array.shape).encode() + np.ascontiguousarray(array).tobytes()).digest()


def _array(tensor: onnx.TensorProto) -> npt.NDArray[Any]:
    return numpy_helper.to_array(tensor)


@dataclass(frozen=True, slots=True)
class _Weight:
    """A layer's constant; ``upright`` says that it is stored as outputs × inputs (× kernel)."""

    layer: str
    name: str
    upright: bool


def find(model: onnx.ModelProto) -> tuple[ties.Tie, ...]:
    """The ties among the weights of linear layers and convolutions; uses go by the constants' names."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {weight.name: weight.upright for weight in _weights(model, constants)}
    arrays = {name: ties.compact(_array(constants[name])) for name in weights}
    return ties.find({name: array if weights[name] else ties.turned(array) for name, array in arrays.items()})


def part(model: onnx.ModelProto) -> None:
    """Give, in place, each layer that reads a constant the other way round than an earlier one a constant of its own:
    quantizers take one axis for the channels of a constant."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    first: dict[str, bool] = {}
    for weight in list(_weights(model, constants)):
        if first.setdefault(weight.name, weight.upright) == weight.upright:
            continue
        copy = onnx.TensorProto.FromString(constants[weight.name].SerializeToString())
        copy.name = f"{weight.layer}/{weight.name}"
        model.graph.initializer.append(copy)
        nodes[weight.layer].input[1] = copy.name


def share_scales(model: onnx.ModelProto, found: tuple[ties.Tie, ...], names: Mapping[str, str]) -> None:
    """Give, in place, the int8 constants of each tie the same numbers: those of the one weight, with one scale.

    Args:
        model: quantized, its weights int8 behind a DequantizeLinear.
        found: the ties of the float model.
        names: float constant → its int8 one.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    upright = {weight.name: weight.upright for weight in _weights(model, constants)}
    for tie in found:
        stored = [names.get(use.name, "") for use in tie.uses]
        if not all(name in constants and name in readers and name in upright for name in stored):
            continue  # one of them stays in float
        single = any(_array(constants[readers[name].input[1]]).ndim == 0 for name in stored)
        if single and not all(use.plain for use in tie.uses):
            continue  # a scale a tensor has no room for the factors
        limit = max(int(np.abs(_array(constants[name]).astype(np.int16)).max()) for name in stored)
        numbers, scale = tie.quantized(limit)
        for use, name in zip(tie.uses, stored, strict=True):
            own = ties.turned(numbers) if use.transposed == upright[name] else numbers
            _put(constants[name], own.reshape(constants[name].dims))
            node = readers[name]
            _rescale(graph, constants, node, scale * use.factors)


def join_scales(model: onnx.ModelProto) -> None:
    """Read, in place, a constant whose channels have one scale and one zero point, as all of a tie's may, with scalars:
    repeated a channel, also for the bias behind, they are as large as a tied transformer's biases twice."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or not all(name in constants for name in node.input):
            continue
        parameters = [constants[name] for name in node.input[1:]]
        arrays = [_array(tensor) for tensor in parameters]
        if any(array.ndim > 1 or array.size == 0 or (array != array.flat[0]).any() for array in arrays):
            continue
        for tensor, array in zip(parameters, arrays, strict=True):
            _put(tensor, array.reshape(-1)[:1].reshape(()))
        for attribute in [attribute for attribute in node.attribute if attribute.name == "axis"]:
            node.attribute.remove(attribute)


def _rescale(
    graph: onnx.GraphProto, constants: Mapping[str, onnx.TensorProto], node: onnx.NodeProto, scales: ties.Floats
) -> None:
    """Read a weight with these scales, and the bias of the layer behind it with those that follow."""
    before, after = _array(constants[node.input[1]]), scales.astype(np.float32)
    if before.ndim == 0:
        after = after[:1].reshape(())
    _put(constants[node.input[1]], after)
    for layer in graph.node:
        if len(layer.input) < 3 or layer.input[1] != node.output[0]:
            continue
        maker = next((n for n in graph.node if n.output[0] == layer.input[2]), None)
        if maker is not None and maker.op_type == "DequantizeLinear":
            values, scale = _array(constants[maker.input[0]]), _array(constants[maker.input[1]])
            # that of the layer's input, one for all channels: one scale for a weight stays one for its bias
            given = np.median(np.divide(scale, before, dtype=np.float64)[before != 0.0])
            follows = np.broadcast_to((given * after).astype(np.float32), scale.shape)
            edge = np.iinfo(values.dtype)
            numbers = np.clip(np.rint(values * (scale / follows)), edge.min, edge.max)
            _put(constants[maker.input[0]], numbers.astype(values.dtype))
            _put(constants[maker.input[1]], follows)


def _weights(model: onnx.ModelProto, constants: Mapping[str, onnx.TensorProto]) -> Iterator[_Weight]:
    """The constant second operands, directly or behind a DequantizeLinear."""
    behind = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        name = behind.get(node.input[1], node.input[1]) if len(node.input) > 1 else ""
        if name not in constants:
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Conv" and attributes.get("group", 1) == 1:
            yield _Weight(node.name, name, upright=True)
        elif node.op_type in ("Gemm", "MatMul") and len(constants[name].dims) == 2:
            yield _Weight(node.name, name, upright=bool(attributes.get("transB")))


def _put(tensor: onnx.TensorProto, values: npt.NDArray[Any]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(values, order="C"), tensor.name))  # a scalar stays one
