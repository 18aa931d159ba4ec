"""Where the Q/DQ pairs go, on real exported networks; nothing here runs TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from rowcol_edge.backends.base import QuantSpec
from rowcol_edge.backends.tensorrt import BACKEND
from rowcol_edge.backends.tensorrt_graph import check
from rowcol_edge.backends.tensorrt_qdq import WEIGHTED
from rowcol_edge.errors import StageError
from rowcol_edge.targets import RuntimeSpec

Batches = Callable[[], Iterator[dict[str, np.ndarray]]]


@pytest.fixture
def board(runtime: RuntimeSpec) -> RuntimeSpec:
    return replace(
        runtime, name="tensorrt", oldest="10.3.0", providers=("cuda:0",), precisions=("fp32", "fp16", "int8")
    )


@pytest.fixture
def compiled(tmp_path: Path, board: RuntimeSpec, batches: Batches) -> Callable[..., onnx.ModelProto]:
    def compiled(source: Path, precision: str, **options: bool) -> onnx.ModelProto:
        BACKEND.compile(
            source, board, QuantSpec(precision, **options), batches, tmp_path / "out.onnx", {"key": "value"}
        )
        return onnx.load(tmp_path / "out.onnx")

    return compiled


def from_dequantizer(proto: onnx.ModelProto) -> set[str]:
    return {node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}


@pytest.mark.parametrize("network", ["convolutions", "tokens"])
def test_every_layer_has_both_inputs_quantized_with_a_scale_an_output_channel_and_its_bias_in_float(
    network: str, compiled: Callable[..., onnx.ModelProto], request: pytest.FixtureRequest
) -> None:
    proto = compiled(request.getfixturevalue(network), "int8")
    dequantized = from_dequantizer(proto)
    constants = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    dims = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
    makers = {node.output[0]: node for node in proto.graph.node}
    layers = [node for node in proto.graph.node if node.op_type in WEIGHTED]
    quantized = [node for node in layers if set(node.input[:2]) <= dequantized]
    products = [node for node in layers if not dequantized & set(node.input)]
    assert len(quantized) == {"convolutions": 6, "tokens": 7}[network]
    assert len(products) == {"convolutions": 0, "tokens": 2}[network]
    assert len(layers) == len(quantized) + len(products)
    assert all(constants[node.input[2]] == TensorProto.FLOAT for node in quantized if len(node.input) > 2)
    for node in quantized:
        stored, scales = makers[node.input[1]].input[:2]
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        channels = dims[stored][0 if node.op_type == "Conv" or transposed else 1]
        assert list(dims[scales]) == [channels]
        assert channels > 1


def test_zero_points_are_zero_and_scales_positive(convolutions: Path, compiled: Callable[..., onnx.ModelProto]) -> None:
    proto = compiled(convolutions, "int8")
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    pairs = [node for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert all((arrays[node.input[1]] > 0).all() for node in pairs)
    assert all(arrays[node.input[2]].dtype == np.int8 and not arrays[node.input[2]].any() for node in pairs)


def test_a_sum_after_a_convolution_has_one_branch_quantized(
    convolutions: Path, compiled: Callable[..., onnx.ModelProto]
) -> None:
    proto = compiled(convolutions, "int8")
    producers = {output: node for node in proto.graph.node for output in node.output}
    (add,) = [node for node in proto.graph.node if node.op_type == "Add"]
    assert sorted(producers[name].op_type for name in add.input) == ["Conv", "DequantizeLinear"]


def test_sums_of_a_transformer_stay_float(tokens: Path, compiled: Callable[..., onnx.ModelProto]) -> None:
    proto = compiled(tokens, "int8")
    dequantized = from_dequantizer(proto)
    sums = [node for node in proto.graph.node if node.op_type == "Add"]
    assert len(sums) > 2
    assert not any(dequantized & set(node.input) for node in sums)


def test_no_output_of_a_layer_is_quantized(convolutions: Path, compiled: Callable[..., onnx.ModelProto]) -> None:
    proto = compiled(convolutions, "int8")
    quantized = {node.input[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    made = {node.output[0] for node in proto.graph.node if node.op_type in WEIGHTED}
    # the low-rank pair: the output of its first convolution is the input of its second
    assert len(quantized & made) == 1


def test_fp16_is_typed_in_the_file_but_for_layer_normalization(
    tokens: Path, compiled: Callable[..., onnx.ModelProto]
) -> None:
    proto = compiled(tokens, "fp16")
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    layers = [node for node in proto.graph.node if node.op_type in WEIGHTED]
    norms = [node for node in proto.graph.node if node.op_type == "LayerNormalization"]
    assert {types[name] for node in layers for name in node.input if name in types} == {TensorProto.FLOAT16}
    assert {types[node.input[1]] for node in norms} == {TensorProto.FLOAT}


def test_metadata_lie_in_the_file(convolutions: Path, compiled: Callable[..., onnx.ModelProto]) -> None:
    assert [(item.key, item.value) for item in compiled(convolutions, "fp32").metadata_props] == [("key", "value")]


def test_a_graph_that_tensorrt_would_refuse_is_not_written(
    tmp_path: Path, board: RuntimeSpec, batches: Batches
) -> None:
    x = onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 4])
    y = onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Det", ["x"], ["y"], "determinant")], "g", [x], [y])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(proto, tmp_path / "in.onnx")
    with pytest.raises(StageError, match="Det determinant: expected an operator that TensorRT's"):
        BACKEND.compile(tmp_path / "in.onnx", board, QuantSpec("fp32"), batches, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_an_artifact_of_onnxruntime_is_not_one_for_tensorrt(
    convolutions: Path, tmp_path: Path, runtime: RuntimeSpec, batches: Batches
) -> None:
    from rowcol_edge.backends.onnxruntime import BACKEND as ONNXRUNTIME

    made = ONNXRUNTIME.compile(convolutions, runtime, QuantSpec("int8"), batches, tmp_path / "out.onnx")
    with pytest.raises(StageError, match="graph for TensorRT"):
        check(onnx.load(made.path))
