"""Which layer of an int8 artifact hurts, for every backend that says so, and what keeping it in float brings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from rowcol_edge.backends import load_backend
from rowcol_edge.backends.base import LayerError, QuantSpec, Source, worst_first
from rowcol_edge.device.bundle import split_feeds
from rowcol_edge.device.runtimes import RuntimeOptions, load_runtime
from rowcol_edge.errors import ConfigError, StageError
from rowcol_edge.targets import RuntimeSpec

from ..nets import outlier_net
from .conftest import Batches, judged, write_source

BACKENDS = ("onnxruntime", "openvino", "tensorrt")
"""tflite is left out where the net has an outlier between its layers, which it holds in 8 bits too."""
OPTIONS = {"openvino": {"INFERENCE_PRECISION_HINT": "f32"}}


@pytest.fixture(scope="module")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _source("onnxruntime", tmp_path_factory.mktemp("onnx"))


def _source(backend: str, folder: Path) -> Path:
    example = {"x": np.zeros((1, 1, 16, 16), np.float32)}
    return write_source(load_backend(backend).consumes, outlier_net(), example, folder)


def outputs(name: str, artifact: Path, images: np.ndarray) -> np.ndarray:
    runtime = load_runtime(load_backend(name).host_runtime)
    with runtime.open(artifact, RuntimeOptions(threads=1, properties=OPTIONS.get(name, {}))) as session:
        return np.concatenate([session.run(feed)["output"] for feed in split_feeds(session.inputs, {"x": images})])


@pytest.mark.parametrize("name", BACKENDS)
def test_the_layers_at_an_outlier_are_named_and_float_there_recovers_the_outputs(
    name: str, outlier: Path, tmp_path: Path, runtime: RuntimeSpec, batches: Batches, unseen: np.ndarray
) -> None:
    backend, source = load_backend(name), _source(name, tmp_path)
    expected = outputs("onnxruntime", outlier, unseen)

    def error(keep: tuple[str, ...]) -> float:
        made = backend.compile(
            source, runtime, QuantSpec("int8", keep_float=keep), batches, tmp_path / f"a{backend.suffix}"
        )
        return float(np.linalg.norm(outputs(name, made.path, unseen) - expected) / np.linalg.norm(expected))

    plain = error(())
    found = backend.layer_errors(source, tmp_path / f"a{backend.suffix}", batches)
    assert len(found) == 7
    assert [layer.error for layer in found] == sorted((layer.error for layer in found), reverse=True)
    assert found[0].error > 0.3  # what the reader gets is lost
    assert error((found[0].name,)) < 0.2 * plain
    assert error((found[-1].name,)) > 0.5 * plain


class Clipping(nn.Module):
    """Activations whose work the quantizer behind them does: most of what the layers give is below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(4096, 8),
        )  # fmt: skip
        for layer in (self.layers[0], self.layers[2]):
            layer.bias.data -= 0.3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(x)
        return result


@pytest.mark.parametrize("name", BACKENDS)
def test_what_an_activation_clips_is_no_error_of_its_layer(
    name: str, tmp_path: Path, runtime: RuntimeSpec, batches: Batches
) -> None:
    torch.manual_seed(0)
    backend, example = load_backend(name), {"x": np.zeros((1, 1, 16, 16), np.float32)}
    source = write_source(backend.consumes, Clipping().eval(), example, tmp_path)
    out = tmp_path / f"a{backend.suffix}"
    backend.compile(source, runtime, QuantSpec("int8"), batches, out)
    found = backend.layer_errors(source, out, batches)
    assert len(found) == 3
    assert all(0.0 < layer.error < 0.05 for layer in found)


def test_an_onnx_layer_has_the_name_of_its_module(
    outlier: Path, tmp_path: Path, runtime: RuntimeSpec, batches: Batches
) -> None:
    backend = load_backend("onnxruntime")
    out = tmp_path / "a.onnx"
    backend.compile(outlier, runtime, QuantSpec("int8"), batches, out)
    assert backend.layer_errors(outlier, out, batches)[0].name == "reader"
    backend.compile(outlier, runtime, QuantSpec("int8", keep_float=("reader",)), batches, out)
    nodes = {node.name: node for node in onnx.load(str(out)).graph.node}
    assert nodes["reader"].input[1] == "reader.weight"
    assert nodes["more.0"].input[1].startswith("more.0.weight_")
    assert "reader" not in {layer.name for layer in backend.layer_errors(outlier, out, batches)}


@pytest.mark.parametrize("name", [*BACKENDS, "tflite"])
def test_attention_has_errors_too(
    name: str, sources: Callable[[Source, str], Path], tmp_path: Path, runtime: RuntimeSpec, batches: Batches
) -> None:
    backend = load_backend(name)
    tokens = sources(backend.consumes, "tokens")
    made = backend.compile(tokens, runtime, judged("int8"), batches, tmp_path / f"a{backend.suffix}")
    found = backend.layer_errors(tokens, made.path, batches)
    assert len(found) >= 7
    assert 0.0 < found[0].error < 0.2


def test_an_unknown_layer_is_refused_with_the_nearest_name(
    outlier: Path, tmp_path: Path, runtime: RuntimeSpec, batches: Batches
) -> None:
    with pytest.raises(ConfigError, match="did you mean reader"):
        load_backend("onnxruntime").compile(
            outlier, runtime, QuantSpec("int8", keep_float=("readr",)), batches, tmp_path / "a.onnx"
        )
    source = _source("openvino", tmp_path)
    with pytest.raises(StageError, match="no_such_layer"):
        load_backend("openvino").compile(
            source, runtime, QuantSpec("int8", keep_float=("no_such_layer",)), batches, tmp_path / "a.xml"
        )
    assert not {"a.onnx", "a.xml"} & {path.name for path in tmp_path.iterdir()}


def test_an_error_that_is_no_number_is_none() -> None:
    with pytest.raises(StageError, match="NaN or infinity"):
        worst_first([LayerError("a", float("nan"))])
    assert worst_first([LayerError("a", 0.1), LayerError("b", 0.2)])[0].name == "b"
