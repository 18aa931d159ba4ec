"""Tiny bundles: a grey 6×5 picture, a linear layer, two labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.manifest import ArmEntry, Manifest, RuntimeEntry, TensorSpec
from rowcol_edge.device.preprocess import Preprocess
from rowcol_edge.device.runtimes import RuntimeOptions, load_runtime
from rowcol_edge.device.verify import golden_outputs
from rowcol_edge.package import board_readme, write_bundle

HEIGHT, WIDTH = 5, 6
INPUT = TensorSpec("image", (None, 1, HEIGHT, WIDTH), "float32")
OUTPUT = TensorSpec("output", (None, 2), "float32")


def write_onnx(path: Path, *, seed: int = 0, opset: int = 18, ir_version: int = 9, batch: int | str = "N") -> Path:
    """Flatten and one linear layer to two logits."""
    weight = np.random.default_rng(seed).normal(size=(HEIGHT * WIDTH, 2)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 1, HEIGHT, WIDTH])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, 2])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(model) if opset <= 18 and ir_version <= 9 else None
    return path


def arm_entry(name: str, artifact: Path, **changes: Any) -> ArmEntry:
    variant, precision = name.split("@")
    size_bytes = artifact.stat().st_size
    test = {"metric": "accuracy", "value": 0.9, "n": 40, "drop_pp": 0.2, "ci_low_pp": -0.1, "ci_high_pp": 0.5}
    arm = ArmEntry(
        name=name,
        variant=variant,
        precision=precision,
        artifact=f"arms/{name}.onnx",
        parameters=HEIGHT * WIDTH * 2,
        size_bytes=size_bytes,
        weight_types={"float32": HEIGHT * WIDTH * 8},
        tolerance=1e-5,
        quality={"test": test},
        threshold=0.5,
    )
    return replace(arm, **changes)


@pytest.fixture
def onnx_file() -> Callable[..., Path]:
    return write_onnx


@pytest.fixture
def bundle_parts(tmp_path: Path) -> dict[str, Any]:
    """The arguments of write_bundle for a bundle with two arms."""
    sources = tmp_path / "sources"
    sources.mkdir()
    names = ("factored@fp32", "dense@fp32")
    artifacts = {name: write_onnx(sources / f"{name}.onnx", seed=seed) for seed, name in enumerate(names)}
    inputs = {"image": np.random.default_rng(5).normal(size=(4, 1, HEIGHT, WIDTH)).astype(np.float32)}
    outputs = {}
    for name, path in artifacts.items():
        with load_runtime("onnxruntime").open(path, RuntimeOptions(threads=1)) as session:
            outputs[name] = golden_outputs(session, (INPUT,), inputs)
    manifest = Manifest(
        name="tiny",
        target={"name": "generic-x86", "title": "a generic x86-64 machine", "match": {"machine": "x86_64"}},
        runtime=RuntimeEntry(
            name="onnxruntime",
            oldest="1.17.0",
            opset=18,
            ir_version=9,
            threads=1,
            install="python3 -m pip install onnxruntime numpy pillow",
            providers=("CPUExecutionProvider",),
        ),
        inputs=(INPUT,),
        outputs=(OUTPUT,),
        preprocess=Preprocess(mode="L", height=HEIGHT, width=WIDTH, mean=(0.5,), std=(0.25,)).to_dict(),
        contract="classify",
        labels=("good", "defective"),
        positive="defective",
        metric="accuracy",
        default_arm=names[0],
        arms=tuple(arm_entry(name, path) for name, path in artifacts.items()),
        golden_outputs={name: f"golden/{name}.npz" for name in names},
        tool_versions={"onnx": onnx.__version__},
        created="2026-01-02T03:04:05Z",
        build={"command": "rowcol-edge build", "warnings": []},
    )
    return {
        "manifest": manifest,
        "artifacts": artifacts,
        "golden_inputs": inputs,
        "golden_outputs": outputs,
        "readme": board_readme(manifest),
    }


@pytest.fixture
def bundle_path(tmp_path: Path, bundle_parts: dict[str, Any]) -> Path:
    """A bundle folder; its .zip lies beside it."""
    return write_bundle(tmp_path / "out" / "bundle", **bundle_parts)


@pytest.fixture
def bundle(bundle_path: Path) -> Bundle:
    return Bundle.open(bundle_path)
