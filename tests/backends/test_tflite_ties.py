"""When the scale behind an int8 convolution goes into those of its weight, on a graph of three operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from rowcol_edge.backends import tflite_files, tflite_ties

CHANNELS = 3
GIVEN, WEIGHT, BIAS, PRODUCT, FACTORS, SCALED, MADE = range(7)


def tensor(name: str, kind: int, shape: list[int], buffer: int, scale: float) -> Any:
    made = schema.TensorT()
    made.name, made.type, made.shape, made.buffer = name.encode(), kind, np.array(shape, np.int32), buffer
    made.quantization = schema.QuantizationParametersT()
    made.quantization.scale, made.quantization.zeroPoint = np.array([scale], np.float32), np.zeros(1, np.int64)
    return made


def operator(model: Any, kind: str, inputs: list[int], outputs: list[int]) -> Any:
    made = schema.OperatorT()
    made.opcodeIndex = tflite_files.opcode(model, getattr(schema.BuiltinOperator, kind))
    options = {"CONV_2D": schema.Conv2DOptionsT, "MUL": schema.MulOptionsT, "ADD": schema.AddOptionsT}
    made.builtinOptions = options[kind]()
    made.inputs, made.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
    return made


def network(factors: list[float]) -> tuple[Any, Any]:
    """A convolution, a product with these factors and an operator that reads it, at int8 and in float."""
    made = []
    for is_float in (False, True):
        model, graph = schema.ModelT(), schema.SubGraphT()
        kinds = ["INT8", "INT8", "INT32", "INT8", "INT8", "INT8", "INT8"]
        pictures = [1, 2, 2, CHANNELS]
        contents = {
            WEIGHT: np.ones((CHANNELS, 1, 1, 4), np.float32 if is_float else np.int8),
            BIAS: np.ones(CHANNELS, np.float32 if is_float else np.int32),
            FACTORS: np.array(factors, np.float32) if is_float else np.full(CHANNELS, 127, np.int8),
        }
        shapes = [[1, 2, 2, 4], [CHANNELS, 1, 1, 4], [CHANNELS], pictures, [CHANNELS], pictures, pictures]
        model.buffers = [schema.BufferT() for _ in range(len(shapes) + 1)]
        for index, values in contents.items():
            model.buffers[index + 1].data = np.frombuffer(values.tobytes(), np.uint8)
        graph.tensors = [
            tensor(f"t{index}", getattr(schema.TensorType, "FLOAT32" if is_float else kind), shape, index + 1, 0.5)
            for index, (kind, shape) in enumerate(zip(kinds, shapes, strict=True))
        ]
        graph.tensors[SCALED].quantization.scale = np.array([0.25], np.float32)
        model.operatorCodes, model.subgraphs, model.signatureDefs, model.metadata = [], [graph], [], []
        graph.inputs, graph.outputs = np.array([GIVEN], np.int32), np.array([MADE], np.int32)
        graph.operators = [
            operator(model, "CONV_2D", [GIVEN, WEIGHT, BIAS], [PRODUCT]),
            operator(model, "MUL", [PRODUCT, FACTORS], [SCALED]),
            operator(model, "ADD", [SCALED, SCALED], [MADE]),
        ]
        graph.operators[1].builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.RELU
        made.append(model)
    return made[0], made[1]


def test_a_positive_scale_becomes_one_of_each_channel_of_the_weight() -> None:
    model, original = network([1.0, 2.0, 3.0])
    tflite_ties.absorb(model, original)
    [graph] = model.subgraphs
    convolution, reader = graph.operators
    weight, bias = (graph.tensors[index] for index in convolution.inputs[1:])
    made = convolution.outputs[0]
    assert list(reader.inputs) == [made, made]
    assert graph.tensors[made].quantization.scale == [0.25]
    assert convolution.builtinOptions.fusedActivationFunction == schema.ActivationFunctionType.RELU
    for scaled in (weight, bias):
        np.testing.assert_array_equal(scaled.quantization.scale, [0.5, 1.0, 1.5])
        np.testing.assert_array_equal(scaled.quantization.zeroPoint, [0, 0, 0])


def read_weight_twice(model: Any, graph: Any) -> None:
    graph.operators.append(operator(model, "CONV_2D", [GIVEN, WEIGHT, BIAS], [MADE]))


def read_product_twice(model: Any, graph: Any) -> None:
    graph.operators.append(operator(model, "MUL", [PRODUCT, PRODUCT], [MADE]))


def give_scaled_out(model: Any, graph: Any) -> None:
    graph.outputs = np.array([MADE, SCALED], np.int32)


def give_product_out(model: Any, graph: Any) -> None:
    graph.outputs = np.array([MADE, PRODUCT], np.int32)


def without_bias(model: Any, graph: Any) -> None:
    graph.operators[0].inputs = graph.operators[0].inputs[:2]


def absent_bias(model: Any, graph: Any) -> None:
    graph.operators[0].inputs[2] = -1


def activate_product(model: Any, graph: Any) -> None:
    graph.operators[0].builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.RELU


CHANGES = (
    read_weight_twice, read_product_twice, give_scaled_out, give_product_out, without_bias, absent_bias,
    activate_product,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_scale_stays_where_something_else_would_be_scaled_too(change: Callable[[Any, Any], None]) -> None:
    model, original = network([1.0, 2.0, 3.0])
    [graph] = model.subgraphs
    change(model, graph)
    before = len(graph.operators)
    tflite_ties.absorb(model, original)
    assert len(graph.operators) == before
    assert {len(held.quantization.scale) for held in graph.tensors} == {1}


@pytest.mark.parametrize("factors", [[1.0, -2.0, 3.0], [1.0, 0.0, 3.0]])
def test_a_scale_that_is_not_positive_stays(factors: list[float]) -> None:
    model, original = network(factors)
    tflite_ties.absorb(model, original)
    assert [tflite_files.kind(model, held) for held in model.subgraphs[0].operators] == ["CONV_2D", "MUL", "ADD"]
