"""Each rule on a hand-made graph that breaks it and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from rowcol_edge.backends.tensorrt_graph import OPERATORS, check
from rowcol_edge.errors import StageError

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])
WEIGHT = np.random.default_rng(0).integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)


def model(
    nodes: Sequence[NodeProto], *, opset: int = 18, x: onnx.ValueInfoProto = X, **constants: np.ndarray
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [x],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch"])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def quantized(**changes: np.ndarray | None) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    """x and a weight through Q/DQ into a convolution with a float bias; `changes` replace constants, None removes."""
    constants: dict[str, np.ndarray | None] = {
        "xs": np.float32(0.1), "xz": np.int8(0), "w": WEIGHT, "ws": np.full(4, 0.01, np.float32),
        "wz": np.zeros(4, np.int8), "b": np.zeros(4, np.float32), **changes,
    }  # fmt: skip
    left = {name: np.asarray(array) for name, array in constants.items() if array is not None}

    def inputs(*names: str) -> list[str]:
        return [name for name in names if name in left or name in ("x", "xq")]

    nodes = [
        helper.make_node("QuantizeLinear", inputs("x", "xs", "xz"), ["xq"], "q"),
        helper.make_node("DequantizeLinear", inputs("xq", "xs", "xz"), ["xd"], "dq"),
        helper.make_node("DequantizeLinear", inputs("w", "ws", "wz"), ["wd"], "dqw", axis=0),
        helper.make_node("Conv", ["xd", "wd", "b"], ["y"], "conv"),
    ]
    return nodes, left


def refused(proto: onnx.ModelProto, message: str) -> None:
    with pytest.raises(StageError, match=message):
        check(proto)


def test_a_good_graph_passes() -> None:
    nodes, constants = quantized()
    check(model(nodes, **constants))
    nodes, constants = quantized(w=WEIGHT[:1], ws=np.float32(0.01), wz=np.int8(0), b=np.zeros(1, np.float32))
    check(model(nodes, **constants))  # a single output channel


@pytest.mark.parametrize("opset", [8, 21])
def test_the_opset_must_be_one_its_parser_has(opset: int) -> None:
    refused(model([helper.make_node("Relu", ["x"], ["y"])], opset=opset), rf"opset: expected 9 to 20, got {opset}")


@pytest.mark.parametrize("shape", [["batch", 3, "height", 8], [1, 3, "height", 8]])
def test_only_the_batch_may_be_free(shape: list[str | int]) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    refused(model([helper.make_node("Relu", ["x"], ["y"])], x=x), "input x: expected only its first size.* got axis 2")


def test_a_port_of_unknown_rank_or_type_is_named() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    refused(model([helper.make_node("Relu", ["x"], ["y"])], x=x), "input x: .* got no shape")
    x = helper.make_tensor_value_info("x", TensorProto.DOUBLE, [1])
    refused(model([helper.make_node("Relu", ["x"], ["y"])], x=x), "input x: expected float32.* got float64")


def test_uint8_may_come_in_and_be_cast() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 8, 8, 3])
    check(model([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)], x=x))
    turned = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["t"], ["y"], to=TensorProto.FLOAT),
    ]
    refused(model(turned, x=x), "input x: expected uint8 to be cast before anything else, got read by Transpose")


def test_an_operator_it_does_not_have_is_named() -> None:
    refused(model([helper.make_node("Det", ["x"], ["y"], "odd")]), "Det odd: expected an operator that TensorRT's")
    refused(model([helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])]), "got DynamicQuantizeLinear")
    foreign = helper.make_node("FusedConv", ["x"], ["y"], "f", domain="com.microsoft")
    refused(model([foreign]), r"FusedConv f: .* got com\.microsoft\.FusedConv")
    assert "QLinearConv" not in OPERATORS


def test_operators_inside_a_branch_are_checked() -> None:
    branch = helper.make_graph(
        [helper.make_node("Det", ["x"], ["t"], "inner")],
        "b",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    node = helper.make_node("If", ["c"], ["y"], "choice", then_branch=branch, else_branch=branch)
    refused(model([node], c=np.bool_(True)), "Det inner")


@pytest.mark.parametrize("op", ["MaxPool", "LayerNormalization"])
def test_only_the_first_output_is_there(op: str) -> None:
    refused(
        model([helper.make_node(op, ["x", "s"], ["y", "more"], "n")], s=np.ones(8, np.float32)),
        f"{op} n: .*first output",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"xz": np.int8(3)}, r"QuantizeLinear q: expected zero points 0 \(symmetric\), got 3"),
        ({"xz": np.uint8(128)}, "QuantizeLinear q: expected int8, got uint8"),
        ({"xz": None}, "QuantizeLinear q: expected an int8 zero point.* got none: uint8"),
        ({"wz": np.array([0, 0, -7, 0], np.int8)}, "DequantizeLinear dqw: expected zero points 0.* got -7"),
        ({"w": WEIGHT.view(np.uint8), "wz": None}, "DequantizeLinear dqw: expected int8, got uint8"),
        ({"w": WEIGHT.view(np.uint8), "wz": np.zeros(4, np.uint8)}, "DequantizeLinear dqw: expected int8, got uint8"),
        ({"xs": np.float32(0)}, "QuantizeLinear q: expected scales > 0, got 0"),
        ({"ws": np.array([1, np.nan, 1, 1], np.float32)}, "DequantizeLinear dqw: expected scales > 0, got nan"),
        (
            {"xs": np.full(3, 0.1, np.float32), "xz": np.zeros(3, np.int8)},
            "QuantizeLinear q: expected one scale for an activation, got 3 scales on x",
        ),
    ],
)  # fmt: skip
def test_quantizers_are_symmetric_int8_with_constant_scales(
    changes: dict[str, np.ndarray | None], message: str
) -> None:
    nodes, constants = quantized(**changes)
    refused(model(nodes, **constants), message)


def test_a_calculated_scale_or_zero_point_is_refused() -> None:
    nodes, constants = quantized()
    nodes.insert(0, helper.make_node("Relu", ["scale"], ["xs"]))
    constants["scale"] = constants.pop("xs")
    refused(model(nodes, **constants), "QuantizeLinear q: expected a constant scale, got one calculated as xs")
    nodes, constants = quantized()
    nodes.insert(0, helper.make_node("Identity", ["zero"], ["xz"]))
    constants["zero"] = constants.pop("xz")
    refused(model(nodes, **constants), "QuantizeLinear q: expected a constant zero point")


def test_weights_have_a_scale_an_output_channel() -> None:
    nodes, constants = quantized(ws=np.full(3, 0.01, np.float32), wz=np.zeros(3, np.int8))
    nodes[2].attribute[0].i = 1
    refused(
        model(nodes, **constants), r"DequantizeLinear dqw: expected a scale an output channel \(axis 0\), got axis 1"
    )
    nodes, constants = quantized(ws=np.float32(0.01), wz=np.int8(0))
    refused(model(nodes, **constants), r"dqw: expected a scale an output channel \(axis 0\), got 1 for 4")


@pytest.mark.parametrize(("op", "attributes", "axis"), [("MatMul", {}, 1), ("Gemm", {}, 1), ("Gemm", {"transB": 1}, 0)])
def test_the_output_channels_of_a_linear_layer(op: str, attributes: dict[str, int], axis: int) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5])
    constants = {
        "xs": np.float32(0.1), "xz": np.int8(0), "w": np.ones((5, 5), np.int8),
        "ws": np.full(5, 0.1, np.float32), "wz": np.zeros(5, np.int8),
    }  # fmt: skip

    def linear(given: int) -> onnx.ModelProto:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "dqw", axis=given),
            helper.make_node(op, ["xd", "wd"], ["y"], "linear", **attributes),
        ]
        return model(nodes, x=x, **{name: np.asarray(array) for name, array in constants.items()})

    check(linear(axis))
    refused(linear(1 - axis), rf"DequantizeLinear dqw: .*\(axis {axis}\), got axis {1 - axis}")


def test_a_quantized_weight_alone_would_run_in_float() -> None:
    nodes, constants = quantized()
    nodes[3].input[0] = "x"
    refused(model(nodes, **constants), "Conv conv: expected an activation that is quantized .* got x is not")


def test_a_layer_may_be_kept_in_float() -> None:
    nodes, constants = quantized()
    nodes[3].input[1] = "w"
    constants["w"] = WEIGHT.astype(np.float32)
    del nodes[2]
    check(model(nodes, **constants))


def test_a_quantized_bias_is_refused() -> None:
    nodes, constants = quantized(b=np.zeros(4, np.int8), bs=np.float32(0.1), bz=np.int8(0))
    nodes.insert(3, helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], "dqb"))
    nodes[4].input[2] = "bd"
    refused(model(nodes, **constants), "Conv conv: expected a bias that is not quantized, got DequantizeLinear dqb")


def test_a_bias_added_after_a_product_counts_as_one() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "product"),
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], "dqb"),
        helper.make_node("Add", ["m", "bd"], ["y"], "sum"),
    ]
    constants = {"w": np.ones((5, 4), np.float32), "b": np.zeros(4, np.int8), "bs": np.float32(1), "bz": np.int8(0)}
    refused(
        model(nodes, x=x, **{k: np.asarray(v) for k, v in constants.items()}), "Add sum: expected a bias that is not"
    )
