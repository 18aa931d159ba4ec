"""Tied weights in OpenVINO models: one constant for all uses of a weight, in float and in int8.

Its transposed uses read it through a Transpose, which openvino calculates once while it compiles the model: the IR
holds the weight once, the compiled model may hold it for each use, as it would without a tie. Scales that the
conversion has multiplied into its rows (batch norms) stand behind the layer, where the compiler fuses them again; at
int8 they are among the scales that a weight is read with. See `onnx_ties` for why it has one scale a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from openvino import opset13 as ops

from . import ties

_LEAST_BYTES = 1024
_VALUE_OR_END = re.compile(r'"[^"]*"|\s*(?P<end>/?>)\s*')
_PORT = re.compile(r'<port (id="\d+")[^>]*?(?:/>|>.*?</port>)')


@dataclass(frozen=True, slots=True)
class _Weight:
    """A layer's constant; ``scale`` is the Multiply that reads an int8 one, ``upright`` is outputs × inputs (× …)."""

    layer: Any
    constant: Any
    scale: Any
    upright: bool

    @property
    def name(self) -> str:
        return str(self.layer.get_friendly_name())

    def array(self) -> npt.NDArray[Any]:
        data: npt.NDArray[Any] = ties.compact(self.constant.get_data())
        return data if self.upright else ties.turned(data)


def find(model: Any) -> tuple[ties.Tie, ...]:
    """The ties among the float weights of linear layers and convolutions; uses go by the layers' names."""
    weights = {weight.name: weight for weight in _weights(model) if weight.scale is None}
    return ties.find({name: weight.array() for name, weight in weights.items()})


def share(model: Any, found: tuple[ties.Tie, ...]) -> None:
    """Give, in place, the uses of each tie one constant. ``model`` is that in which they were found, or what a
    quantizer has made of it: a tie with a use in float and another in int8 stays as it is."""
    weights = {weight.name: weight for weight in _weights(model)}
    for tie in found:
        uses = [(use, weights[use.name]) for use in tie.uses if use.name in weights]
        quantized = [weight.scale is not None for _, weight in uses]
        if all(quantized):
            _share_int8(tie, uses)
        elif not any(quantized):
            _share_float(tie, uses)


def compact(model: Any) -> None:
    """Merge, in place, constants of the same content, number them, and forget the names of tensors within: the file
    describes each, and beside weights that are stored once the descriptions count."""
    first: dict[tuple[str, tuple[int, ...], bytes], Any] = {}
    for number, node in enumerate(model.get_ordered_ops()):
        kind = node.get_type_name()
        for out in node.outputs() if kind not in ("Parameter", "Result") else ():
            if not any(reader.get_node().get_type_name() == "Result" for reader in out.get_target_inputs()):
                out.get_tensor().set_names(set())
        if kind != "Constant":
            continue
        node.set_friendly_name(f"c{number}")
        if node.get_byte_size() >= _LEAST_BYTES:
            continue
        key = (str(node.get_element_type()), tuple(node.get_output_shape(0)), node.get_data().tobytes())
        kept = first.setdefault(key, node)
        if kept is not node:
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(kept.output(0))


def shorten(path: Path) -> None:
    """Rewrite an IR's description without what its readers can do without: the spaces between its elements, and of
    inputs, which an edge joins to the output of another operator, all but their number."""
    text = _VALUE_OR_END.sub(lambda found: found["end"] or found[0], path.read_text(encoding="utf-8"))
    text = re.sub(r"<input>.*?</input>", lambda found: _PORT.sub(r"<port \1/>", found[0]), text)
    path.write_text(text, encoding="utf-8")


def _share_float(tie: ties.Tie, uses: list[tuple[ties.Use, _Weight]]) -> None:
    shared = ops.constant(tie.weight.astype(np.float32))
    for use, weight in uses:
        _read(use, weight, shared)
        if not use.plain:
            out = weight.layer.output(0)
            readers = out.get_target_inputs()
            shape = (-1, *[1] * (weight.constant.get_output_partial_shape(0).rank.get_length() - 2))
            factors = use.factors.astype(np.float32).reshape(shape)
            scaled = ops.multiply(weight.layer, ops.constant(factors), name=f"{weight.name}/factors")
            for reader in readers:
                reader.replace_source_output(scaled.output(0))


def _share_int8(tie: ties.Tie, uses: list[tuple[ties.Use, _Weight]]) -> None:
    limit = max(int(np.abs(weight.constant.get_data().astype(np.int16)).max()) for _, weight in uses)
    numbers, scale = tie.quantized(limit)
    shared = ops.constant(numbers)
    for use, weight in uses:
        before = weight.scale.input_value(1)
        factors = (scale * use.factors).astype(np.float32)
        rank = weight.constant.get_output_partial_shape(0).rank.get_length()
        shape = (-1, *[1] * (rank - 1)) if weight.upright else (1, -1)
        # one for all where they are one: repeated, those of a tied transformer are as large as its biases
        after = ops.constant(factors[:1].reshape([1] * rank) if use.plain else factors.reshape(shape))
        after.set_friendly_name(before.get_node().get_friendly_name())
        weight.scale.input(1).replace_source_output(after.output(0))
        _read(use, weight, shared)


def _read(use: ties.Use, weight: _Weight, shared: Any) -> None:
    """Let the layer read the constant, which is outputs × inputs (× kernel) of the uses that are not transposed.

    The Transpose has a third axis, that of the taps, for a matrix too: openvino would take one of two into the MatMul
    as ``transpose_b``, and its CPU then packs a square weight for both uses in the one way that it met first (2026.4:
    wrong outputs).
    """
    source, name = shared, weight.constant.get_friendly_name()
    shape = list(weight.constant.get_output_shape(0))
    if use.transposed == weight.upright:
        deep = ops.reshape(source, _whole(*list(source.get_output_shape(0))[:2], -1), special_zero=False)
        source = ops.transpose(deep, _whole(1, 0, 2), name=f"{name}/tied")
    if list(source.get_output_shape(0)) != shape:
        source = ops.reshape(source, _whole(*shape), special_zero=False, name=f"{name}/turned")
    for reader in weight.constant.output(0).get_target_inputs():
        reader.replace_source_output(source.output(0))


def _whole(*values: int) -> Any:
    return ops.constant(np.array(values, np.int64))


def _weights(model: Any) -> Iterator[_Weight]:
    for layer in model.get_ordered_ops():
        kind = layer.get_type_name()
        if kind not in ("Convolution", "MatMul"):
            continue
        node, scale = layer.input_value(1).get_node(), None
        if node.get_type_name() == "Multiply" and node.input_value(0).get_node().get_type_name() == "Convert":
            scale, node = node, node.input_value(0).get_node().input_value(0).get_node()
        if node.get_type_name() != "Constant" or len(node.output(0).get_target_inputs()) != 1:
            continue
        rank = len(node.get_output_shape(0))
        if (kind == "MatMul" and rank != 2) or node.get_byte_size() < _LEAST_BYTES:
            continue
        upright = kind == "Convolution" or bool(layer.get_attributes()["transpose_b"])
        yield _Weight(layer, node, scale, upright)
