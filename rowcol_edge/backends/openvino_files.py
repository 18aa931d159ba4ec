"""OpenVINO IR files: the types of a model's constants, held against what its precision claims, without openvino."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from ..errors import StageError

_DTYPES = {
    "f16": "float16", "f32": "float32", "f64": "float64", "bf16": "bfloat16", "i4": "int4", "u4": "uint4", "i8": "int8",
    "u8": "uint8", "i16": "int16", "u16": "uint16", "i32": "int32", "u32": "uint32", "i64": "int64", "u64": "uint64",
    "boolean": "bool",
}  # fmt: skip
_ITEMSIZE = {"float16": 2, "float32": 4, "float64": 8, "int8": 1, "uint8": 1}
_WEIGHTED = ("Convolution", "ConvolutionBackpropData", "GroupConvolution", "MatMul")
_BETWEEN = ("Convert", "FakeQuantize", "Multiply", "Reshape", "Subtract", "Transpose", "Unsqueeze")
"""What may stand between a stored weight and its operator: its decompression."""
_SHARE = {"fp16": 0.95, "int8": 0.90}
"""Least share of the weight values of `_WEIGHTED` that must have the type of the precision."""


@dataclass(frozen=True, slots=True)
class _Layer:
    name: str
    kind: str
    dtype: str
    size_bytes: int
    inputs: tuple[str, ...]
    """Identifiers of the layers its inputs come from, in order."""


def weight_types(path: Path) -> dict[str, int]:
    """Bytes of the IR's constants by numpy dtype name, largest first."""
    total: Counter[str] = Counter()
    for layer in _layers(path).values():
        if layer.kind == "Const":
            total[layer.dtype] += layer.size_bytes
    return dict(total.most_common())


def check_types(
    path: Path, precision: str, kept_float: Collection[str] = (), *, least_share: float | None = None
) -> None:
    """StageError unless the IR holds the types that ``precision`` claims, operators in ``kept_float`` left out.

    fp32: only float32 weights, no quantizer. fp16: 95 % of the weight values of convolutions and MatMuls. int8: 90 % of
    them, and quantizers. ``least_share`` takes the place of these shares.
    """
    layers = _layers(path)
    values: Counter[str] = Counter()
    for layer in _weights(layers, kept_float):
        values[layer.dtype] += layer.size_bytes // _ITEMSIZE.get(layer.dtype, 1)
    quantized = any(layer.kind == "FakeQuantize" for layer in layers.values())
    if precision == "fp32":
        if set(values) - {"float32"} or quantized:
            raise _claim("fp32", "float32 weights and no quantizer", _text(values, quantized))
        return
    kinds = ("float16",) if precision == "fp16" else ("int8", "uint8")
    share = sum(values[kind] for kind in kinds) / max(1, values.total())
    least = _SHARE[precision] if least_share is None else least_share
    if share < least or (precision == "int8" and not quantized):
        expected = f"{least:.0%} of the weights of convolutions and MatMuls in {kinds[0]}"
        raise _claim(precision, expected, f"{share:.1%}: {_text(values, quantized)}")


def _layers(path: Path) -> dict[str, _Layer]:
    root = ET.parse(path).getroot()  # noqa: S314 – the backend has just written the file
    sources: dict[str, list[tuple[int, str]]] = {}
    for edge in root.iter("edge"):
        sources.setdefault(edge.get("to-layer", ""), []).append(
            (int(edge.get("to-port", "0")), edge.get("from-layer", ""))
        )
    found = {}
    for layer in root.iter("layer"):
        data, name = layer.find("data"), layer.get("id", "")
        attributes = {} if data is None else data.attrib
        dtype = attributes.get("element_type", "")
        found[name] = _Layer(
            layer.get("name", ""),
            layer.get("type", ""),
            _DTYPES.get(dtype, dtype),
            int(attributes.get("size", "0")),
            tuple(source for _, source in sorted(sources.get(name, []))),
        )
    return found


def float_layers(path: Path) -> tuple[str, ...]:
    """Names of the convolutions and MatMuls whose weights are float32."""
    layers = _layers(path)
    return tuple(layer.name for layer, weight in _pairs(layers) if layers[weight].dtype == "float32")


def _weights(layers: dict[str, _Layer], without: Collection[str]) -> Iterator[_Layer]:
    """The constants behind the operands of convolutions and MatMuls, each once."""
    for name in dict.fromkeys(weight for layer, weight in _pairs(layers) if layer.name not in without):
        yield layers[name]


def _pairs(layers: dict[str, _Layer]) -> Iterator[tuple[_Layer, str]]:
    """Each convolution and MatMul with the identifiers of the constants that its operands are made of alone."""

    def constant(name: str) -> bool:
        layer = layers[name]
        return layer.kind == "Const" or (layer.kind in _BETWEEN and all(map(constant, layer.inputs)))

    for layer in layers.values():
        if layer.kind not in _WEIGHTED:
            continue
        for name in filter(constant, layer.inputs):
            while layers[name].kind in _BETWEEN:
                name = layers[name].inputs[0]
            yield layer, name


def _text(values: Counter[str], quantized: bool) -> str:
    counts = ", ".join(f"{count:,} {dtype}" for dtype, count in values.most_common())
    return f"{counts or 'no weights'}, {'with' if quantized else 'no'} quantizers"


def _claim(precision: str, expected: str, got: str) -> StageError:
    return StageError(
        f"the compiled IR does not hold what {precision} claims",
        expected=expected,
        got=got,
        hint="use another precision for this model",
    )
