"""``python -m rowcol_edge.backends.openvino_errors JOB.json``: what quantization does to each layer of an IR.

The float model runs first; in the int8 model, whatever reads a layer is then fed with the output of its float twin. So
a layer answers for its weights, for the range of its input and for the operators on the way to it, as openvino fuses
them with that range, but not for the layers before it. Two models and not one: in one, operators that both have would
be shared, and not be fused as they are in the artifact, and openvino does not fuse all of them rightly (2026.4: a
ReduceMean with the quantizer behind it). One sample's activations are held at a time.

The job names the float IR, the int8 IR, a folder with one ``.npz`` a sample, its arrays in the order of ``inputs``, and
the JSON file to write: the layers' names and errors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

_WEIGHTED = ("Convolution", "ConvolutionBackpropData", "GroupConvolution", "MatMul")
_FOLLOW = ("Add", "Clamp", "Multiply", "PRelu", "Relu")
"""Operators that belong to the layer they alone read: its bias, its scale, its activation."""
_MOVING = ("Gather", "Reshape", "Slice", "Squeeze", "StridedSlice", "Transpose", "Unsqueeze")
"""Operators that move or choose numbers and change none."""
_SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}


def main(job_file: str) -> int:
    import openvino as ov

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    core = ov.Core()
    original, quantized = core.read_model(job["model"]), core.read_model(job["artifact"])
    floats = {node.get_friendly_name(): node for node in original.get_ops() if node.get_type_name() != "Constant"}
    layers = [node for node in quantized.get_ordered_ops() if _is_layer(node) and node.get_friendly_name() in floats]
    ends = [_end(node, floats) for node in layers]
    twins = [floats[end.get_friendly_name()] for end in ends]
    reference = core.compile_model(ov.Model(twins, original.get_parameters(), "float"), "CPU", _SETTINGS)
    apart = core.compile_model(_apart(quantized, ends, twins), "CPU", _SETTINGS)
    sums = np.zeros((len(layers), 2))
    for path in sorted(Path(job["calibration"]).glob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            feed = {name: arrays[f"arr_{i}"] for i, name in enumerate(job["inputs"])}
        wanted = list(reference(feed).values())
        got = list(apart([*(feed[name] for name in job["inputs"]), *wanted]).values())
        sums += [[np.square(a - b).sum(), np.square(b).sum()] for a, b in zip(got, wanted, strict=True)]
    errors = np.sqrt(sums[:, 0] / np.maximum(sums[:, 1], np.finfo(np.float32).tiny))
    names = [node.get_friendly_name() for node in layers]
    Path(job["out"]).write_text(json.dumps([names, errors.tolist()]), encoding="utf-8")
    return 0


def _apart(quantized: Any, ends: list[Any], twins: list[Any]) -> Any:
    """The int8 model with its layers cut apart: it takes its inputs and each layer's float output, and gives what each
    layer makes of them."""
    import openvino as ov
    from openvino import opset13 as ops

    fed = [ops.parameter(twin.get_output_partial_shape(0), twin.get_output_element_type(0)) for twin in twins]
    for end, parameter in zip(ends, fed, strict=True):
        for port in end.output(0).get_target_inputs():
            port.replace_source_output(parameter.output(0))
    return ov.Model(ends, [*quantized.get_parameters(), *fed], "apart")


def _is_layer(node: Any) -> bool:
    return node.get_type_name() in _WEIGHTED and any(_is_quantized(value.get_node()) for value in node.input_values())


def _is_quantized(node: Any) -> bool:
    while node.get_type_name() in _MOVING:  # nncf sets a quantizer as early as it may
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def _end(node: Any, floats: dict[str, Any]) -> Any:
    """The last operator that belongs to the layer and that the float model has too."""
    end = node
    while True:
        readers = [port.get_node() for port in node.output(0).get_target_inputs()]
        readers = [reader for reader in readers if reader.get_type_name() != "ShapeOf"]
        if len(readers) != 1 or readers[0].get_type_name() not in _FOLLOW or not _alone(readers[0], node):
            return end
        node = readers[0]
        end = node if node.get_friendly_name() in floats else end


def _alone(reader: Any, node: Any) -> bool:
    """Does a reader take nothing but this node and constants?"""
    makers = [value.get_node() for value in reader.input_values()]
    return all(maker.get_friendly_name() == node.get_friendly_name() or _constant(maker) for maker in makers)


def _constant(node: Any) -> bool:
    makers = [value.get_node() for value in node.input_values()]
    return node.get_type_name() == "Constant" or (bool(makers) and all(_constant(maker) for maker in makers))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
