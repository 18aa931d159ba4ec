"""A TFLite bundle reproduces its outputs and predicts with tflite-runtime 2.14, and with ai-edge-litert alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import rowcol_edge

from .nets import short_vit

BOARDS = {
    "tflite-runtime": ("tflite-runtime==2.14.0", "numpy<2", "pillow"),
    "ai-edge-litert": ("ai-edge-litert", "numpy", "pillow"),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("tflite-runtime", marks=pytest.mark.system("python-3.11")),
        "ai-edge-litert",
    ],
)
def board(request: pytest.FixtureRequest, bare_python: Callable[..., Path]) -> Path:
    if request.param == "tflite-runtime":
        return bare_python(request.param, *BOARDS[request.param], base=request.getfixturevalue("python311"))
    return bare_python(request.param, *BOARDS[request.param])


@pytest.fixture(scope="module", params=["int8", "int8-io", "int8-dynamic", "fp16"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_stages: None) -> Path:
    net, options = short_vit(tmp_path_factory.mktemp(request.param))
    [built] = rowcol_edge.build(net, target="generic-x86", runtime="tflite", precision=request.param, **options)
    return Path(built.path)


def on_board(python: Path, bundle: Path, *arguments: str | Path) -> Any:
    command = [python, bundle / "rowcol-edge-device.pyz", *arguments, "--json"]
    done = subprocess.run(command, cwd=bundle.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.system("python-3.11")
def test_numpy_2_beside_tflite_runtime_is_one_line(
    bare_python: Callable[..., Path], python311: Path, root: Path
) -> None:
    """As pip leaves it: tflite-runtime does not say that it wants numpy 1."""
    python = bare_python("tflite-runtime-numpy2", "tflite-runtime==2.14.0", "numpy>=2", base=python311)
    code = "from rowcol_edge.device.runtimes import load_runtime; load_runtime('tflite')"
    done = subprocess.run([python, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    said = done.stderr.splitlines()[-1]
    assert "RowcolError: package numpy: expected numpy before 2" in said
    assert "pip install 'numpy<2'" in said


def test_every_arm_reproduces_its_golden_outputs(board: Path, bundle: Path) -> None:
    report = on_board(board, bundle, "verify", bundle)
    assert [arm["ok"] for arm in report["arms"]] == [True] * 3
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert [arm["name"] for arm in report["arms"]] == [arm["name"] for arm in manifest["arms"]]
    assert sum("TRANSPOSE operators" in note for note in manifest["build"]["notes"]) == 3


def test_the_board_predicts_what_this_machine_predicts(board: Path, bundle: Path, root: Path) -> None:
    with np.load(root / "sample_models" / "fmnist-vit" / "images.npz", allow_pickle=False) as stored:
        picture = bundle.parent / "picture.png"
        Image.fromarray(stored["test_images"][0]).save(picture)
    [there] = on_board(board, bundle, "run", bundle, picture)["results"]
    with rowcol_edge.Predictor(bundle) as predictor:
        here = predictor.predict(picture)
    assert there["prediction"]["label"] == here.label
