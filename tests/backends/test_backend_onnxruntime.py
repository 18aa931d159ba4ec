from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quant_pre_process
from torch import nn

from rowcol_edge.backends import onnx_gemm
from rowcol_edge.backends.base import QuantSpec
from rowcol_edge.backends.onnxruntime import BACKEND
from rowcol_edge.backends.qdq import kept_float, prepare
from rowcol_edge.backends.weight_only import quantize
from rowcol_edge.backends.weight_types import check_types, weight_types
from rowcol_edge.errors import DataError, StageError
from rowcol_edge.export.onnx import export
from rowcol_edge.targets import RuntimeSpec

from .conftest import smooth

Batches = Callable[[], Iterator[dict[str, np.ndarray]]]
Compile = Callable[..., onnx.ModelProto]

WEIGHT_ONLY = [("int8-weights", "int8"), ("int4-weights", "uint4")]


@pytest.fixture
def compiled(tmp_path: Path, runtime: RuntimeSpec, batches: Batches) -> Compile:
    """The compiled file, read back."""

    def compiled(
        source: Path, precision: str, calibration: Batches | None = batches, **options: bool
    ) -> onnx.ModelProto:
        BACKEND.compile(source, runtime, QuantSpec(precision, **options), calibration, tmp_path / "out.onnx")
        return onnx.load(tmp_path / "out.onnx")

    return compiled


def kernels(proto: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Operators that onnxruntime runs here, after its own fusions."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    # What onnxruntime assumes on Arm only: that int8 activations have kernels.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def weights(proto: onnx.ModelProto) -> list[np.ndarray]:
    """int8 weights of two or more dimensions."""
    arrays = [numpy_helper.to_array(t) for t in proto.graph.initializer if t.data_type == TensorProto.INT8]
    return [array for array in arrays if array.ndim >= 2]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-dynamic"])
def test_versions_are_the_targets_and_only_standard_operators_are_used(
    compiled: Compile, tokens: Path, precision: str
) -> None:
    proto = compiled(tokens, precision)
    assert (proto.ir_version, [(o.domain, o.version) for o in proto.opset_import]) == (9, [("", 18)])
    assert len(proto.metadata_props) == 0
    assert {node.domain for node in proto.graph.node} == {""}
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_layer_normalization_stays_float32_at_fp16(compiled: Compile, tokens: Path) -> None:
    """In float16 the CPU of onnxruntime 1.17 and 1.18 computes it wrongly from the second run on."""
    proto = compiled(tokens, "fp16")
    types = {t.name: t.data_type for t in proto.graph.initializer}
    norms = [node for node in proto.graph.node if node.op_type == "LayerNormalization"]
    assert len(norms) == 2
    assert {types[node.input[1]] for node in norms} == {TensorProto.FLOAT}


@pytest.mark.parametrize("signed", [False, True])
def test_a_convolutional_network_runs_in_int8_without_gaps(
    compiled: Compile, convolutions: Path, tmp_path: Path, signed: bool
) -> None:
    found = kernels(compiled(convolutions, "int8", signed_activations=signed), tmp_path)
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"]) == (5, 1, 1)
    assert found.keys().isdisjoint({"Conv", "FusedConv", "Relu", "Add", "Gemm", "MaxPool"})
    assert found["QuantizeLinear"] <= 2  # the image, and what the float mean gives the head


def test_the_linear_layers_of_a_transformer_run_in_int8_and_its_attention_in_float(
    compiled: Compile, tokens: Path, tmp_path: Path
) -> None:
    proto = compiled(tokens, "int8")
    found = kernels(proto, tmp_path)
    linear = found["QGemm"] + found["QLinearMatMul"] + found["MatMulIntegerToFloat"]
    assert linear == 6
    assert found["Gemm"] + found["FusedGemm"] == 0
    assert found["MatMul"] + found["FusedMatMul"] == 2
    assert found["QLinearAdd"] + found["QLinearSoftmax"] + found["QLinearConcat"] == 0
    assert found["Softmax"] == 1


class Attention(nn.Module):
    """onnxruntime recognises it, and leaves its linear layers to a pass for attention that comes later."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(16), nn.LayerNorm(16)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x.flatten(1, 2))
        query, key, value = (
            layer(x).unflatten(2, (2, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.after(self.out(mixed.transpose(1, 2).flatten(2)) + x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_linear_layers_that_look_like_attention_run_in_int8(
    compiled: Compile, tmp_path: Path, runtime: RuntimeSpec, dynamic: bool
) -> None:
    torch.manual_seed(0)
    model, source = Attention().eval(), tmp_path / "attention.onnx"
    example = {"x": smooth(1, 9)}
    export(model, example, source, opset=runtime.opset, ir_version=runtime.ir_version, dynamic_batch=dynamic)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        yield from ({"x": smooth(1, seed)} for seed in range(8))

    proto = compiled(source, "int8", batches)
    found = kernels(proto, tmp_path)
    assert (found["QGemm"], found["Gemm"] + found["FusedGemm"]) == (4, 0)
    if dynamic:
        example = {"x": np.concatenate([example["x"], smooth(1, 10)])}
    wanted = model(torch.from_numpy(example["x"])).detach().numpy()
    for file, error in ((prepare(source), 1e-5), (proto, 0.05)):
        session = ort.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
        (got,) = session.run(None, example)
        assert np.linalg.norm(got - wanted) <= error * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("sizes", "fused"),
    [((2, 7), True), (("batch", 7), True), ((2, "length"), True), (("batch", "length"), False)],
)
def test_a_linear_layer_with_one_free_size_becomes_a_gemm(sizes: tuple[int | str, int | str], fused: bool) -> None:
    """With two free sizes the rows could not be laid out again."""
    weight, bias = np.arange(12, dtype=np.float32).reshape(4, 3), np.ones(3, np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["product"]), helper.make_node("Add", ["product", "bias"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*sizes, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*sizes, 3])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    onnx_gemm.fuse(graph)
    assert [node.op_type for node in graph.node] == (["Reshape", "Gemm", "Reshape"] if fused else ["MatMul", "Add"])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(2, 7, 4)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight + bias, rtol=1e-5)


def test_no_tensor_has_a_name_that_onnxruntime_gives_when_it_loads_the_file(tmp_path: Path) -> None:
    """It may give one twice, and then refuses the file."""
    weight, bias = np.ones((16, 8), np.float32), np.ones(8, np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["product"]), helper.make_node("Add", ["product", "bias"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 7, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 7, 8])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    source, fused = tmp_path / "linear.onnx", tmp_path / "fused.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), source)
    quant_pre_process(str(source), str(fused), skip_symbolic_shape=True)
    made = [names_of(model.graph, ("gemm_input_", "gemm_output_")) for model in (onnx.load(fused), prepare(source))]
    assert (made[0] != [], made[1]) == (True, [])
    prepared = prepare(source)
    assert [node.op_type for node in prepared.graph.node] == ["Reshape", "Gemm", "Reshape"]
    session = ort.InferenceSession(prepared.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(1, 7, 16)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight + bias, rtol=1e-5)


def names_of(graph: onnx.GraphProto, beginnings: tuple[str, ...]) -> list[str]:
    """Names of initializers and of what nodes take and give that begin so."""
    names = [each.name for each in graph.initializer]
    names += [name for node in graph.node for name in (*node.input, *node.output)]
    return [name for name in names if name.startswith(beginnings)]


def test_reduce_range_keeps_weights_to_seven_bits(compiled: Compile, convolutions: Path) -> None:
    full = weights(compiled(convolutions, "int8"))
    narrow = weights(compiled(convolutions, "int8", reduce_range=True))
    assert len(full) == len(narrow) == 6
    assert max(np.abs(w.astype(int)).max() for w in full) == 127
    assert max(np.abs(w.astype(int)).max() for w in narrow) <= 64


def test_weights_have_a_scale_a_channel(compiled: Compile, convolutions: Path) -> None:
    def shapes(proto: onnx.ModelProto) -> set[tuple[int, ...]]:
        return {tuple(t.dims) for t in proto.graph.initializer if "weight_scale" in t.name}

    assert shapes(compiled(convolutions, "int8")) == {(16,), (8,), (3,)}
    assert shapes(compiled(convolutions, "int8", per_channel=False)) == {()}


def test_activations_are_unsigned_unless_asked(compiled: Compile, convolutions: Path) -> None:
    assert "uint8" in weight_types(compiled(convolutions, "int8"))
    assert "uint8" not in weight_types(compiled(convolutions, "int8", signed_activations=True))


@pytest.mark.parametrize(("precision", "kind"), [("int8-dynamic", "int8"), *WEIGHT_ONLY])
def test_a_precision_of_linear_layers_refuses_a_convolutional_network(
    convolutions: Path, tmp_path: Path, runtime: RuntimeSpec, precision: str, kind: str
) -> None:
    says = rf"{precision} claims: expected 50% of the weights in {kind}, got .*convolutions.* – use int8 for"
    with pytest.raises(StageError, match=says):
        BACKEND.compile(convolutions, runtime, QuantSpec(precision), None, tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_calibration_holds_one_batch_at_a_time(tokens: Path, compiled: Compile) -> None:
    alive: list[int] = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        made: list[weakref.ref[np.ndarray]] = []
        for i in range(6):
            array = np.full((4, 1, 16, 16), i / 6, np.float32)
            made.append(weakref.ref(array))
            yield {"x": array}
            del array
            alive.append(sum(ref() is not None for ref in made))

    compiled(tokens, "int8", batches)
    assert len(alive) == 6
    assert max(alive) <= 1


def test_ranges_cover_every_batch_and_every_sample(compiled: Compile, convolutions: Path) -> None:
    """The file takes one sample at a time; the batches hold two and three, and the extremes sit in the last samples."""

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for size, extreme in [(2, -3.0), (3, 5.0)]:
            array = np.zeros((size, 1, 16, 16), np.float32)
            array[-1] = extreme
            yield {"x": array}

    constants = {t.name: numpy_helper.to_array(t) for t in compiled(convolutions, "int8", batches).graph.initializer}
    scale, zero_point = constants["x_scale"], int(constants["x_zero_point"])
    assert scale == pytest.approx(8 / 255)
    assert zero_point == round(3 / (8 / 255))


def image(**changes: object) -> dict[str, np.ndarray]:
    array = np.zeros((1, 1, 16, 16), np.float32)
    array[0, 0, 3, 3] = float(changes.pop("pixel", 0.0))  # type: ignore[arg-type]
    return {"x": array}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": np.zeros((1, 1, 16, 16), np.float32)}, "calibration batch 1: expected inputs x, got image"),
        (image() | {"more": np.zeros(1, np.float32)}, "expected inputs x, got x, more"),
        ({"x": np.zeros((1, 1, 16, 16), np.float64)}, "input 'x': expected float32, got float64"),
        ({"x": np.zeros((1, 3, 16, 16), np.float32)}, r"expected shape \?×1×16×16, got 1×3×16×16"),
        (image(pixel=float("nan")), "expected finite values, got NaN or infinity"),
        (image(pixel=float("inf")), "expected finite values, got NaN or infinity"),
    ],
)
def test_calibration_that_does_not_fit_is_bad_input_and_nothing_is_written(
    tokens: Path, tmp_path: Path, runtime: RuntimeSpec, batch: dict[str, np.ndarray], message: str
) -> None:
    def batches() -> Iterator[dict[str, np.ndarray]]:
        yield from (image(), batch)

    with pytest.raises(DataError, match=message):
        BACKEND.compile(tokens, runtime, QuantSpec("int8"), batches, tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("network", ["convolutions", "tokens"])
def test_calibration_without_a_sample_is_bad_input(
    network: str, request: pytest.FixtureRequest, tmp_path: Path, runtime: RuntimeSpec
) -> None:
    source = request.getfixturevalue(network)
    for batches in ([], [{"x": np.zeros((0, 1, 16, 16), np.float32)}]):
        with pytest.raises(DataError, match="expected at least one sample, got none"):
            BACKEND.compile(source, runtime, QuantSpec("int8"), lambda b=batches: iter(b), tmp_path / "out.onnx")


def test_activations_that_overflow_on_the_calibration_data_are_an_error(
    tokens: Path, tmp_path: Path, runtime: RuntimeSpec
) -> None:
    huge = {"x": np.full((1, 1, 16, 16), 3e38, np.float32)}
    with pytest.raises(StageError, match="calibration: expected finite activations"):
        BACKEND.compile(tokens, runtime, QuantSpec("int8"), lambda: iter([image(), huge]), tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_scores_with_a_mask_of_infinities_stay_float(tmp_path: Path, runtime: RuntimeSpec) -> None:
    """As in attention that looks back only: sum and softmax are float, the product before it is int8."""
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    weight = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["scores"], name="product"),
        helper.make_node("Add", ["scores", "mask"], ["masked"], name="masking"),
        helper.make_node("Softmax", ["masked"], ["shares"], name="softmax", axis=-1),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, 4]) for name in ("x", "shares")]
    constants = [numpy_helper.from_array(mask, "mask"), numpy_helper.from_array(weight, "weight")]
    graph = helper.make_graph(nodes, "attention", ports[:1], ports[1:], constants)
    source = tmp_path / "attention.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", runtime.opset)], ir_version=10), source)
    x = np.random.default_rng(1).normal(size=(8, 4, 4)).astype(np.float32)
    BACKEND.compile(source, runtime, QuantSpec("int8"), lambda: iter([{"x": x}]), tmp_path / "out.onnx")
    wanted, got = (ort.InferenceSession(path).run(None, {"x": x})[0] for path in (source, tmp_path / "out.onnx"))
    assert weights(onnx.load(tmp_path / "out.onnx"))
    assert not np.triu(got, 1).any()
    np.testing.assert_allclose(got, wanted, atol=0.05)


def test_another_opset_than_the_targets_is_an_error(tokens: Path, tmp_path: Path, runtime: RuntimeSpec) -> None:
    with pytest.raises(StageError, match="compile fp32: expected a model at opset 17, got one at opset 18"):
        BACKEND.compile(tokens, replace(runtime, opset=17), QuantSpec("fp32"), None, tmp_path / "out.onnx")


@pytest.mark.parametrize("precision", [precision for precision, _ in WEIGHT_ONLY])
def test_weight_only_takes_every_linear_layer_and_leaves_activations_float(
    compiled: Compile, tokens: Path, precision: str
) -> None:
    proto = compiled(tokens, precision, None)
    assert (proto.ir_version, [(o.domain, o.version) for o in proto.opset_import]) == (
        9,
        [("", 18), ("com.microsoft", 1)],
    )
    found = Counter(node.op_type for node in proto.graph.node)
    assert (found["MatMulNBits"], found["Gemm"], found["MatMul"], found["Conv"]) == (6, 0, 2, 1)
    assert "accuracy_level" not in {a.name for n in proto.graph.node for a in n.attribute}
    weights = {t.name: t for t in proto.graph.initializer}
    assert (
        max(t.dims[0] * t.dims[1] for t in weights.values() if t.data_type == TensorProto.FLOAT and len(t.dims) == 2)
        < 16 * 16
    )


def test_what_a_precision_needs_of_the_runtime_is_said(tokens: Path, tmp_path: Path, runtime: RuntimeSpec) -> None:
    oldest = {
        precision: BACKEND.compile(tokens, runtime, QuantSpec(precision), None, tmp_path / "out.onnx").oldest
        for precision in ("fp32", "int8-weights", "int4-weights")
    }
    assert oldest == {"fp32": "", "int8-weights": "1.23.0", "int4-weights": ""}


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.15)])
def test_gemms_in_every_form_are_taken_and_a_shared_weight_is_stored_once(bits: int, error: float) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "upright": rng.normal(size=(40, 24)), "lying": rng.normal(size=(24, 40)), "bias": rng.normal(size=24),
        "scaled": rng.normal(size=(24, 8)),
    }  # fmt: skip
    nodes = [
        helper.make_node("Gemm", ["x", "lying", "bias"], ["a"], name="a", transB=1),
        helper.make_node("Gemm", ["x", "lying"], ["b"], name="b", transB=1),
        helper.make_node("Gemm", ["x", "upright", "bias"], ["c"], name="c"),
        helper.make_node("Sum", ["a", "b", "c"], ["sum"]),
        helper.make_node("Gemm", ["sum", "scaled"], ["y"], name="y", alpha=0.5),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 8])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )  # fmt: skip
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    x = rng.normal(size=(3, 40)).astype(np.float32)
    expected = ort.InferenceSession(source.SerializeToString()).run(None, {"x": x})[0]
    made = quantize(source, bits)
    onnx.checker.check_model(made, full_check=True)
    assert Counter(n.op_type for n in made.graph.node)["MatMulNBits"] == 3
    assert len({t.name for t in made.graph.initializer}) == len(made.graph.initializer)
    assert {"lying", "upright", "lying_transposed"}.isdisjoint(t.name for t in made.graph.initializer)
    got = ort.InferenceSession(made.SerializeToString()).run(None, {"x": x})[0]
    assert np.linalg.norm(got - expected) <= error * np.linalg.norm(expected)


def linear(dtype: type, operator: str = "MatMul") -> onnx.ModelProto:
    """One layer whose weight has the given type."""
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.zeros((4, 4), dtype), "w"), numpy_helper.from_array(np.zeros(3, np.float32), "b")],
    )
    return helper.make_model(graph)


def test_a_claim_that_the_file_does_not_hold_is_refused(compiled: Compile, tokens: Path) -> None:
    made = {precision: compiled(tokens, precision) for precision in BACKEND.precisions}
    for claimed in made:
        for actual, proto in made.items():
            if claimed == actual:
                check_types(proto, claimed)
            else:
                with pytest.raises(StageError, match=f"does not hold what {claimed} claims"):
                    check_types(proto, claimed)


def test_weight_types_count_bytes() -> None:
    assert weight_types(linear(np.float16)) == {"float16": 32, "float32": 12}
    with pytest.raises(StageError, match=r"95% of the floating constants in float16, got 84\.2%"):
        check_types(linear(np.float16), "fp16")
    with pytest.raises(StageError, match="expected float32 weights and no quantizer, got float16"):
        check_types(linear(np.float16), "fp32")
    check_types(linear(np.float32), "fp32")


def test_joins_are_int8_only_between_feature_maps() -> None:
    def node(operator: str, inputs: list[str], output: str) -> onnx.NodeProto:
        return helper.make_node(operator, inputs, [output], name=output)

    nodes = [
        node("Conv", ["x", "w"], "conv"),
        node("Relu", ["conv"], "relu"),
        node("Add", ["conv", "relu"], "residual"),
        node("Concat", ["residual", "relu"], "joined"),
        node("Reshape", ["joined", "shape"], "tokens"),
        node("Concat", ["tokens", "cls"], "sequence"),
        node("Add", ["sequence", "position"], "positioned"),
        node("MatMul", ["positioned", "w"], "linear"),
        node("MatMul", ["linear", "positioned"], "attention"),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [numpy_helper.from_array(np.ones((2, 2), np.float32), "w")])
    assert kept_float(graph) == ["sequence", "positioned", "attention"]


def stack(where: Path, runtime: RuntimeSpec) -> Path:
    """A matrix for each of three places behind a linear layer: (N, 64) @ (64, 12) as (3, N, 4) @ (3, 4, 5)."""
    rng = np.random.default_rng(0)
    arrays = {
        "linear.weight": rng.normal(size=(64, 12)).astype(np.float32),
        "places.weight": rng.normal(size=(3, 4, 5)).astype(np.float32),
        "shape": np.array([-1, 3, 4]),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "linear.weight"], ["h"], name="linear"),
        helper.make_node("Reshape", ["h", "shape"], ["r"], name="reshape"),
        helper.make_node("Transpose", ["r"], ["t"], name="transpose", perm=[1, 0, 2]),
        helper.make_node("MatMul", ["t", "places.weight"], ["y"], name="places"),
    ]
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, "batch", 5])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opset, ir = runtime.onnx()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir), where)
    return where


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic"])
def test_a_stack_of_matrices_stays_float_and_runs(precision: str, tmp_path: Path, runtime: RuntimeSpec) -> None:
    """onnxruntime's int8 product refuses the scales of several matrices when it runs, not when it loads."""
    x = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    source, out = stack(tmp_path / "stack.onnx", runtime), tmp_path / "out.onnx"
    BACKEND.compile(source, runtime, QuantSpec(precision), lambda: iter([{"x": x}]), out)
    got, exact = (ort.InferenceSession(path).run(None, {"x": x})[0] for path in (out, source))
    assert np.linalg.norm(got - exact) < 0.05 * np.linalg.norm(exact)
    assert [array.shape for array in weights(onnx.load(out))] == [(64, 12)]
