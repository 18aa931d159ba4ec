"""A bundle opens, reproduces its outputs and predicts with the oldest runtime its target promises.

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
from PIL import Image
from torch import nn

import rowcol_edge
from rowcol_edge import targets
from rowcol_edge.factoring.ties import TiedFeedForward
from rowcol_edge.targets import RuntimeSpec

from .nets import Dense, short_vit, small_net, widened_target, write_splits

OTHER_PRECISIONS = {"onnxruntime": ("int8-dynamic", "int4-weights", "fp16"), "openvino": ("fp16", "int8")}


def promises() -> list[tuple[str, str]]:
    """A (target, runtime) for each different promise that a CPU keeps: runtime, oldest version, opset, IR version.

    Where several targets promise the same for openvino, one whose int8 files no processor saturates: openvino 2024.6
    does not calculate others rightly where it saturates.
    """
    made: dict[tuple[str, str, int | None, int | None], tuple[str, str]] = {}
    for name in targets.available():
        target = targets.load(name)
        for spec in target.runtimes:
            if spec.name not in OTHER_PRECISIONS or not set(spec.providers) <= {"CPU", "CPUExecutionProvider"}:
                continue  # pip has no TensorRT for a Jetson; tflite is opened by its oldest in a test of its own
            promised = (spec.name, spec.oldest, spec.opset, spec.ir_version)
            if promised not in made or (spec.name == "openvino" and target.int8_saturates):
                made[promised] = (name, spec.name)
    return sorted(made.values())


@pytest.fixture(scope="module", params=promises(), ids="-".join)
def promise(request: pytest.FixtureRequest) -> tuple[str, str]:
    target, runtime = request.param
    return target, runtime


@pytest.fixture(scope="module")
def spec(promise: tuple[str, str]) -> RuntimeSpec:
    target, runtime = promise
    return targets.load(target).runtime(runtime)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("oldest", marks=pytest.mark.system("python-3.12")),
        pytest.param("another-python", marks=pytest.mark.system("another-python")),
    ],
)
def board(request: pytest.FixtureRequest, spec: RuntimeSpec, bare_python: Callable[..., Path]) -> Path:
    """The Python of an environment such as a board's: the oldest runtime, or the newest with another Python."""
    if request.param == "another-python":
        return bare_python(
            f"{spec.name}-another", spec.name, "numpy", "pillow", base=request.getfixturevalue("other_python")
        )
    # onnxruntime before 1.19 does not say that it wants numpy 1
    numpy = "numpy<2" if spec.name == "onnxruntime" else "numpy"
    old = request.getfixturevalue("old_python")
    return bare_python(f"{spec.name}-{spec.oldest}", f"{spec.name}=={spec.oldest}", numpy, "pillow", base=old)


@pytest.fixture(scope="module")
def vit(promise: tuple[str, str], tmp_path_factory: pytest.TempPathFactory, shared_stages: None) -> Path:
    """A Transformer at int8."""
    target, runtime = promise
    net, options = short_vit(tmp_path_factory.mktemp("vit"))
    [built] = rowcol_edge.build(net, target=target, runtime=runtime, **options)
    return Path(built.path)


@pytest.fixture(scope="module")
def others(promise: tuple[str, str], tmp_path_factory: pytest.TempPathFactory, shared_stages: None) -> list[Path]:
    """Small nets at the other precisions: some are for linear layers, the other files hold a tied matrix once."""
    target, runtime = promise
    made = []
    for precision in OTHER_PRECISIONS[runtime]:
        out = tmp_path_factory.mktemp("net")
        [built] = rowcol_edge.build(
            tied_net() if precision in ("fp16", "int8") else Dense().eval(),
            target=widened_target(out, target, precision), runtime=runtime, precision=precision,
            labels=["plain", "striped"], metric="accuracy", energy=0.98, zip=False, out=str(out / "bundles"),
            **write_splits(out),
        )  # fmt: skip
        made.append(Path(built.path))
    return made


def tied_net() -> nn.Module:
    net = small_net()
    net.head = nn.Sequential(TiedFeedForward(64, 128), net.head)
    return net.eval()


def on_board(python: Path, bundle: Path, *arguments: str | Path) -> Any:
    # a promise may be that of a board whose files are the same on this machine
    command = [python, bundle / "rowcol-edge-device.pyz", *arguments, "--stand-in", "--json"]
    done = subprocess.run(command, cwd=bundle.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_the_environment_is_the_one_that_is_meant(
    board: Path, spec: RuntimeSpec, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    code = (
        "import importlib.metadata as m, importlib.util as u, sys\n"
        f"print(m.version({spec.name!r}), *sys.version_info[:2])\n"
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


def test_every_arm_at_another_precision_reproduces_its_golden_outputs(board: Path, others: list[Path]) -> None:
    assert [reproduced(board, bundle) for bundle in others] == [True] * len(others)


def test_the_board_predicts_what_this_machine_predicts(board: Path, vit: Path, root: Path) -> None:
    with np.load(root / "sample_models" / "fmnist-vit" / "images.npz", allow_pickle=False) as stored:
        picture = vit.parent / "picture.png"
        Image.fromarray(stored["test_images"][0]).save(picture)
    [there] = on_board(board, vit, "run", vit, picture)["results"]
    with rowcol_edge.Predictor(vit) as predictor:
        here = predictor.predict(picture)
    assert there["prediction"]["label"] == here.label
