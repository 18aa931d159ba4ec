"""The memory of the activations of an OpenVINO IR, see `liveness`.

A ``FakeQuantize`` counts as fused: what it makes has a byte a value, and what only it reads is never stored in float.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError
from .liveness import Step, peak_bytes

_IN_PLACE = ("Reshape", "Squeeze", "Unsqueeze")
_BYTE_LEVELS = 256


def activation_bytes(path: Path) -> int | None:
    """For one sample, where the batch is free; None where a size follows from values, or the graph takes no single
    sample."""
    model = of_one_sample(path)
    if model is None:
        return None
    sizes: dict[str, int | None] = {}
    steps, fed, given = [], [], []
    operators = model.get_ordered_ops()
    readers = Counter(port_name(port.get_source_output()) for op in operators for port in op.inputs())
    for op in operators:
        kind, outputs = op.get_type_name(), [port_name(port) for port in op.outputs()]
        inputs = [port_name(port.get_source_output()) for port in op.inputs()]
        if kind == "Result":
            given += inputs
            continue
        fed += outputs if kind == "Parameter" else []
        quantizes = gives_bytes(op)
        sizes |= {name: size_bytes(port, quantizes) for port, name in zip(op.outputs(), outputs, strict=True)}
        if quantizes and readers[inputs[0]] == 1 and inputs[0] not in fed:
            sizes[inputs[0]] = 0
        steps.append(Step(tuple(inputs), tuple(outputs), kind in _IN_PLACE))
    return peak_bytes(steps, sizes, fed, given)


def of_one_sample(path: Path) -> Any:
    """The model with every shape that follows from one sample; None where the graph takes no single one."""
    try:
        import openvino as ov
    except ModuleNotFoundError as e:
        raise MissingDependencyError("compiling for openvino", package="rowcol-edge[openvino]") from e

    model = ov.Core().read_model(path)
    shapes = {port: port.partial_shape for port in model.inputs}
    if any(shape.is_dynamic for shape in shapes.values()):
        # only the batch: another free size has no value that could be taken for it
        single = {port: ov.PartialShape([1, *list(shape)[1:]]) for port, shape in shapes.items() if len(shape)}
        try:
            model.reshape(single)
        except RuntimeError:
            return None
    return model


def gives_bytes(op: Any) -> bool:
    """Is it a quantizer whose values a byte holds?"""
    return bool(op.get_type_name() == "FakeQuantize" and op.get_attributes()["levels"] <= _BYTE_LEVELS)


def size_bytes(port: Any, in_bytes: bool) -> int | None:
    """What a value takes, ``in_bytes`` or in its own type; None where its shape is not known."""
    if not port.partial_shape.is_static:
        return None
    itemsize = 1 if in_bytes else port.element_type.size
    return int(itemsize * math.prod(port.partial_shape.to_shape()))


def port_name(port: Any) -> str:
    return f"{port.get_node().get_name()}:{port.get_index()}"
