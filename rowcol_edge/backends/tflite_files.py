"""TFLite files: what a model's weights really are, held against what its precision claims, and how it is written."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingDependencyError, StageError

try:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils
except ModuleNotFoundError as e:
    raise MissingDependencyError("working with TFLite files", package="rowcol-edge[tflite]") from e

_SHARE = {"fp16": 0.95, "int8": 0.90, "int8-io": 0.90, "int8-dynamic": 0.90}
"""Least share of the weight values of `_WEIGHTED` that must have the type of the precision."""
_WEIGHTED = {
    "CONV_2D": (1,), "DEPTHWISE_CONV_2D": (1,), "TRANSPOSE_CONV": (1,), "FULLY_CONNECTED": (1,), "BATCH_MATMUL": (0, 1),
}  # fmt: skip
"""Operators that can be quantized → which of their inputs may be a weight."""
_ALIGNMENT = 16  # of a buffer, which kernels read as vectors of numbers
_TYPES = {value: name.lower() for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
_OPERATORS = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}


@dataclass(frozen=True, slots=True)
class _Weight:
    """A constant operand of a layer: its type and values, and the type of what it is multiplied with."""

    layer: str
    """The name of the layer's output."""
    kind: str
    buffer: int
    dtype: str
    values: int
    activation: str
    scales: int


def read(path: Path) -> Any:
    """The model as the schema's objects. StageError: no such file, or another one."""
    try:
        content = path.read_bytes()
    except OSError as e:
        raise StageError(f"reading {path.name}", expected="a TFLite file", got=str(e)) from e
    if content[4:8] != b"TFL3":
        raise StageError(f"reading {path.name}", expected="a TFLite file", got="another kind of file")
    return unpacked(content)


def unpacked(content: bytes) -> Any:
    """The flatbuffer as the schema's objects."""
    return flatbuffer_utils.read_model_from_bytearray(content)


def packed(model: Any) -> bytes:
    """The model as a flatbuffer; the same model gives the same bytes."""
    builder = _Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def name_signature(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the inputs and outputs of the only signature, which are in the graph's order, their names."""
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    for maps, tensors, names in (
        (signature.inputs, graph.inputs, inputs),
        (signature.outputs, graph.outputs, outputs),
    ):
        if not len(maps) == len(tensors) == len(names):
            raise ValueError(f"{len(names)} inputs or outputs became {len(tensors)}")
        for entry, tensor, name in zip(maps, tensors, names, strict=True):
            entry.name, entry.tensorIndex = name.encode(), tensor


def widen_inputs(model: Any, dtypes: Sequence[str]) -> None:
    """Make those inputs int64 again that litert-torch has narrowed to int32: a CAST stands behind each.

    Args:
        dtypes: what the network takes, in the graph's order.
    """
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    for place, (index, dtype) in enumerate(zip(graph.inputs, dtypes, strict=True)):
        narrow = graph.tensors[index]
        if (dtype, _TYPES[narrow.type]) != ("int64", "int32"):
            continue
        wide, options, cast = schema.TensorT(), schema.CastOptionsT(), schema.OperatorT()
        wide.name, wide.shape, wide.shapeSignature = narrow.name, narrow.shape, narrow.shapeSignature
        wide.type, wide.buffer = schema.TensorType.INT64, len(model.buffers)
        narrow.name = f"{text(narrow.name)};int32".encode()
        options.inDataType, options.outDataType = wide.type, narrow.type
        cast.opcodeIndex = opcode(model, schema.BuiltinOperator.CAST)
        cast.inputs, cast.outputs = np.array([len(graph.tensors)], np.int32), np.array([index], np.int32)
        cast.builtinOptionsType, cast.builtinOptions = schema.BuiltinOptions.CastOptions, options
        graph.inputs[place] = signature.inputs[place].tensorIndex = len(graph.tensors)
        model.buffers.append(schema.BufferT())
        graph.tensors.append(wide)
        graph.operators.insert(0, cast)


def opcode(model: Any, operator: int) -> int:
    """Where an operator stands in the model's list of those it uses; it is added if it is not there."""
    known = [code.builtinCode for code in model.operatorCodes]
    if operator not in known:
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = operator
        code.version = 1
        model.operatorCodes.append(code)
    return [*known, operator].index(operator)


def add_metadata(model: Any, entries: Mapping[str, bytes]) -> None:
    """A named buffer for each entry, in place of one of the same name."""
    model.metadata = [entry for entry in model.metadata or [] if text(entry.name) not in entries]
    for name, content in entries.items():
        buffer, metadata = schema.BufferT(), schema.MetadataT()
        buffer.data = np.frombuffer(content, np.uint8)
        metadata.name, metadata.buffer = name.encode(), len(model.buffers)
        model.buffers.append(buffer)
        model.metadata.append(metadata)


def metadata(model: Any) -> dict[str, bytes]:
    """The named buffers."""
    return {text(entry.name): bytes(model.buffers[entry.buffer].data) for entry in model.metadata or []}


def add_biases(model: Any) -> None:
    """A bias of zeros for each int8 linear layer without one: tflite-runtime 2.14 reads it on Arm all the same."""
    for graph in model.subgraphs:
        for operator in graph.operators:
            given, weight, *bias = operator.inputs if kind(model, operator) == "FULLY_CONNECTED" else (-1, -1, 0)
            if any(index >= 0 for index in bias) or _TYPES[graph.tensors[given].type] != "int8":
                continue
            scale = graph.tensors[weight].quantization.scale * graph.tensors[given].quantization.scale
            tensor, buffer, quantization = schema.TensorT(), schema.BufferT(), schema.QuantizationParametersT()
            zeros = np.zeros(graph.tensors[weight].shape[0], np.int32)
            buffer.data = zeros.view(np.uint8)
            quantization.scale, quantization.zeroPoint = scale.astype(np.float32), np.zeros(scale.size, np.int64)
            tensor.name = f"{text(graph.tensors[operator.outputs[0]].name)};bias".encode()
            tensor.shape, tensor.type, tensor.buffer = zeros.shape, schema.TensorType.INT32, len(model.buffers)
            tensor.quantization = quantization
            operator.inputs = np.array([given, weight, len(graph.tensors)], np.int32)
            model.buffers.append(buffer)
            graph.tensors.append(tensor)


def split_outputs(model: Any) -> None:
    """Give outputs in float32 and their int8 readers in int8: of an output that the model itself reads,
    ai-edge-quantizer makes one tensor for both."""
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    makers = {index: operator for operator in graph.operators for index in operator.outputs}

    def made_by(index: int, operator: str) -> Any:
        maker = makers.get(index)
        return maker if maker is not None and kind(model, maker) == operator else None

    def is_int8(index: int) -> bool:
        return bool(_TYPES[graph.tensors[index].type] == "int8")

    for reader in graph.operators:
        if is_int8(reader.outputs[0]) and kind(model, reader) != "QUANTIZE":
            sources = [made_by(index, "DEQUANTIZE") for index in reader.inputs]
            pairs = zip(reader.inputs, sources, strict=True)
            reader.inputs = np.array([i if source is None else source.inputs[0] for i, source in pairs], np.int32)
    for place, index in enumerate(graph.outputs):
        quantize = made_by(index, "QUANTIZE")
        if quantize is not None and is_int8(index):
            graph.outputs[place] = quantize.inputs[0]
            for entry in signature.outputs:
                entry.tensorIndex = quantize.inputs[0] if entry.tensorIndex == index else entry.tensorIndex


def operators(model: Any) -> Counter[str]:
    """How many of each operator."""
    return Counter(kind(model, operator) for graph in model.subgraphs for operator in graph.operators)


def weight_types(model: Any) -> dict[str, int]:
    """Bytes of the model's constants by numpy dtype name, largest first; a buffer that tensors share counts once."""
    found = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            if data is not None:
                found[tensor.buffer] = (_TYPES[tensor.type], len(data))
    total: Counter[str] = Counter()
    for dtype, size_bytes in found.values():
        total[dtype] += size_bytes
    return dict(total.most_common())


def single_layer(model: Any, layer: str) -> tuple[Any, str]:
    """The operator whose output is called so as a model of its own, and the name of the tensor it takes."""
    graph = model.subgraphs[0]
    operator = next(op for op in graph.operators if text(graph.tensors[op.outputs[0]].name) == layer)
    used = [index for index in (*operator.inputs, *operator.outputs) if index >= 0]
    places = {index: place for place, index in enumerate(dict.fromkeys(used))}
    tensors = [copy.copy(graph.tensors[index]) for index in places]
    buffers = [model.buffers[tensor.buffer] for tensor in tensors]
    [given] = {i for i in operator.inputs if i >= 0 and model.buffers[graph.tensors[i].buffer].data is None}
    alone = copy.copy(operator)
    alone.opcodeIndex = 0
    alone.inputs, alone.outputs = (
        np.array([places.get(i, -1) for i in indices], np.int32) for indices in (operator.inputs, operator.outputs)
    )
    for place, tensor in enumerate(tensors):
        tensor.buffer = place + 1  # the first one is empty, as the format wants it
    single, cut, signature = schema.ModelT(), schema.SubGraphT(), schema.SignatureDefT()
    cut.tensors, cut.operators = tensors, [alone]
    cut.inputs, cut.outputs = (np.array([places[i]], np.int32) for i in (given, operator.outputs[0]))
    signature.signatureKey, signature.subgraphIndex = b"serving_default", 0
    signature.inputs, signature.outputs = [schema.TensorMapT()], [schema.TensorMapT()]
    for maps, index in ((signature.inputs, given), (signature.outputs, operator.outputs[0])):
        maps[0].name, maps[0].tensorIndex = graph.tensors[index].name, places[index]
    single.version, single.subgraphs, single.signatureDefs = model.version, [cut], [signature]
    single.operatorCodes, single.buffers = [model.operatorCodes[operator.opcodeIndex]], [schema.BufferT(), *buffers]
    return single, text(graph.tensors[given].name)


def size_bytes(tensor: Any) -> int | None:
    """What a tensor takes; None where its type has no numpy counterpart."""
    try:
        itemsize: int = np.dtype(_TYPES[tensor.type]).itemsize
    except TypeError:
        return None
    return itemsize * math.prod(int(size) for size in (() if tensor.shape is None else tensor.shape))


def int8_layers(model: Any) -> dict[str, str]:
    """Layers whose weights are int8, by the name of their output → the operator."""
    return {weight.layer: weight.kind for weight in _weights(model) if weight.dtype == "int8"}


def is_dynamic(model: Any) -> bool:
    """Whether int8 weights are multiplied with float32 activations."""
    return any(weight.dtype == "int8" and weight.activation == "float32" for weight in _weights(model))


def linear_per_channel(model: Any) -> bool:
    """Whether int8 weights of linear layers have a scale a channel, where there are several."""
    return any(w.scales > 1 for w in _weights(model) if w.kind == "FULLY_CONNECTED" and w.dtype == "int8")


def check_types(model: Any, precision: str, keep_float: Sequence[str] = ()) -> None:
    """StageError unless the model holds the types that ``precision`` claims.

    fp32: only float32 weights. fp16: 95 % of the weight values of convolutions and matrix products in float16. int8,
    int8-io: 90 % of them in int8, multiplied with int8; int8-io has no float32 input or output, int8 only such.
    int8-dynamic: 90 % of them in int8, multiplied with float32. Layers in ``keep_float`` do not count.
    """
    weights = {weight.buffer: weight for weight in _weights(model) if weight.layer not in keep_float}.values()
    values: Counter[str] = Counter()
    for weight in weights:
        values[f"{weight.dtype} × {weight.activation}"] += weight.values
    wanted_kind = {
        "fp32": "float32 × float32", "fp16": "float16 × float32", "int8": "int8 × int8", "int8-io": "int8 × int8",
        "int8-dynamic": "int8 × float32",
    }[precision]  # fmt: skip
    wanted = _SHARE.get(precision, 1.0)
    share = values[wanted_kind] / max(1, values.total())
    if share < wanted or not values:
        counts = ", ".join(f"{count:,} {name}" for name, count in values.most_common())
        raise _claim(precision, f"{wanted:.0%} of the weights as {wanted_kind} activations", counts or "no weights")
    graph = model.subgraphs[0]
    ports = {_TYPES[graph.tensors[index].type] for index in (*graph.inputs, *graph.outputs)}
    # a uint8 input is one of pixels, which the model has by itself
    narrow = ports & {"int8"} if precision != "int8-io" else ports & {"float32"}
    if narrow:
        expected = "int8 inputs and outputs" if precision == "int8-io" else "float32 inputs and outputs"
        raise _claim(precision, expected, ", ".join(sorted(ports)))


def _weights(model: Any) -> Iterator[_Weight]:
    """Constant operands of `_WEIGHTED`, directly or through a DEQUANTIZE."""
    for graph in model.subgraphs:
        behind = {
            operator.outputs[0]: operator.inputs[0]
            for operator in graph.operators
            if kind(model, operator) == "DEQUANTIZE"
        }
        for operator in graph.operators:
            name = kind(model, operator)
            for position in _WEIGHTED.get(name, ()):
                # a TRANSPOSE_CONV takes the shape of its output first
                data = 2 if name == "TRANSPOSE_CONV" else 1 - position
                index, other = operator.inputs[position], operator.inputs[data]
                tensor = graph.tensors[behind.get(index, index)]
                if model.buffers[tensor.buffer].data is not None:
                    activation = _TYPES[graph.tensors[other].type]
                    layer = text(graph.tensors[operator.outputs[0]].name)
                    values = math.prod(tensor.shape)
                    scale = None if tensor.quantization is None else tensor.quantization.scale
                    scales = 0 if scale is None else len(scale)
                    yield _Weight(layer, name, tensor.buffer, _TYPES[tensor.type], values, activation, scales)


def kind(model: Any, operator: Any) -> str:
    code = model.operatorCodes[operator.opcodeIndex]
    name: str = _OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)]
    return name


def text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _claim(precision: str, expected: str, got: str) -> StageError:
    return StageError(
        f"the compiled file does not hold what {precision} claims",
        expected=expected,
        got=got,
        hint="use another precision for this model",
    )


class _Builder(flatbuffers.Builder):  # type: ignore[misc]  # ships no types
    """Keeps the schema's alignment of buffers, which its Python classes leave out, and writes zero points, of which
    weights have one for each channel and all of them zero, once for all tensors with as many."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._written: dict[bytes, int] = {}

    def StartVector(self, elemSize: int, numElems: int, alignment: int) -> int:  # noqa: N802
        start: int = super().StartVector(elemSize, numElems, _ALIGNMENT if elemSize == 1 else alignment)
        return start

    def CreateNumpyVector(self, x: np.ndarray) -> int:  # noqa: N802
        if x.dtype != np.int64:
            return int(super().CreateNumpyVector(x))
        content = x.tobytes()
        if content not in self._written:
            self._written[content] = int(super().CreateNumpyVector(x))
        return self._written[content]
