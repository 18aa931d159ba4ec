"""Files of every runtime, read back to the layers of the model they were made from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge import models
from rowcol_edge.backends import load_backend, onnx_operators
from rowcol_edge.backends.base import QuantSpec, Source
from rowcol_edge.backends.operators import Operator, OperatorGraph, by_layer, merged, module_of
from rowcol_edge.device.layers import MODEL, Finder, LayerMap
from rowcol_edge.device.runtimes import RuntimeOptions, load_runtime
from rowcol_edge.device.runtimes.base import OperatorRuns
from rowcol_edge.export.onnx import export
from rowcol_edge.export.simplify import simplify

from .conftest import RUNTIME, Batches, smooth

SHAPES = {
    # out values × what each is a sum over
    "stem": 16 * 16 * 16 * 9, "a": 16 * 8 * 8 * 16 * 9, "b": 16 * 8 * 8 * 16 * 9, "down": 8 * 8 * 8 * 16,
    "up": 16 * 8 * 8 * 8, "head": 3 * 16,
}  # fmt: skip
TOKENS = {
    "patch": 32 * 16 * 16, "qkv": 17 * 32 * 96, "proj": 17 * 32 * 16 * 2, "up": 17 * 32 * 64, "down": 17 * 32 * 64,
    "head": 3 * 32,
}  # fmt: skip
ADDED = {"Reorder", "ReorderInput", "ReorderOutput", "Subgraph", "Transpose"}
"""What runtimes put in by themselves, under names that lead nowhere."""
RUNTIMES = ("onnxruntime", "openvino", "tflite")


def compiled(
    name: str, precision: str, network: str, sources: Callable[[Source, str], Path], batches: Batches, out: Path
) -> Path:
    backend = load_backend(name)
    spec = replace(RUNTIME, name=name, precisions=backend.precisions)
    made = backend.compile(
        sources(backend.consumes, network), spec, QuantSpec(precision), batches, out / f"a{backend.suffix}"
    )
    return made.path


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", RUNTIMES)
def test_every_layer_of_a_cnn_is_found_with_its_macs(
    name: str, precision: str, sources: Callable[[Source, str], Path], batches: Batches, tmp_path: Path
) -> None:
    graph = load_backend(name).operators(compiled(name, precision, "convolutions", sources, batches, tmp_path))
    assert graph is not None
    layers, operators = by_layer(graph, SHAPES)
    assert {layer.name: layer.macs for layer in layers if layer.macs} == SHAPES
    assert sum(operator.macs for operator in operators) == sum(SHAPES.values())
    traffic = {layer.name: layer.traffic_bytes for layer in layers}["a"]
    assert traffic is not None
    # 16 channels of 8×8 in and out, 2,304 weights and 16 biases: a byte each where the file says so, and its scales
    values, itemsize = 2 * 16 * 64 + 2304, 4 if precision == "fp32" else 1
    assert values * itemsize < traffic < values * itemsize + 400


@pytest.mark.parametrize("name", RUNTIMES)
def test_parts_of_a_layer_and_what_works_on_its_outputs_count_to_it(
    name: str, sources: Callable[[Source, str], Path], batches: Batches, tmp_path: Path
) -> None:
    graph = load_backend(name).operators(compiled(name, "fp32", "tokens", sources, batches, tmp_path))
    assert graph is not None
    layers, _ = by_layer(graph, TOKENS)
    found = {layer.name: layer.macs for layer in layers}
    assert {key: found[key] for key in TOKENS} == TOKENS  # ``proj`` is two layers of the file
    assert found[MODEL] == 2 * 2 * 17 * 17 * 16  # the products of attention, two heads


@pytest.mark.parametrize("network", ["convolutions", "tokens"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_nearly_all_that_a_runtime_runs_is_known(
    name: str, precision: str, network: str, sources: Callable[[Source, str], Path], batches: Batches, tmp_path: Path
) -> None:
    """By number of operators: their times here are noise. What is not known is what a runtime puts in by itself."""
    path = compiled(name, precision, network, sources, batches, tmp_path)
    graph = load_backend(name).operators(path)
    assert graph is not None
    known = LayerMap(*by_layer(graph, SHAPES if network == "convolutions" else TOKENS))
    found = profiled(name, path, 3)
    assert all(len(operator.runs_ns) == 3 for operator in found)
    find = Finder(known)
    homes = {operator.name: find(operator.origins) for operator in found}
    layers = {known.layers[home.layer].name for home in homes.values() if home and home.layer >= 0}
    wanted = SHAPES if network == "convolutions" else TOKENS
    assert set(wanted) <= layers
    unknown = [operator for operator in found if homes[operator.name] is None]
    added = set(ADDED)
    if any(operator.name == "ScaledDotProductAttention" and operator.kind.startswith("MatMul") for operator in found):
        added |= {"MatMul", "Softmax"}  # without VNNI OpenVINO takes int8 attention apart, and numbers are their names
    assert {operator.kind.split(" ")[0] for operator in unknown} <= added
    assert len(unknown) <= len(found) / 3


def profiled(name: str, path: Path, inferences: int) -> tuple[OperatorRuns, ...]:
    with load_runtime(name).open_profiled(path, RuntimeOptions(threads=1)) as profiler:
        for _ in range(inferences):
            profiler.run({"x": smooth(1, 0)})
        return profiler.operators()


def test_module_of_a_name() -> None:
    names = ("a.0/MatMul_2", "MatMul_2", "a/MatMul/WithoutBiases", "MatMul/3", "MatMulled", "")
    assert [module_of(name, "MatMul") for name in names] == ["a.0", MODEL, "a", "", "", ""]


def graph(*operators: Operator, size: int = 10) -> OperatorGraph:
    names = {name for operator in operators for name in (*operator.inputs, *operator.outputs)}
    return OperatorGraph(operators, dict.fromkeys(names, size), ("x",), (operators[-1].outputs[-1],))


def test_bytes_of_a_layer_are_what_crosses_its_border_and_its_weights() -> None:
    chain = graph(
        Operator("l.0/Conv", "Conv", "l.0", ("x", "w0"), ("inner",), 5),
        Operator("l.1/Conv", "Conv", "l.1", ("inner", "w1"), ("out",), 7),
        Operator("Relu", "Relu", MODEL, ("out",), ("y",)),
    )
    [layer], operators = by_layer(chain, ["l"], {"l": ("project (row)", 8)})
    assert (layer.name, layer.form, layer.rank, layer.macs) == ("l", "project (row)", 8, 12)
    # x, two weights and y, which is its output value by value; ``inner`` stays within
    assert layer.traffic_bytes == 40
    assert [operator.layer for operator in operators] == [0, 0, 0]


def test_constants_that_are_worked_out_count_where_they_are_used_and_as_they_are_stored() -> None:
    found = graph(
        Operator("w_DequantizeLinear", "DequantizeLinear", "", ("w8", "scale"), ("w",)),
        Operator("l/Conv", "Conv", "l", ("x", "w"), ("y",), 5),
        Operator("m/Relu", "Relu", "m", ("y",), ("z",)),
        size=3,
    )
    layers, operators = by_layer(found, [])
    assert [(layer.name, layer.traffic_bytes) for layer in layers] == [("l", 12)]  # x, w8, scale, z
    assert {operator.layer for operator in operators} == {0}


def test_what_the_models_own_code_does_is_its_own_and_what_nothing_is_known_of_has_no_layer() -> None:
    found = graph(
        Operator("l/Conv", "Conv", "l", ("x", "w"), ("y",), 5),
        Operator("Add", "Add", MODEL, ("y", "x"), ("z",)),
        Operator("q", "Transpose", "", ("z",), ("t",)),
        Operator("r", "Softmax", "", ("t",), ("s",)),
    )
    layers, operators = by_layer(found, [])
    assert [layer.name for layer in layers] == ["l", MODEL]
    assert [operator.layer for operator in operators] == [0, 1, 1, -1]


def test_a_size_that_is_not_known_leaves_the_layers_bytes_unknown() -> None:
    found = graph(Operator("l/Conv", "Conv", "l", ("x", "w"), ("y",), 5))
    [layer], _ = by_layer(replace(found, size_bytes={"x": None, "w": 1, "y": 1}), [])
    assert layer.traffic_bytes is None


class Block(nn.Module):
    """A post-norm block as BERT's, with four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(32, 32) for _ in range(4))
        self.norm, self.last = nn.LayerNorm(32), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part(x).unflatten(-1, (4, 8)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = self.norm(x + self.output(attended))
        return self.last(x + self.down(nn.functional.gelu(self.up(x))))


def encoder() -> nn.Module:
    return nn.Sequential(Block(), Block())


def split_up(model: nn.Module) -> nn.Module:
    """The first layer of each FFN as two, of which one has no bias: the form of a factored one."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and opens(layer):
            rank = min(layer.weight.shape) // 2
            parts = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)
            holder, _, last = name.rpartition(".")
            setattr(model.get_submodule(holder), last, nn.Sequential(*parts))
    return model


def opens(layer: nn.Linear) -> bool:
    return layer.in_features < layer.out_features


def simplified(model: nn.Module, shape: tuple[int, ...], precision: str, folder: Path) -> OperatorGraph:
    rng = np.random.default_rng(0)
    [name] = inspect.signature(model.forward).parameters
    feeds = [{name: rng.normal(size=shape).astype(np.float32)} for _ in range(2)]
    export(model.eval(), feeds[0], folder / "whole.onnx", opset=RUNTIME.opset, ir_version=RUNTIME.ir_version)
    source = simplify(folder / "whole.onnx", folder / "simple.onnx")
    assert source.applied, source.reason
    made = load_backend("onnxruntime").compile(
        source.path, RUNTIME, QuantSpec(precision), lambda: iter(feeds), folder / "a.onnx"
    )
    return onnx_operators.operators(made.path)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("network", ["sample:fmnist-vit", "encoder"])
def test_the_products_of_a_simplified_transformer_are_those_of_its_linear_layers(
    network: str, factored: bool, precision: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = encoder() if network == "encoder" else models.load(network).module
    shape, rows = ((1, 9, 32), 9) if network == "encoder" else ((1, 1, 28, 28), 49)
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    found = simplified(split_up(model) if factored else model, shape, precision, tmp_path)
    layers, operators = by_layer(found, linear)
    known = {layer.name: layer.macs for layer in layers if layer.macs}
    assert sum(operator.macs for operator in operators) == sum(known.values())
    assert MODEL not in known
    alone = {name: known.pop(name) for name in linear if name in known}
    for name, macs in known.items():  # what is left are blocks and attentions, which multiply queries with keys
        if "+" in name:  # queries, keys and values
            parent, _, parts = name.rpartition(".")
            members = [f"{parent}.{part}" for part in parts.split("+")]
            assert not alone.keys() & set(members)
            alone |= dict.fromkeys(members, macs // len(members))
    assert alone == {name: macs_of(layer, 1 if name == "head" else rows, factored) for name, layer in linear.items()}


def macs_of(layer: nn.Linear, rows: int, factored: bool) -> int:
    whole = layer.in_features * layer.out_features
    rank = min(layer.in_features, layer.out_features) // 2
    return rows * (rank * (layer.in_features + layer.out_features) if factored and opens(layer) else whole)


def test_layers_that_a_converter_makes_one_stand_together_wherever_they_are_set_side_by_side() -> None:
    one = graph(
        Operator("MatMul_0", "MatMul", "", ("x", "w"), ("y",), 12),
        Operator("Split_1", "Split", "", ("y",), ("y1", "y2")),
        Operator("a.q/Add", "Add", "a.q", ("y1", "b1"), ("q",)),
        Operator("a.k/Add", "Add", "a.k", ("y2", "b2"), ("k",)),
        Operator("a/Mul", "Mul", "a", ("q", "k"), ("z",)),
    )
    without_biases = graph(*one.operators[:2], Operator("a/Mul", "Mul", "a", ("y1", "y2"), ("z",)))
    apart = graph(
        Operator("a.q/MatMul", "MatMul", "a.q", ("x", "w1"), ("q",), 4),
        Operator("a.k/MatMul", "MatMul", "a.k", ("x", "w2"), ("k",), 2),
        Operator("a/Mul", "Mul", "a", ("q", "k"), ("z",)),
    )
    forms = {"a.q": ("project (row)", 2), "a.k": ("project (row)", 4)}
    for together in (one, without_biases):
        groups = merged([apart, together], forms)
        assert groups == (frozenset({"a.q", "a.k"}),)
        for each, macs in ((together, 12), (apart, 6)):
            layers, operators = by_layer(each, forms, forms, groups)
            assert [(layer.name, layer.form, layer.rank, layer.macs) for layer in layers] == [
                ("a.k+q", "project (row)", None, macs), ("a", "dense", None, 0)
            ]  # fmt: skip
            assert operators[-1].layer == 1
    layers, _ = by_layer(apart, forms)
    assert [layer.name for layer in layers] == ["a.q", "a.k", "a"]


def test_a_product_that_nothing_is_known_of_has_no_layer() -> None:
    found = graph(
        Operator("Gemm_0", "Gemm", "", ("x", "w"), ("y",), 4),
        Operator("a/Add", "Add", "a", ("y", "x"), ("z",)),  # a residual: the sum is no bias of a layer
    )
    _, operators = by_layer(found, [])
    assert [operator.layer for operator in operators] == [-1, 0]
    biased = replace(found, operators=(found.operators[0], replace(found.operators[1], inputs=("y", "b"))))
    _, operators = by_layer(biased, [])
    assert [operator.layer for operator in operators] == [0, 0]
