"""The memory of activations by the graph: by hand on small ones, and of what the backends make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper, numpy_helper
from openvino import opset8 as ops

from rowcol_edge.backends import (
    BACKENDS,
    load_backend,
    onnx_liveness,
    openvino_liveness,
    tflite_files,
    tflite_liveness,
    tflite_metadata,
)
from rowcol_edge.backends.base import QuantSpec, Source
from rowcol_edge.backends.liveness import Step, peak_bytes
from rowcol_edge.targets import RuntimeSpec

from .conftest import Batches

CHAIN = (Step(("x", "w"), ("a",)), Step(("a",), ("b",)), Step(("b",), ("c",)))


def test_a_chain_holds_two_neighbours_at_a_time() -> None:
    sizes = {"x": 1, "a": 10, "b": 20, "c": 5}
    assert peak_bytes(CHAIN, sizes, ["x"], ["c"]) == 30
    assert peak_bytes(CHAIN[:1], sizes, ["x"], ["a"]) == 11


def test_a_skip_connection_keeps_what_it_carries() -> None:
    skipped = (*CHAIN[:2], Step(("b",), ("c",)), Step(("c", "a"), ("y",)))
    assert peak_bytes(skipped, {"x": 1, "a": 10, "b": 20, "c": 20, "y": 10}, ["x"], ["y"]) == 50
    in_order = (*CHAIN, Step(("c",), ("y",)))
    assert peak_bytes(in_order, {"x": 1, "a": 10, "b": 20, "c": 20, "y": 10}, ["x"], ["y"]) == 40


def test_an_output_stays_to_the_end_and_what_nobody_reads_goes_at_once() -> None:
    steps = (Step(("x",), ("kept", "unread")), Step(("x",), ("b",)), Step(("b",), ("c",)))
    sizes = {"x": 1, "kept": 100, "unread": 50, "b": 20, "c": 30}
    assert peak_bytes(steps, sizes, ["x"], ["c", "kept"]) == 151
    assert peak_bytes(steps, {**sizes, "unread": 1}, ["x"], ["c", "kept"]) == 150


def test_a_view_takes_nothing_and_keeps_what_it_looks_at() -> None:
    steps = (
        Step(("x",), ("a",)),
        Step(("a",), ("view",), shares=True),
        Step(("x",), ("b",)),
        Step(("view", "b"), ("y",)),
    )
    assert peak_bytes(steps, {"x": 1, "a": 10, "b": 10, "y": 10}, ["x"], ["y"]) == 30


def test_what_constants_make_is_a_constant() -> None:
    steps = (Step(("w",), ("wide",)), Step((), ("made",)), Step(("x", "wide", "made"), ("y",)))
    assert peak_bytes(steps, {"x": 1, "y": 2}, ["x"], ["y"]) == 3


def test_one_unknown_size_makes_the_peak_unknown() -> None:
    assert peak_bytes(CHAIN, {"x": 1, "a": None, "b": 20, "c": 5}, ["x"], ["c"]) is None
    assert peak_bytes(CHAIN, {"x": 1, "a": 10, "b": 20}, ["x"], ["c"]) is None


def save(path: Path, nodes: list[onnx.NodeProto], batch: int | str = "N", domain: str = "") -> Path:
    """``x`` of 8 floats a sample to ``y``; constants: a scale, a zero point, a shape."""
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, None])],
        [
            numpy_helper.from_array(np.ones((8, 16), np.float32), "w"),
            numpy_helper.from_array(np.float32(0.5), "s"),
            numpy_helper.from_array(np.uint8(3), "z"),
            numpy_helper.from_array(np.array([-1, 4, 4]), "shape"),
        ],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=9), path)
    return path


def node(kind: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def test_an_onnx_file_with_a_free_batch(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "a"), node("Reshape", "a shape", "b"), node("Relu", "b", "y")]
    for batch in ("N", 1):
        assert onnx_liveness.activation_bytes(save(tmp_path / "m.onnx", nodes, batch)) == 16 * 4 + 16 * 4
    assert onnx_liveness.activation_bytes(save(tmp_path / "m.onnx", nodes, 3)) == 3 * 128


def test_onnx_quantizers_are_fused(tmp_path: Path) -> None:
    nodes = [
        node("QuantizeLinear", "x s z", "xq"),
        node("DequantizeLinear", "xq s z", "xf"),
        node("MatMul", "xf w", "a"),
        node("QuantizeLinear", "a s z", "aq"),
        node("DequantizeLinear", "aq s z", "af"),
        node("Relu", "af", "b"),
        node("QuantizeLinear", "b s z", "bq"),
        node("DequantizeLinear", "bq s z", "y"),
    ]
    # the last is made for the caller: 16 bytes, and as floats; before that no two are larger
    assert onnx_liveness.activation_bytes(save(tmp_path / "m.onnx", nodes)) == 16 + 64


def test_an_operator_that_onnx_does_not_know_leaves_the_peak_unknown(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "a"), node("Gelu", "a", "b", domain="com.microsoft"), node("Relu", "b", "y")]
    assert onnx_liveness.activation_bytes(save(tmp_path / "m.onnx", nodes)) is None


@pytest.mark.parametrize("batch", [1, -1])
def test_an_ir(tmp_path: Path, batch: int) -> None:
    x = ops.parameter([batch, 8], np.float32, "x")
    a = ops.matmul(x, ops.constant(np.ones((8, 16), np.float32)), False, False)
    bounds = [ops.constant(np.float32(value)) for value in (-1, 1, -1, 1)]
    b = ops.fake_quantize(a, *bounds, levels=256)
    y = ops.relu(ops.reshape(b, ops.constant(np.array([-1, 4, 4])), False))
    ov.save_model(ov.Model([y], [x], "m"), tmp_path / "m.xml", compress_to_fp16=False)
    # a byte a value of the quantized one, beside the output
    assert openvino_liveness.activation_bytes(tmp_path / "m.xml") == 16 + 16 * 4


def test_an_ir_that_takes_no_single_sample(tmp_path: Path) -> None:
    x = ops.parameter([-1, 8], np.float32, "x")
    y = ops.relu(ops.reshape(x, ops.constant(np.array([3, 8])), False))
    ov.save_model(ov.Model([y], [x], "m"), tmp_path / "m.xml", compress_to_fp16=False)
    assert openvino_liveness.activation_bytes(tmp_path / "m.xml") is None


def test_a_tflite_file(tmp_path: Path) -> None:
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.operatorCodes, graph.operators = [], []
    for kind, given, made in ((schema.BuiltinOperator.NEG, 0, 1), (schema.BuiltinOperator.RESHAPE, 1, 2),
                              (schema.BuiltinOperator.NEG, 2, 3)):  # fmt: skip
        operator = schema.OperatorT()
        operator.opcodeIndex = tflite_files.opcode(model, kind)
        operator.inputs, operator.outputs = [given], [made]
        graph.operators.append(operator)
    graph.tensors = [schema.TensorT() for _ in range(4)]
    for place, tensor in enumerate(graph.tensors):
        tensor.name, tensor.shape, tensor.type = str(place).encode(), [1, 2, 5], schema.TensorType.FLOAT32
    graph.inputs, graph.outputs = [0], [3]
    model.version, model.subgraphs, model.buffers = 3, [graph], [schema.BufferT()]
    (tmp_path / "m.tflite").write_bytes(tflite_metadata.attached(tflite_files.packed(model), {}))
    assert tflite_liveness.activation_bytes(tmp_path / "m.tflite") == 2 * 40
    graph.tensors[1].type = schema.TensorType.INT8
    graph.tensors[2].type = schema.TensorType.INT8
    (tmp_path / "m.tflite").write_bytes(tflite_metadata.attached(tflite_files.packed(model), {}))
    assert tflite_liveness.activation_bytes(tmp_path / "m.tflite") == 10 + 40


@pytest.mark.parametrize("network", ["convolutions", "tokens"])
def test_backends_agree_on_a_float_network_and_int8_takes_no_more(
    network: str, sources: Callable[[Source, str], Path], tmp_path: Path, runtime: RuntimeSpec, batches: Batches
) -> None:
    found: dict[str, dict[str, int | None]] = {"fp32": {}, "int8": {}}
    for name in sorted(BACKENDS):
        backend = load_backend(name)
        for precision, of_precision in found.items():
            source, out = sources(backend.consumes, network), tmp_path / f"{name}-{precision}{backend.suffix}"
            made = backend.compile(source, runtime, QuantSpec(precision), batches, out)
            of_precision[name] = backend.activation_bytes(made.path)
    sizes = [size for of_precision in found.values() for size in of_precision.values() if size is not None]
    assert len(sizes) == 2 * len(BACKENDS)
    fp32 = found["fp32"]
    assert fp32["onnxruntime"] == fp32["tensorrt"] == fp32["openvino"]
    # the one format whose operators hold their ReLU: without it the larger of two equal neighbours is left
    assert sizes[0] / 2 <= sizes[list(fp32).index("tflite")] <= sizes[0]
    assert all(0 < narrow <= wide for narrow, wide in zip(sizes[len(BACKENDS) :], sizes, strict=False))
