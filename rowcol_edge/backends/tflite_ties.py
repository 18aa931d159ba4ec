"""Tied weights in TFLite models: one buffer for all uses of a matrix.

FULLY_CONNECTED and CONV_2D read a weight as outputs × inputs and cannot read it transposed; BATCH_MATMUL reads the same
numbers as inputs × outputs. So a transposed use becomes a BATCH_MATMUL on the buffer of the others, and its bias an
ADD. A scale that the converter has multiplied into the rows (batch norms) becomes a MUL, and so does an activation that
no other operator ends with; at int8 a convolution's is moved into the scales of its weight. No operator reads a larger
kernel with inputs and outputs exchanged: such a use keeps a buffer of its own.

At int8 a product, a scale and a sum take longer than one convolution. So where that hardly adds to the file,
convolutions read the matrix the other way round from a second buffer.

All but the move is done to the float file, which every precision is made from: a quantizer then sees the operators
that will run.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from . import tflite_files, ties

PRODUCT = ";product"
"""With a number ends the name of a tensor that a layer's bias or scale, taken out of it, is still to come to."""
_LAYERS = ("FULLY_CONNECTED", "CONV_2D")
_LEAST_FACTOR = 1e-3
"""Of the largest: a bias would be divided by smaller ones."""
_SPARE = 0.02
"""Share of the bytes of all constants, of these ties once, that second buffers may add."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer by the name of its output; several may read one tensor."""

    name: str
    operator: Any
    weight: Any


def share(model: Any) -> int:
    """Give, in place, the uses of each tie of a float model one buffer; how many constants that spared."""
    [graph] = model.subgraphs
    layers = {layer.name: layer for layer in _layers(model, graph)}
    sizes = {name: _size(graph, layer) for name, layer in layers.items()}
    pictures = {name for name, layer in layers.items() if tflite_files.kind(model, layer.operator) == "CONV_2D"}
    found = []
    for tie in ties.find({name: _matrix(model, layer) for name, layer in layers.items()}):
        uses = [use for use in tie.uses if use.plain or np.abs(use.factors).min() > _LEAST_FACTOR]
        if len(uses) > 1 and not all(use.transposed for use in uses):
            found.append(_oriented(tie.weight, uses, sizes))
    twice = _twice([uses for _, uses in found if pictures.issuperset(use.name for use in uses)], model, layers, sizes)
    spared = 0
    for weight, uses in found:
        if uses[0].name in twice:
            upright = [use for use in uses if not use.transposed]
            turned = [replace(use, transposed=False) for use in uses if use.transposed]
            groups = [(weight, upright), (ties.turned(weight), turned)]
        else:
            groups = [(weight, uses)]
        for values, readers in groups:
            if len(readers) < 2:  # it keeps its own, scaled as it is
                continue
            buffer = _buffer(model, values)
            for use in readers:
                _rewrite(model, graph, layers[use.name], use, weight.shape, buffer)
            spared += len(readers) - 1
    _empty_unused(model)
    return spared


def _twice(
    found: Sequence[Sequence[ties.Use]], model: Any, layers: Mapping[str, _Layer], sizes: Mapping[str, int]
) -> set[str]:
    """Ties, by the name of their first use, that are stored both ways: those with the largest outputs for their bytes,
    as far as these hardly add to the file."""
    held = {number: len(buffer.data) for number, buffer in enumerate(model.buffers) if buffer.data is not None}
    added = {uses[0].name: held[layers[uses[0].name].weight.buffer] for uses in found}
    once = sum(held.values())
    for uses in found:
        once -= sum(held[number] for number in {layers[use.name].weight.buffer for use in uses}) - added[uses[0].name]
    left, taken = _SPARE * once, set()
    both = [uses for uses in found if len({use.transposed for use in uses}) == 2]
    for uses in sorted(both, key=lambda uses: -sum(sizes[use.name] for use in uses) / added[uses[0].name]):
        if added[uses[0].name] <= left:
            left -= added[uses[0].name]
            taken.add(uses[0].name)
    return taken


def _oriented(
    weight: ties.Floats, uses: list[ties.Use], sizes: Mapping[str, int]
) -> tuple[ties.Floats, list[ties.Use]]:
    """Stored the way that leaves the products, of which bias and activation are an operator, the smaller outputs."""
    products = sum(sizes[use.name] for use in uses if use.transposed)
    if 2 * products <= sum(sizes[use.name] for use in uses):
        return weight, uses
    return ties.turned(weight), [replace(use, transposed=not use.transposed) for use in uses]


def _size(graph: Any, layer: _Layer) -> int:
    return int(np.prod(graph.tensors[layer.operator.outputs[0]].shape))


def layers(model: Any) -> dict[str, str]:
    """Those that share their weight, by the name of their output → the operator."""
    [graph] = model.subgraphs
    readers: dict[int, dict[str, str]] = {}
    for operator in graph.operators:
        kind = tflite_files.kind(model, operator)
        weight = graph.tensors[operator.inputs[1]] if kind in (*_LAYERS, "BATCH_MATMUL") else None
        if weight is not None and model.buffers[weight.buffer].data is not None:
            name = tflite_files.text(graph.tensors[operator.outputs[0]].name)
            readers.setdefault(weight.buffer, {})[name] = kind
    return {name: kind for group in readers.values() if len(group) > 1 for name, kind in group.items()}


def read_half(model: Any) -> None:
    """Let all uses of a tie read, in place, one float16 buffer: ai-edge-quantizer gives each layer its own, and leaves
    the weights of products in float32."""
    [graph] = model.subgraphs
    halves: dict[bytes, int] = {}
    for tensor in graph.tensors:
        data = model.buffers[tensor.buffer].data
        if tensor.type == schema.TensorType.FLOAT16 and data is not None:
            tensor.buffer = halves.setdefault(bytes(data), tensor.buffer)
    for operator in list(graph.operators):
        if tflite_files.kind(model, operator) != "BATCH_MATMUL":
            continue
        weight = graph.tensors[operator.inputs[1]]
        data = model.buffers[weight.buffer].data
        if data is None or weight.type != schema.TensorType.FLOAT32:
            continue
        half = _floats(model, weight).astype(np.float16).tobytes()
        if half in halves:
            _widen(model, graph, operator, halves[half])
    _empty_unused(model)


def absorb(model: Any, original: Any) -> None:
    """Move, in place, positive scales of the rows of shared weights from the MUL of a static int8 model into the scales
    of a convolution's weight, of which each channel has its own while the numbers stay those of the other uses.

    ``original`` is the float model, which has the factors as they were before they got eight bits.
    """
    [graph], [floats] = model.subgraphs, original.subgraphs
    exact = {tflite_files.text(tensor.name): tensor for tensor in floats.tensors}
    makers = {int(index): operator for operator in graph.operators for index in operator.outputs}
    readers = Counter(int(index) for operator in graph.operators for index in operator.inputs)
    kept, moved = [], {}
    for operator in graph.operators:
        maker = makers.get(int(operator.inputs[0])) if tflite_files.kind(model, operator) == "MUL" else None
        factors = None if maker is None else exact.get(tflite_files.text(graph.tensors[operator.inputs[1]].name))
        if (
            maker is None
            or factors is None
            or tflite_files.kind(model, maker) != "CONV_2D"
            or maker.builtinOptions.fusedActivationFunction
            or len(maker.inputs) < 3
            or maker.inputs[2] < 0
            or any(readers[int(index)] != 1 for index in (operator.inputs[0], *maker.inputs[1:]))
            or {int(operator.inputs[0]), int(operator.outputs[0])}.intersection(graph.outputs)
            or not _scale_rows(model, graph, maker, original, factors)
        ):
            kept.append(operator)
            continue
        before, after = graph.tensors[maker.outputs[0]], graph.tensors[operator.outputs[0]]
        before.quantization = after.quantization
        maker.builtinOptions.fusedActivationFunction = operator.builtinOptions.fusedActivationFunction
        moved[int(operator.outputs[0])] = int(maker.outputs[0])
    graph.operators = kept
    for operator in kept:
        operator.inputs = np.array([moved.get(int(index), index) for index in operator.inputs], np.int32)
    _empty_unused(model)


def _scale_rows(model: Any, graph: Any, operator: Any, original: Any, factors: Any) -> bool:
    """Whether the scales of an int8 convolution's weight and bias could be multiplied with these."""
    weight, bias = (graph.tensors[index] for index in operator.inputs[1:3])
    data = original.buffers[factors.buffer].data
    rows = None if data is None else np.frombuffer(bytes(data), np.float32)
    if (
        rows is None
        or list(factors.shape) != [weight.shape[0]]
        or rows.min() <= 0.0
        or weight.type != schema.TensorType.INT8
        or bias.type != schema.TensorType.INT32
        or len(weight.quantization.scale) != 1
    ):
        return False
    for tensor in (weight, bias):
        quantization = schema.QuantizationParametersT()
        quantization.scale = (tensor.quantization.scale * rows).astype(np.float32)
        quantization.zeroPoint, quantization.quantizedDimension = np.zeros(rows.size, np.int64), 0
        tensor.quantization = quantization
    return True


def _widen(model: Any, graph: Any, operator: Any, buffer: int) -> None:
    """A DEQUANTIZE between a float16 buffer and the second operand."""
    wide, narrow, step = graph.tensors[operator.inputs[1]], schema.TensorT(), schema.OperatorT()
    narrow.name = f"{tflite_files.text(wide.name)};half".encode()
    narrow.shape, narrow.type, narrow.buffer = wide.shape, schema.TensorType.FLOAT16, buffer
    wide.buffer = 0
    step.opcodeIndex = tflite_files.opcode(model, schema.BuiltinOperator.DEQUANTIZE)
    step.builtinOptionsType, step.builtinOptions = (
        schema.BuiltinOptions.DequantizeOptions,
        schema.DequantizeOptionsT(),
    )
    step.inputs, step.outputs = np.array([len(graph.tensors)], np.int32), operator.inputs[1:2]
    graph.tensors.append(narrow)
    graph.operators.insert(_place(graph, operator), step)


def _empty_unused(model: Any) -> None:
    """Drop tensors that no operator reads or makes, and the content of buffers that no tensor has."""
    [graph] = model.subgraphs
    known = {*graph.inputs, *graph.outputs}
    known |= {index for operator in graph.operators for index in (*operator.inputs, *operator.outputs)}
    places = {old: new for new, old in enumerate(sorted(index for index in known if index >= 0))}
    graph.tensors = [graph.tensors[index] for index in places]
    for holder in (graph, *graph.operators):
        holder.inputs, holder.outputs = (
            np.array([places.get(index, -1) for index in indices], np.int32)
            for indices in (holder.inputs, holder.outputs)
        )
    for signature in model.signatureDefs:
        for entry in (*signature.inputs, *signature.outputs):
            entry.tensorIndex = places[entry.tensorIndex]
    used = {tensor.buffer for tensor in graph.tensors} | {entry.buffer for entry in model.metadata or []}
    for number, buffer in enumerate(model.buffers):
        if number not in used:
            buffer.data = None


def _layers(model: Any, graph: Any) -> Iterator[_Layer]:
    """Linear layers and 1×1 convolutions of stride 1 with a constant weight."""
    for operator in graph.operators:
        kind = tflite_files.kind(model, operator)
        if kind not in _LAYERS:
            continue
        given, made = graph.tensors[operator.inputs[0]], graph.tensors[operator.outputs[0]]
        weight, options = graph.tensors[operator.inputs[1]], operator.builtinOptions
        if model.buffers[weight.buffer].data is None or weight.type != schema.TensorType.FLOAT32:
            continue
        if given.shape[-1] != weight.shape[-1] or any(size != 1 for size in weight.shape[1:-1]):
            continue
        if math.prod(given.shape[:-1]) != math.prod(made.shape[:-1]):
            continue
        if kind == "FULLY_CONNECTED" or (options.strideH, options.strideW) == (1, 1):
            yield _Layer(tflite_files.text(made.name), operator, weight)


def _matrix(model: Any, layer: _Layer) -> npt.NDArray[np.float32]:
    shape = layer.weight.shape
    return _floats(model, layer.weight).reshape(shape[0], shape[-1])


def _rewrite(model: Any, graph: Any, layer: _Layer, use: ties.Use, shape: tuple[int, ...], buffer: int) -> None:
    operator, options = layer.operator, layer.operator.builtinOptions
    activation, options.fusedActivationFunction = options.fusedActivationFunction, 0
    weight = copy.copy(layer.weight)
    weight.name, weight.buffer = f"{layer.name};weight".encode(), buffer
    operator.inputs[1] = len(graph.tensors)
    graph.tensors.append(weight)
    has_bias = len(operator.inputs) > 2 and operator.inputs[2] >= 0
    bias = _floats(model, graph.tensors[operator.inputs[2]]) if has_bias else None
    steps: list[tuple[str, npt.NDArray[np.float32]]] = []
    if not use.plain:
        steps.append(("MUL", use.factors.astype(np.float32)))
    if use.transposed:
        weight.shape, weight.shapeSignature = np.array(shape, np.int32), None
        operator.inputs = operator.inputs[:2]
        _become_product(model, operator)
        _flatten(model, graph, operator)
        if bias is not None and bias.any():  # XNNPACK does not run a sum with zeros at int8, for their scale
            steps.append(("ADD", bias))
        elif activation and not steps:
            steps.append(("MUL", np.ones(1, np.float32)))
    elif bias is not None and not use.plain:
        scaled = np.divide(bias, use.factors, dtype=np.float32)
        operator.inputs[2] = _add_constant(model, graph, f"{layer.name};bias", scaled)
    if steps:
        _follow(model, graph, operator, steps, activation)
    else:
        options.fusedActivationFunction = activation


def _become_product(model: Any, operator: Any) -> None:
    options = schema.BatchMatMulOptionsT()
    options.adjX = options.adjY = False
    operator.opcodeIndex = tflite_files.opcode(model, schema.BuiltinOperator.BATCH_MATMUL)
    operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.BatchMatMulOptions, options


def _flatten(model: Any, graph: Any, operator: Any) -> None:
    """Put RESHAPEs around a product of a map, which would be one of a row of it at a time, and behind one whose linear
    layer gave its outputs fewer axes, as it may."""
    given, made = graph.tensors[operator.inputs[0]], graph.tensors[operator.outputs[0]]
    name, place = tflite_files.text(made.name), _place(graph, operator)
    if math.prod(given.shape[:-2]) == 1 and len(given.shape) == len(made.shape):
        return
    shape = list(given.shape)
    if math.prod(shape[:-2]) > 1:
        shape = [1, math.prod(shape[:-1]), shape[-1]]
        flat = _add_tensor(graph, f"{name};rows", shape)
        graph.operators.insert(place, _reshape(model, graph, int(operator.inputs[0]), flat, [1, -1, shape[-1]]))
        operator.inputs[0], place = flat, place + 1
    deep, out = _add_tensor(graph, f"{name};flat", [*shape[:-1], made.shape[-1]]), int(operator.outputs[0])
    operator.outputs = np.array([deep], np.int32)
    graph.operators.insert(place + 1, _reshape(model, graph, deep, out, [-1, *made.shape[1:]]))


def _reshape(model: Any, graph: Any, given: int, made: int, shape: Sequence[int]) -> Any:
    step, options = schema.OperatorT(), schema.ReshapeOptionsT()
    options.newShape = list(shape)
    step.opcodeIndex = tflite_files.opcode(model, schema.BuiltinOperator.RESHAPE)
    step.builtinOptionsType, step.builtinOptions = schema.BuiltinOptions.ReshapeOptions, options
    name = f"{tflite_files.text(graph.tensors[made].name)};shape"
    values = _add_constant(model, graph, name, np.array(shape, np.int32))
    step.inputs, step.outputs = np.array([given, values], np.int32), np.array([made], np.int32)
    return step


def _place(graph: Any, operator: Any) -> int:
    return next(number for number, other in enumerate(graph.operators) if other is operator)


def _add_tensor(graph: Any, name: str, shape: Sequence[int]) -> int:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type = name.encode(), np.array(shape, np.int32), schema.TensorType.FLOAT32
    tensor.buffer = 0
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def _follow(
    model: Any, graph: Any, operator: Any, steps: list[tuple[str, npt.NDArray[np.float32]]], activation: int
) -> None:
    """Put elementwise operators behind one, of which the last gives what it gave."""
    place = _place(graph, operator)
    end = int(operator.outputs[0])
    current = operator
    for number, (kind, values) in enumerate(steps):
        between = schema.TensorT()
        final = graph.tensors[end]
        between.name = f"{tflite_files.text(final.name)}{PRODUCT}{number}".encode()
        between.shape, between.type, between.buffer = final.shape, final.type, 0
        current.outputs = np.array([len(graph.tensors)], np.int32)
        graph.tensors.append(between)
        step, options = schema.OperatorT(), getattr(schema, f"{kind.title()}OptionsT")()
        options.fusedActivationFunction = activation if number == len(steps) - 1 else 0
        step.opcodeIndex = tflite_files.opcode(model, getattr(schema.BuiltinOperator, kind))
        step.builtinOptionsType = getattr(schema.BuiltinOptions, f"{kind.title()}Options")
        step.builtinOptions = options
        name = f"{tflite_files.text(final.name)};{kind.lower()}{number}"
        step.inputs = np.array([current.outputs[0], _add_constant(model, graph, name, values)], np.int32)
        step.outputs = np.array([end], np.int32)
        place += 1
        graph.operators.insert(place, step)
        current = step


def _add_constant(model: Any, graph: Any, name: str, values: npt.NDArray[np.float32] | npt.NDArray[np.int32]) -> int:
    tensor, is_float = schema.TensorT(), np.issubdtype(values.dtype, np.floating)
    tensor.name, tensor.shape = name.encode(), np.array(values.shape, np.int32)
    tensor.type = schema.TensorType.FLOAT32 if is_float else schema.TensorType.INT32
    tensor.buffer = _buffer(model, values)
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def _buffer(model: Any, values: npt.NDArray[np.floating] | npt.NDArray[np.int32]) -> int:
    kind = np.float32 if np.issubdtype(values.dtype, np.floating) else np.int32
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(np.ascontiguousarray(values, kind).tobytes(), np.uint8)
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def _floats(model: Any, tensor: Any) -> npt.NDArray[np.float32]:
    return np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.float32)
