"""A bundle opens, reproduces its outputs and predicts with the oldest onnxruntime its target promises.

And with the newest one on another Python, where there is one. The environments have that runtime, numpy and Pillow,
nothing else: this also proves that the device side needs no more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import rowcol_edge
from rowcol_edge import targets
from rowcol_edge.targets import RuntimeSpec

from .nets import small_net, write_splits

RUNTIME = "onnxruntime"


class Dense(nn.Module):
    """Linear layers on the pictures of nets.frames."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(256, 128), nn.Linear(128, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.second(torch.relu(self.first(x.flatten(1))))
        return logits


def promises() -> dict[tuple[str, int, int], str]:
    """One target for each different promise (oldest version, opset, IR version)."""
    made: dict[tuple[str, int, int], str] = {}
    for name in targets.available():
        spec = targets.load(name).runtime(RUNTIME)
        made.setdefault((spec.oldest, spec.opset, spec.ir_version), name)
    return made


@pytest.fixture(scope="module", params=sorted(promises().values()))
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def spec(target: str) -> RuntimeSpec:
    return targets.load(target).runtime(RUNTIME)


@pytest.fixture(
    scope="module", params=["oldest", pytest.param("another-python", marks=pytest.mark.system("another-python"))]
)
def board(request: pytest.FixtureRequest, spec: RuntimeSpec, bare_python: Callable[..., Path]) -> Path:
    """The Python of an environment such as a board's: the oldest runtime, or the newest with another Python."""
    if request.param == "another-python":
        return bare_python(
            f"{RUNTIME}-another", RUNTIME, "numpy", "pillow", base=request.getfixturevalue("other_python")
        )
    numpy = "numpy<2" if tuple(map(int, spec.oldest.split(".")[:2])) < (1, 19) else "numpy"
    return bare_python(f"{RUNTIME}-{spec.oldest}", f"{RUNTIME}=={spec.oldest}", numpy, "pillow")


@pytest.fixture(scope="module")
def vit(target: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Transformer at int8; by an energy, not a budget: what is tried here is the format, not the search."""
    out = tmp_path_factory.mktemp("vit")
    [built] = rowcol_edge.build("sample:fmnist-vit", target=target, energy=0.98, out=str(out), zip=False)
    return Path(built.path)


@pytest.fixture(scope="module", params=["int8-dynamic", "fp16"])
def net(request: pytest.FixtureRequest, target: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small nets at the other precisions; dynamic int8 is for linear layers."""
    out = tmp_path_factory.mktemp("net")
    options = {"labels": ["plain", "striped"], "metric": "accuracy", "energy": 0.98, "zip": False, **write_splits(out)}
    model = small_net() if request.param == "fp16" else Dense().eval()
    [built] = rowcol_edge.build(model, target=target, precision=request.param, out=str(out / "bundles"), **options)
    return Path(built.path)


def on_board(python: Path, bundle: Path, *arguments: str | Path) -> Any:
    command = [python, bundle / "rowcol-edge-device.pyz", *arguments, "--json"]
    done = subprocess.run(command, cwd=bundle.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_the_environment_is_the_one_that_is_meant(
    board: Path, spec: RuntimeSpec, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    code = (
        "import importlib.util as u, onnxruntime, sys\n"
        "print(onnxruntime.__version__, *sys.version_info[:2])\n"
        "print([n for n in ('torch', 'onnx', 'rowcol_edge', 'typer') if u.find_spec(n)])"
    )
    done = subprocess.run([board, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    (version, *python), foreign = (line.split() for line in done.stdout.splitlines())
    assert foreign == ["[]"]
    if "oldest" in request.node.name:
        assert version == spec.oldest
    else:
        assert tuple(map(int, python)) != sys.version_info[:2]


def reproduced(board: Path, bundle: Path) -> bool:
    report = on_board(board, bundle, "verify", bundle)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert [arm["name"] for arm in report["arms"]] == [arm["name"] for arm in manifest["arms"]]
    assert len(report["arms"]) == 3
    return all(arm["ok"] for arm in report["arms"])


def test_every_arm_of_a_transformer_reproduces_its_golden_outputs(board: Path, vit: Path) -> None:
    assert reproduced(board, vit)


def test_every_arm_at_another_precision_reproduces_its_golden_outputs(board: Path, net: Path) -> None:
    assert reproduced(board, net)


def test_the_board_predicts_what_this_machine_predicts(board: Path, vit: Path, root: Path) -> None:
    with np.load(root / "sample_models" / "fmnist-vit" / "images.npz", allow_pickle=False) as stored:
        picture = vit.parent / "picture.png"
        Image.fromarray(stored["test_images"][0]).save(picture)
    [there] = on_board(board, vit, "run", vit, picture)["results"]
    with rowcol_edge.Predictor(vit) as predictor:
        here = predictor.predict(picture)
    assert there["prediction"]["label"] == here.label
