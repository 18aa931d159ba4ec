"""Bias correction takes the mean error of a channel out, and with it part of the error at the outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from torch import nn

from rowcol_edge.backends import load_backend, onnx_bias, onnx_files, qdq
from rowcol_edge.backends.base import QuantSpec
from rowcol_edge.backends.calibration import feeds
from rowcol_edge.export.onnx import export
from rowcol_edge.targets import RuntimeSpec

from ..nets import uneven_net
from .conftest import Batches


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "uneven.onnx"
    export(uneven_net(), {"x": np.zeros((1, 1, 16, 16), np.float32)}, out, opset=18, ir_version=9)
    return out


def outputs(proto: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": image[None]})[0] for image in images])


def assert_only_biases_differ(one: onnx.ModelProto, other: onnx.ModelProto) -> None:
    pairs = zip(one.graph.initializer, other.graph.initializer, strict=True)
    changed = [a.name for a, b in pairs if a.raw_data != b.raw_data]
    assert changed
    assert all("bias" in name for name in changed)


def test_it_repairs_weights_that_share_one_scale(
    uneven: Path, tmp_path: Path, runtime: RuntimeSpec, batches: Batches, unseen: np.ndarray
) -> None:
    made = load_backend("onnxruntime").compile(
        uneven, runtime, QuantSpec("int8", per_channel=False), batches, tmp_path / "a.onnx"
    )
    quantized, prepared = onnx_files.load(made.path), qdq.prepare(uneven)
    before = quantized.SerializeToString(deterministic=True)
    corrected = onnx_bias.correct(prepared, quantized, feeds(batches, onnx_files.inputs(prepared)))
    assert quantized.SerializeToString(deterministic=True) == before
    assert_only_biases_differ(quantized, corrected)
    wanted = outputs(prepared, unseen)
    assert np.linalg.norm(outputs(corrected, unseen) - wanted) < 0.8 * np.linalg.norm(
        outputs(quantized, unseen) - wanted
    )


def test_the_float_biases_of_tensorrt_are_corrected_where_it_is_asked_for(
    uneven: Path, tmp_path: Path, runtime: RuntimeSpec, batches: Batches, unseen: np.ndarray
) -> None:
    plain, repaired = (
        load_backend("tensorrt").compile(
            uneven, runtime, QuantSpec("int8", correct_bias=correct), batches, tmp_path / f"{correct}.onnx"
        )
        for correct in (False, True)
    )
    assert (plain.biases_corrected, repaired.biases_corrected) == (False, True)
    quantized, corrected = onnx_files.load(plain.path), onnx_files.load(repaired.path)
    assert_only_biases_differ(quantized, corrected)
    wanted = outputs(onnx_files.load(uneven), unseen)
    assert np.linalg.norm(outputs(corrected, unseen) - wanted) < 0.8 * np.linalg.norm(
        outputs(quantized, unseen) - wanted
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_without_a_bias_there_is_nothing_to_correct(tmp_path: Path, runtime: RuntimeSpec, backend: str) -> None:
    rng, out = np.random.default_rng(0), tmp_path / "bare.onnx"
    samples = [{"x": rng.normal(size=(1, 16)).astype(np.float32)} for _ in range(4)]
    export(nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU()), samples[0], out, opset=18, ir_version=9)
    plain, repaired = (
        load_backend(backend).compile(
            out, runtime, QuantSpec("int8", correct_bias=correct), lambda: iter(samples), tmp_path / f"{correct}.onnx"
        )
        for correct in (False, True)
    )
    assert plain.sha256 == repaired.sha256
