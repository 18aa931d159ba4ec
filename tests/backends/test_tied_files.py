"""A tied weight is stored once in a runtime's file, and calculates what it did."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from rowcol_edge import evaluation, models, targets
from rowcol_edge.backends import BACKENDS, load_backend
from rowcol_edge.backends.base import QuantSpec, Source
from rowcol_edge.backends.tensorrt_qdq import WEIGHTED
from rowcol_edge.device.runtimes import RuntimeOptions
from rowcol_edge.export import capture
from rowcol_edge.export.simplify import simplify
from rowcol_edge.factoring.halvit import TiedStage, VisionTransformer
from rowcol_edge.factoring.tied_kernels import TiedKernels
from rowcol_edge.factoring.ties import TiedFeedForward
from rowcol_edge.targets import RuntimeSpec

from .conftest import RUNTIME, write_source

TARGET = targets.load("generic-x86")
PRECISIONS = {"fp32": 1e-4, "fp16": 5e-3, "int8": 0.1}
TFLITE_ONLY = [("transformer", "fp32", 4), ("stage", "int8", 4), ("stage", "int8-io", 1), ("stage", "int8-dynamic", 1)]


def uneven_norms(model: nn.Module) -> None:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            norm.weight.data[::3] *= -1
            nn.init.normal_(norm.bias, 0.0, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)


def as_trained(model: VisionTransformer) -> VisionTransformer:
    """With biases and uneven norms, of which files have more than of zeros and ones."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0.0, 0.1)
        elif "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.1)
    return model


class Stage(nn.Module):
    """Bottlenecks that share a matrix, with norms in front of and behind it, some of whose scales are negative."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 2, 1)
        self.stage = TiedStage(64, 32, 3)
        self.head = nn.Linear(128, 5)
        uneven_norms(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stage(torch.relu(self.stem(x))).mean((2, 3)))


class WideHead(Stage):
    """Beside whose classifier the shared matrix takes few bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(128, 2000)


class PlainStage(Stage):
    """Norms as they are at first: once folded they leave biases of zeros."""

    def __init__(self) -> None:
        super().__init__()
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_parameters()


class PositiveStage(Stage):
    """Norms whose scales are positive, as training mostly leaves them."""

    def __init__(self) -> None:
        super().__init__()
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.data.abs_()


class Pair(nn.Module):
    """One matrix, turned with a norm behind it, and a classifier beside which it takes few bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, 32, 1, 1) / 8)
        self.norm, self.head = nn.BatchNorm2d(32), nn.Linear(32, 4000)
        uneven_norms(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(torch.nn.functional.conv2d(x, self.weight))
        x = self.norm(torch.nn.functional.conv2d(x, self.weight.transpose(0, 1)))
        return self.head(torch.relu(x).mean((2, 3)))


class Kernels(nn.Module):
    """Pairs of 3×3 convolutions that share a kernel, a square one too, with norms in between and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, 2, 1)
        layers = [part for hidden in (64, 48) for part in (self._pair(hidden), nn.BatchNorm2d(48), nn.ReLU())]
        self.pairs = nn.Sequential(*layers)
        self.head = nn.Linear(48, 5)
        uneven_norms(self)

    @staticmethod
    def _pair(hidden: int) -> TiedKernels:
        return TiedKernels(torch.randn(hidden, 48, 3, 3) / 20, nn.Sequential(nn.BatchNorm2d(hidden), nn.ReLU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pairs(torch.relu(self.stem(x))).mean((2, 3)))


class Features(nn.Module):
    """A tied FFN on two axes, where layers become Gemm: both uses may read one constant as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.feed_forward = TiedFeedForward(48, 192, torch.relu)
        self.head = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.feed_forward(x.mean((2,)).flatten(1)))


def transformer() -> VisionTransformer:
    return as_trained(VisionTransformer(width=64, hidden=256, heads=4, depth=2, classes=5, image=32))


NETWORKS = {
    "transformer": transformer,
    "stage": Stage,
    "plain stage": PlainStage,
    "positive stage": PositiveStage,
    "wide head": WideHead,
    "pair": Pair,
    "features": Features,
    "kernels": Kernels,
}
SHAPES = {
    "transformer": (3, 32, 32), "stage": (3, 32, 32), "plain stage": (3, 32, 32),
    "positive stage": (3, 32, 32), "wide head": (3, 32, 32), "pair": (32, 8, 8), "features": (3, 7, 16),
    "kernels": (3, 32, 32),
}  # fmt: skip


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def pictures(name: str, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *SHAPES[name])).astype(np.float32)


def _runtime(backend: str) -> RuntimeSpec:
    """The ONNX files here are at the opset of `RUNTIME`."""
    return RUNTIME if load_backend(backend).consumes is Source.ONNX else TARGET.runtime(backend)


def stored(model: nn.Module, backend: str) -> list[torch.Tensor]:
    """The parameters that a file holds: TFLite has no operator that reads a kernel transposed."""
    twice = [layer.weight for layer in model.modules() if isinstance(layer, TiedKernels) and backend == "tflite"]
    return [*model.parameters(), *twice]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[Source, str, int], Path] = {}

    def get(consumes: Source, name: str, samples: int = 1) -> Path:
        if (consumes, name, samples) not in made:
            folder = tmp_path_factory.mktemp(name)
            path = write_source(consumes, network(name), {"x": pictures(name, samples, 0)}, folder)
            if consumes is Source.ONNX:
                simplified = simplify(path, folder / "simplified.onnx")
                assert simplified.applied, simplified.reason
                path = simplified.path
            made[consumes, name, samples] = path
        return made[consumes, name, samples]

    return get


def _kept_once() -> Iterator[tuple[str, str, str, int]]:
    """Two of the networks differ from the stage in files for TFLite only, the others at fp16 in none."""
    for backend, name, precision in itertools.product(BACKENDS, NETWORKS, PRECISIONS):
        if backend == "tensorrt" or (backend != "tflite" and name in ("wide head", "positive stage")):
            continue
        if precision != "fp16" or name in ("transformer", "stage", "wide head", "features", "kernels"):
            yield backend, name, precision, 1
    for name, precision, samples in TFLITE_ONLY:
        yield "tflite", name, precision, samples


@pytest.mark.parametrize(("backend", "name", "precision", "samples"), list(_kept_once()))
def test_weights_are_stored_once_and_outputs_stay(
    backend: str, name: str, precision: str, samples: int, source, tmp_path: Path
) -> None:
    compiler, model = load_backend(backend), network(name)
    runtime = _runtime(backend)

    def calibration() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": pictures(name, 16, 1)}

    quant = QuantSpec.for_target(precision, TARGET)
    out = tmp_path / f"made{compiler.suffix}"
    artifact = compiler.compile(source(compiler.consumes, name, samples), runtime, quant, calibration, out)
    precision = precision.partition("-")[0]
    kind = {"fp32": "float32", "fp16": "float16", "int8": "int8"}[precision]
    width = {"fp32": 4, "fp16": 2, "int8": 1}[precision]
    # biases, norms and what tools add to them are small beside the matrices
    held = stored(model, backend)
    least = sum(p.numel() for p in held if p.dim() > 1 and p.shape[0] > 1) * width
    assert 0.9 * least <= artifact.weight_types[kind] <= 1.03 * sum(p.numel() for p in held) * width
    x = pictures(name, 8, 2)
    options = RuntimeOptions(threads=1, properties={"INFERENCE_PRECISION_HINT": "f32"} if backend == "openvino" else {})
    with evaluation.opened(artifact.path, backend, options) as run, torch.no_grad():
        [got] = run({"x": x}).values()
        wanted = model(torch.from_numpy(x)).numpy()
    assert np.linalg.norm(got - wanted) <= PRECISIONS[precision] * np.linalg.norm(wanted)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "tensorrt"])
def test_whole_files_of_halvit_tiny_are_as_large_as_its_parameters(backend: str, tmp_path: Path) -> None:
    compiler, model = load_backend(backend), as_trained(models.load("sample:halvit-tiny").module)
    inputs = np.random.default_rng(0).normal(size=(2, 3, 224, 224)).astype(np.float32)
    path = write_source(compiler.consumes, model, {"x": inputs[:1]}, tmp_path)
    if compiler.consumes is Source.ONNX:
        path = simplify(path, tmp_path / "simplified.onnx").path
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1 and p.shape[0] > 1)
    others = sum(p.numel() for p in model.parameters()) - matrices  # in float at int8 too
    for precision, width in (("fp32", 4), ("int8", 1)):
        artifact = compiler.compile(
            path, _runtime(backend), QuantSpec.for_target(precision, TARGET), lambda: iter([{"x": inputs}]),
            tmp_path / f"{precision}{compiler.suffix}",
        )  # fmt: skip
        assert 0.95 <= artifact.size_bytes / (width * matrices + 4 * others) <= 1.03, precision


def _int8_for_tflite(name: str, source: Any, folder: Path) -> Path:
    def calibration() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": pictures(name, 4, 1)}

    out, compiler = folder / "made.tflite", load_backend("tflite")
    quant = QuantSpec.for_target("int8", TARGET)
    compiler.compile(source(compiler.consumes, name), TARGET.runtime("tflite"), quant, calibration, out)
    return out


@pytest.mark.parametrize(("name", "products"), [("stage", 3), ("wide head", 0), ("pair", 0), ("transformer", 6)])
def test_convolutions_read_a_small_matrix_the_other_way_round_instead_of_products(
    name: str, products: int, source, tmp_path: Path
) -> None:
    from rowcol_edge.backends import tflite_files

    out = _int8_for_tflite(name, source, tmp_path)
    model = tflite_files.read(out)
    [graph] = model.subgraphs
    constant = [
        operator
        for operator in graph.operators
        if tflite_files.kind(model, operator) == "BATCH_MATMUL"
        and model.buffers[graph.tensors[operator.inputs[1]].buffer].data is not None
    ]
    assert len(constant) == products
    # a map of many rows would be as many products
    assert all(np.prod(graph.tensors[operator.inputs[0]].shape[:-2]) == 1 for operator in constant)
    if name == "pair":  # each has a buffer of its own, so that no scale is left over
        assert not any(tflite_files.kind(model, operator) == "MUL" for operator in graph.operators)


@pytest.mark.parametrize(
    ("name", "scaled"),
    [("stage", {"CONV_2D": 3, "BATCH_MATMUL": 3}), ("positive stage", {"BATCH_MATMUL": 3}), ("plain stage", {})],
)
def test_xnnpack_runs_all_of_what_stands_for_a_use_in_int8(
    name: str, scaled: dict[str, int], source, tmp_path: Path
) -> None:
    from ai_edge_litert.interpreter import Interpreter

    from rowcol_edge.backends import tflite_files

    out = _int8_for_tflite(name, source, tmp_path)
    model = tflite_files.read(out)
    [graph] = model.subgraphs
    makers = {operator.outputs[0]: tflite_files.kind(model, operator) for operator in graph.operators}
    factors = [
        operator.inputs[0]
        for operator in graph.operators
        if tflite_files.kind(model, operator) == "MUL" and graph.tensors[operator.inputs[1]].shape[0] > 1
    ]
    assert Counter(makers[given] for given in factors) == scaled
    interpreter = Interpreter(str(out))
    interpreter.allocate_tensors()
    # behind the operators stands one delegate for each part of the graph that nothing else breaks: GELU does, once
    kinds = [operator["op_name"] for operator in interpreter._get_ops_details()]
    assert (kinds.count("BATCH_MATMUL"), kinds.count("GELU")) == (3, 1)
    assert kinds.count("DELEGATE") == 2


def test_onnxruntime_stores_one_scale_for_a_tied_weight_and_its_biases(source, tmp_path: Path) -> None:
    compiler, out = load_backend("onnxruntime"), tmp_path / "made.onnx"

    def calibration() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": pictures("transformer", 8, 1)}

    path = source(compiler.consumes, "transformer")
    compiler.compile(path, RUNTIME, QuantSpec.for_target("int8", TARGET), calibration, out)
    graph = onnx.load(out).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers = {name: node.name for node in graph.node for name in node.input}
    scales: dict[bool, set[int]] = {True: set(), False: set()}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            axes = len(constants[node.input[1]].dims)
            assert axes == sum(given.name == "axis" for given in node.attribute)
            scales["blocks" in readers[node.output[0]]].add(axes)  # the patch embedding and the head are not tied
    assert scales == {True: {0}, False: {1}}


def test_a_short_description_keeps_the_text_of_values(tmp_path: Path) -> None:
    from rowcol_edge.backends import openvino_ties

    path = tmp_path / "model.xml"
    path.write_text(
        """<layer id="1" name="a -> b" type="Add">
            <input>
                <port id="0" precision="FP32" />
                <port id="1" precision="FP32"> <dim>4</dim> </port>
            </input>
            <output> <port id="2" precision="FP32"> <dim>4</dim> </port> </output>
        </layer>
        <labels value="[&quot;x > y&quot;, &quot;/> z&quot;]" />""",
        encoding="utf-8",
    )
    openvino_ties.shorten(path)
    assert path.read_text(encoding="utf-8") == (
        '<layer id="1" name="a -> b" type="Add"><input><port id="0"/><port id="1"/></input>'
        '<output><port id="2" precision="FP32"><dim>4</dim></port></output></layer>'
        '<labels value="[&quot;x > y&quot;, &quot;/> z&quot;]"/>'
    )


@pytest.mark.parametrize(
    ("backend", "name", "count"),
    [*((name, "transformer", 14) for name in BACKENDS if name != "tensorrt"), ("tflite", "positive stage", 13)],
)
def test_layer_errors_know_both_uses(backend: str, name: str, count: int, source, tmp_path: Path) -> None:
    compiler, path = load_backend(backend), source(load_backend(backend).consumes, name)

    def calibration() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": pictures(name, 8, 1)}

    out = tmp_path / f"made{compiler.suffix}"
    quant = QuantSpec.for_target("int8", TARGET)
    compiler.compile(path, _runtime(backend), quant, calibration, out)
    errors = compiler.layer_errors(path, out, calibration)
    # the transformer: a patch embedding, a head, and six uses of three matrices in each of two blocks
    assert len(errors) == count
    assert all(0 < layer.error < 0.2 for layer in errors)


@pytest.mark.parametrize(
    ("name", "count"), [("transformer", 14), ("stage", 13), ("pair", 3), ("features", 3), ("kernels", 6)]
)
def test_tensorrt_has_int8_scales_for_the_outputs_of_each_use(name: str, count: int, source, tmp_path: Path) -> None:
    compiler, runtime = load_backend("tensorrt"), replace(RUNTIME, name="tensorrt")

    def calibration() -> Iterator[dict[str, np.ndarray]]:
        yield from ({"x": picture[None]} for picture in pictures(name, 8, 1))

    out = tmp_path / "made.onnx"
    compiler.compile(source(Source.ONNX, name), runtime, QuantSpec("int8"), calibration, out)
    graph = onnx.load(out).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    layers = [node for node in graph.node if node.op_type in WEIGHTED and node.input[1] in makers]
    assert len(layers) == count
    for layer in layers:
        weight, scales = (constants[port] for port in makers[layer.input[1]].input[:2])
        upright = layer.op_type == "Conv" or any(given.name == "transB" and given.i for given in layer.attribute)
        assert list(scales.dims) == [weight.dims[0 if upright else 1]]


def test_only_what_is_used_both_ways_is_tied() -> None:
    captured = capture.program(network("transformer"), {"x": pictures("transformer", 1, 0)})
    names = [
        f"blocks.{n}.{part}" for n in (0, 1) for part in ("attention.query", "attention.weight", "feed_forward.weight")
    ]
    assert list(capture.tied_parameters(captured)) == names
    dense = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    assert capture.tied_parameters(capture.program(dense, {"input": np.zeros((1, 3), np.float32)})) == ()
