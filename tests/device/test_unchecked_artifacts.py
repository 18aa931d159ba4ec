"""No path hands a runtime an artifact whose digest was not compared with the manifest since it was last written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rowcol_edge import api, cli
from rowcol_edge.device import main as device
from rowcol_edge.device import measure, worker
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.engines import build_engines
from rowcol_edge.device.predictor import Predictor, open_arm
from rowcol_edge.device.processes import Processes
from rowcol_edge.device.runtimes import ENGINE_BUILDERS, RUNTIMES
from rowcol_edge.device.verify import verify
from rowcol_edge.device.worker import MemoryRun, Request
from rowcol_edge.errors import BundleError, IntegrityError, MeasurementError
from rowcol_edge.package import write_bundle

ARM = "factored@fp32"
SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml", "tensorrt": ".onnx", "tflite": ".tflite"}


class Untouched:
    """A runtime that must not be reached."""

    name = package = "untouched"

    def version(self) -> str:
        return "99"

    def fulfils(self, oldest: str) -> bool:
        return True

    def open(self, artifact: Path, options: object) -> Any:
        pytest.fail(f"{artifact.name} was opened")

    def build_engine(self, artifact: Path, options: object) -> Any:
        return self.open(artifact, options)


@pytest.fixture(params=sorted(RUNTIMES))
def path(
    request: pytest.FixtureRequest, tmp_path: Path, bundle_parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A whole bundle for a runtime which fails the test when it is handed a file. Nothing reads the artifacts."""
    name, suffix = request.param, SUFFIXES[request.param]
    monkeypatch.setitem(sys.modules, RUNTIMES[name], SimpleNamespace(RUNTIME=Untouched()))  # type: ignore[misc]
    manifest = bundle_parts["manifest"]
    weights = b"weights" if suffix == ".xml" else b""
    extra = {f"arms/{arm.name}.bin": weights for arm in manifest.arms if weights}
    arms = tuple(
        replace(arm, artifact=f"arms/{arm.name}{suffix}", size_bytes=arm.size_bytes + len(weights))
        for arm in manifest.arms
    )
    runtime = replace(manifest.runtime, name=name, providers=())
    parts = {**bundle_parts, "manifest": replace(manifest, runtime=runtime, arms=arms)}
    return write_bundle(tmp_path / "out" / "bundle", **parts, extra=extra)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def damage(path: Path) -> None:
    """Flip a bit of the last file of the first arm: its artifact, or the ``.bin`` beside it."""
    flip(next(file for suffix in (".bin", *SUFFIXES.values()) if (file := path / "arms" / f"{ARM}{suffix}").is_file()))


def engines(bundle: Bundle) -> object:
    return list(build_engines(bundle)) if bundle.manifest.runtime.name in ENGINE_BUILDERS else bundle.check()


OPENERS: Mapping[str, Callable[[Path], object]] = {
    "checked": Bundle.open,
    "verify": api.verify,
    "profile": api.profile,
    "profile_to": lambda path: api.profile_to(path, None),
    "compare": lambda path: api.compare([path]),
    "predictor": Predictor,
}
HOLDERS: Mapping[str, Callable[[Bundle], object]] = {
    "verify": verify,
    "profile": measure.profile,
    "predictor": Predictor,
    "open_arm": lambda bundle: open_arm(bundle, bundle.arm(ARM)),
    "engines": engines,
    "artifact": lambda bundle: bundle.artifact(ARM),
}


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("way", OPENERS)
def test_a_path_to_a_damaged_bundle_is_refused(path: Path, way: str) -> None:
    damage(path)
    before = files(path)
    with pytest.raises(IntegrityError, match=f"arms/{ARM}.* expected sha256 "):
        OPENERS[way](path)
    assert files(path) == before


@pytest.mark.parametrize("way", HOLDERS)
@pytest.mark.parametrize("check", [True, False])
def test_an_open_bundle_is_refused_that_was_damaged_since_or_never_checked(path: Path, way: str, check: bool) -> None:
    bundle = Bundle.open(path, check=check)
    damage(path)
    with pytest.raises(IntegrityError, match=f"arms/{ARM}.* expected sha256 "):
        HOLDERS[way](bundle)


@pytest.mark.parametrize("command", ["verify", "run", "profile", "engine"])
def test_the_command_line_at_the_board_refuses_it(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    damage(path)
    np.save(tmp_path / "frame.npy", np.zeros((5, 6), np.uint8))
    more = [str(tmp_path / "frame.npy")] if command == "run" else []
    assert device.main([command, str(path), *more]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "expected sha256" in err


@pytest.mark.parametrize("command", ["verify", "run", "profile", "compare"])
def test_the_command_line_refuses_it(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    damage(path)
    more = [str(tmp_path / "frame.npy")] if command == "run" else []
    with pytest.raises(SystemExit) as ended:
        cli.run_command([command, str(path), *more])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "expected: sha256" in err
    assert "Traceback" not in err


def test_a_golden_file_that_was_damaged_since_is_refused(bundle: Bundle) -> None:
    flip(bundle.root / bundle.manifest.golden_inputs)
    with pytest.raises(IntegrityError, match=r"golden/inputs\.npz"):
        bundle.golden()


def test_a_file_that_is_replaced_by_itself_is_handed_out(bundle: Bundle) -> None:
    file = bundle.artifact(ARM)
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    assert bundle.artifact(ARM).read_bytes() == content


class Meddler(Processes):
    """Damages the first arm's artifact between the check and a process."""

    def __init__(self, file: Path) -> None:
        super().__init__({}, 120.0)
        self.file = file

    def memory(self, request: Request, where: str) -> MemoryRun:
        flip(self.file)
        return super().memory(request, where)


def test_a_process_of_the_profiler_opens_nothing_that_was_damaged_since(bundle: Bundle) -> None:
    with pytest.raises(MeasurementError, match=rf"memory run 1: .*{ARM}.* expected the file whose digest was checked"):
        measure.profile(bundle, executor=Meddler(bundle.artifact(ARM)))
    assert MeasurementError.exit_code == 2


@pytest.mark.parametrize("mode", [worker.TIME, worker.MEMORY])
def test_the_worker_looks_before_it_opens(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    request = replace(measure._request(bundle, bundle.arm(ARM), 1), mode=mode)
    assert Request.from_json(request.to_json()) == request
    flip(bundle.root / bundle.arm(ARM).artifact)
    monkeypatch.setitem(sys.modules, RUNTIMES["onnxruntime"], SimpleNamespace(RUNTIME=Untouched()))  # type: ignore[misc]
    with pytest.raises(IntegrityError, match="digest was checked"):
        worker.run(request)


def test_a_profile_without_its_runtime_starts_no_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Untouched, "fulfils", lambda self, oldest: False)
    monkeypatch.setattr(Processes, "memory", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(BundleError, match=r"package untouched: expected 1\.17\.0 or newer, got 99 – install it with"):
        api.profile(path)
