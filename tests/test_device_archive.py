from __future__ import annotations

import ast
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import rowcol_edge
from rowcol_edge import cli
from rowcol_edge.device.manifest import ArmEntry, Manifest, RuntimeEntry, TensorSpec
from rowcol_edge.device.preprocess import Preprocess
from rowcol_edge.device.runtimes import RuntimeOptions, load_runtime
from rowcol_edge.device.verify import golden_outputs
from rowcol_edge.device_archive import device_archive_bytes
from rowcol_edge.package import board_readme, write_bundle, zip_bundle

INPUT = TensorSpec("image", (1, 1, 4, 4), "float32")

Board = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one arm that adds up a 4×4 picture."""
    folder = tmp_path_factory.mktemp("archive")
    weight = np.repeat(np.array([[-1.0, 1.0]], np.float32), 16, 0)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "weight"], ["output"])],
        "sum",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 4, 4])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(weight, "weight")],
    )
    artifact = folder / "sum.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), artifact)
    inputs = {"image": np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype(np.float32)}
    with load_runtime("onnxruntime").open(artifact, RuntimeOptions(threads=1)) as session:
        outputs = golden_outputs(session, (INPUT,), inputs)
    name = "dense@fp32"
    manifest = Manifest(
        name="sum",
        target={"name": "generic-x86", "match": {"machine": "x86_64"}},
        runtime=RuntimeEntry("onnxruntime", "1.17", 18, 9, 1, "python3 -m pip install onnxruntime numpy pillow"),
        inputs=(INPUT,),
        outputs=(TensorSpec("output", (1, 2), "float32"),),
        preprocess=Preprocess(mode="L", height=4, width=4, mean=(0.5,), std=(0.5,)).to_dict(),
        contract="classify",
        labels=("dark", "bright"),
        default_arm=name,
        arms=(ArmEntry(name, "dense", "fp32", "arms/sum.onnx", 32, artifact.stat().st_size, {"float32": 128}, 1e-5),),
        golden_outputs={name: "golden/sum.npz"},
        created="2026-01-02T03:04:05Z",
    )
    return write_bundle(
        folder / "bundle",
        manifest=manifest,
        artifacts={name: artifact},
        golden_inputs=inputs,
        golden_outputs={name: outputs},
        readme=board_readme(manifest),
    )


@pytest.fixture(scope="session")
def board(bare_python: Callable[..., Path], bundle: Path) -> Board:
    """The bundle's own archive, run by a Python that has numpy, Pillow and onnxruntime and knows of no checkout."""
    python = bare_python("board", "numpy", "pillow", "onnxruntime")

    def run(*arguments: object, python_flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        command = [python, "-I", *python_flags, bundle / "rowcol-edge-device.pyz", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=bundle.parent)

    return run


def test_the_archive_holds_the_device_side_and_nothing_else() -> None:
    package = Path(rowcol_edge.__file__).parent
    device = {f"rowcol_edge/{path.relative_to(package).as_posix()}" for path in (package / "device").rglob("*.py")}
    content = device_archive_bytes()
    assert content.startswith(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert set(archive.namelist()) == device | {"__main__.py", "rowcol_edge/__init__.py", "rowcol_edge/errors.py"}
        for name in archive.namelist():
            ast.parse(archive.read(name), feature_version=(3, 10))
        assert archive.read("rowcol_edge/errors.py") == (package / "errors.py").read_bytes()


def test_the_same_sources_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = device_archive_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("time.localtime", lambda *_: (2033, 5, 18, 3, 33, 20, 2, 138, 0))
    assert device_archive_bytes() == before


def test_the_bundles_archive_is_executable(bundle: Path) -> None:
    assert (bundle / "rowcol-edge-device.pyz").stat().st_mode & 0o111


def test_verify_on_a_bare_board(board: Board, bundle: Path) -> None:
    done = board("verify", bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ok     dense@fp32" in done.stdout


def test_run_on_a_bare_board(board: Board, bundle: Path, tmp_path: Path) -> None:
    for name, value in (("dark", 10), ("bright", 240)):
        Image.fromarray(np.full((9, 9), value, np.uint8)).save(tmp_path / f"{name}.png")
    done = board("run", bundle.with_name("bundle.zip"), tmp_path / "dark.png", tmp_path / "bright.png", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads(done.stdout)["results"]
    assert (
        [Path(r["source"]).stem for r in results] == [r["prediction"]["label"] for r in results] == ["dark", "bright"]
    )


def test_a_bundle_for_another_machine_is_refused_unless_this_one_stands_in(
    board: Board, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "aarch64" if platform.machine() == "x86_64" else "x86_64"
    foreign = tmp_path / "foreign"
    shutil.copytree(bundle, foreign)
    manifest = json.loads((foreign / "manifest.json").read_text())
    manifest["target"] |= {"name": "other-board", "match": {"machine": other}}
    (foreign / "manifest.json").write_text(json.dumps(manifest))
    np.save(tmp_path / "frame.npy", np.full((4, 4), 240, np.uint8))
    refusal = (
        f"error: bundle for other-board: expected a machine of kind {other}, got {platform.machine()} – do this on the "
        "board, or add --stand-in: the files run here too, but outputs may differ a little\n"
    )
    warning = f"warning: {platform.machine()} stands in for {other} (other-board), whose outputs may differ a little\n"
    for arguments in (("verify", foreign), ("run", foreign, tmp_path / "frame.npy")):
        done = board(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", refusal)
        with pytest.raises(SystemExit) as ended:
            cli.run_command([*map(str, arguments)])
        assert ended.value.code == 2
        assert f"expected: a machine of kind {other}" in capsys.readouterr().err
        arguments = (*arguments, "--stand-in")
        done = board(*arguments, "--json")
        assert done.returncode == 0
        assert done.stderr == warning
        with pytest.raises(SystemExit) as ended:
            cli.run_command([*map(str, arguments), "--json"])
        here = capsys.readouterr()
        assert ended.value.code in (None, 0)
        assert here.err.count(warning) == 1
        assert json.loads(here.out) == json.loads(done.stdout)


def test_profile_on_a_bare_board_starts_its_own_workers(board: Board, bundle: Path, tmp_path: Path) -> None:
    done = board("profile", bundle, "--blocks", 6, "--seconds", 1, "--json", "--out", tmp_path / "profile.json")
    assert done.returncode == 0, done.stderr
    profile = json.loads(done.stdout)
    assert profile == json.loads((tmp_path / "profile.json").read_text())
    assert "dense@fp32" in json.dumps(profile)


def test_errors_on_a_board_are_one_line_and_an_exit_code(board: Board, bundle: Path) -> None:
    done = board("run", bundle, "nothing.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nothing.png: expected a readable file, got no such file\n"


def test_a_reader_that_goes_away_is_no_traceback(bundle: Path, bare_python: Callable[..., Path]) -> None:
    python = bare_python("board", "numpy", "pillow", "onnxruntime")
    command = [python, "-I", bundle / "rowcol-edge-device.pyz", "verify", bundle]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == ""
    assert process.wait() == 141


def test_sigterm_leaves_no_temporary_folder(bundle: Path, bare_python: Callable[..., Path], tmp_path: Path) -> None:
    python = bare_python("board", "numpy", "pillow", "onnxruntime")
    packed = zip_bundle(bundle, tmp_path / "bundle.zip", "bundle")
    (here := tmp_path / "here").mkdir()
    process = subprocess.Popen(
        [python, "-I", bundle / "rowcol-edge-device.pyz", "profile", packed, "--out", tmp_path / "profile.json"],
        env={**os.environ, "TMPDIR": str(here)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() != ""  # it measures
    assert list(here.glob("rowcol-edge-*")) != []
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.splitlines()[-1]) == (143, "", "error: interrupted")
    assert list(here.glob("rowcol-edge-*")) == []


def test_all_code_comes_from_the_archive_and_the_runtime(board: Board, bundle: Path) -> None:
    done = board("verify", bundle, python_flags=("-v",))
    assert done.returncode == 0
    loaded = {line.split()[1].strip("'") for line in done.stderr.splitlines() if line.startswith("import ")}
    assert {"rowcol_edge.device.main", "rowcol_edge.device.verify", "numpy", "onnxruntime"} <= loaded
    assert not {name.split(".")[0] for name in loaded} & {"torch", "onnx", "typer", "rich", "scipy", "PIL"}
    assert str(Path(rowcol_edge.__file__).parent) not in done.stderr


@pytest.mark.parametrize(
    ("package", "install"),
    [("onnxruntime", "python3 -m pip install onnxruntime numpy pillow"), ("numpy", "python -m pip install 'numpy'")],
)
def test_a_python_without_a_package_gets_the_install_line(bundle: Path, package: str, install: str) -> None:
    code = (
        f"import runpy, sys; sys.modules['{package}'] = None; "
        "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command: list[Any] = [sys.executable, "-I", "-c", code, bundle / "rowcol-edge-device.pyz", "verify", bundle]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert install in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_bundle_of_another_schema_names_its_own_archive(board: Board, bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "schema": 4}))
    done = board("verify", tmp_path)
    assert done.returncode == 2
    assert "manifest.schema: expected 2 or 3, got 4" in done.stderr


def test_an_old_python_is_told_so(bundle: Path) -> None:
    code = (
        "import runpy, sys; sys.version_info = (3, 9, 2); sys.argv = sys.argv[1:]; "
        "sys.path.insert(0, sys.argv[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command: list[Any] = [sys.executable, "-I", "-c", code, bundle / "rowcol-edge-device.pyz", "verify", bundle]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Python 3.10 or newer is needed")
