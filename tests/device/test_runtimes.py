from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from rowcol_edge.backends import load_backend
from rowcol_edge.device.manifest import TensorSpec
from rowcol_edge.device.runtimes import RUNTIMES, RuntimeOptions, Session, load_runtime
from rowcol_edge.errors import BundleError, DataError, MissingDependencyError

GOOD = np.ones((1, 1, 5, 6), np.float32)


@pytest.fixture
def session(tmp_path: Path, onnx_file: Callable[..., Path]) -> Iterator[Session]:
    with load_runtime("onnxruntime").open(onnx_file(tmp_path / "m.onnx"), RuntimeOptions(threads=1)) as session:
        yield session


def test_every_runtime_in_the_table_that_pip_installs_says_its_name() -> None:
    for name in RUNTIMES:
        if load_backend(name).host_runtime != name:
            continue
        runtime = load_runtime(name)
        assert runtime.name == name
        assert runtime.package
        assert runtime.version()[0].isdigit()


def test_an_unknown_runtime_gets_the_nearest_name() -> None:
    with pytest.raises(BundleError, match=r"did you mean onnxruntime\?"):
        load_runtime("onxruntime")


def test_a_runtime_that_is_not_installed_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, RUNTIMES["onnxruntime"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="python -m pip install 'onnxruntime'"):
        load_runtime("onnxruntime")


def test_a_session_knows_its_inputs_and_outputs(session: Session) -> None:
    assert session.inputs == (TensorSpec("image", (None, 1, 5, 6), "float32"),)
    assert session.outputs == (TensorSpec("output", (None, 2), "float32"),)


def test_outputs_are_those_of_the_bare_runtime(session: Session, tmp_path: Path) -> None:
    bare = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    feeds = {"image": np.random.default_rng(0).normal(size=(3, 1, 5, 6)).astype(np.float32)}
    outputs = session.run(feeds)
    assert list(outputs) == ["output"]
    np.testing.assert_allclose(outputs["output"], bare.run(None, feeds)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "no 'image'"),
        ({"picture": GOOD}, "no 'image', an unexpected 'picture'"),
        ({"image": GOOD, "mask": GOOD}, "an unexpected 'mask'"),
        ({"image": GOOD.astype(np.float64)}, r"expected float32 \?×1×5×6, got float64 1×1×5×6"),
        ({"image": GOOD.astype(">f4")}, "expected float32"),
        ({"image": GOOD[0]}, "got float32 1×5×6"),
        ({"image": GOOD[:, :, :, :5]}, "got float32 1×1×5×5"),
        ({"image": GOOD.tolist()}, "a numpy array, got list"),
    ],
)
def test_feeds_that_do_not_fit_are_named(session: Session, feeds: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        session.run(feeds)


def test_a_fixed_batch_is_checked(tmp_path: Path, onnx_file: Callable[..., Path]) -> None:
    path = onnx_file(tmp_path / "m.onnx", batch=2)
    with load_runtime("onnxruntime").open(path, RuntimeOptions()) as session:
        assert session.run({"image": np.repeat(GOOD, 2, 0)})["output"].shape == (2, 2)
        with pytest.raises(DataError, match="expected float32 2×1×5×6"):
            session.run({"image": GOOD})


def test_a_strided_array_is_fine(session: Session) -> None:
    wide = np.random.default_rng(0).normal(size=(1, 1, 5, 12)).astype(np.float32)
    strided = session.run({"image": wide[:, :, :, ::2]})["output"]
    np.testing.assert_array_equal(strided, session.run({"image": wide[:, :, :, ::2].copy()})["output"])


def test_a_closed_session_says_so(session: Session) -> None:
    session.close()
    with pytest.raises(BundleError, match="closed"):
        session.run({"image": GOOD})


@pytest.mark.parametrize(
    ("versions", "message"),
    [({"ir_version": 99}, "IR version"), ({"opset": 99}, r"[Oo]pset 99")],
)
def test_a_file_from_the_future_names_the_version_of_the_runtime(
    tmp_path: Path, onnx_file: Callable[..., Path], versions: dict[str, int], message: str
) -> None:
    path = onnx_file(tmp_path / "future.onnx", **versions)
    with pytest.raises(BundleError, match=message) as caught:
        load_runtime("onnxruntime").open(path, RuntimeOptions())
    assert f"onnxruntime {onnxruntime.__version__} is too old" in caught.value.hint
    assert "/onnxruntime_src/" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"no protobuf at all", None], ids=["empty", "text", "half"])
def test_a_damaged_file_is_one_error(tmp_path: Path, onnx_file: Callable[..., Path], data: bytes | None) -> None:
    path = onnx_file(tmp_path / "broken.onnx")
    path.write_bytes(path.read_bytes()[:150] if data is None else data)
    with pytest.raises(BundleError, match=r"broken\.onnx"):
        load_runtime("onnxruntime").open(path, RuntimeOptions())


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such file"):
        load_runtime("onnxruntime").open(tmp_path / "none.onnx", RuntimeOptions())


def test_a_provider_that_is_not_there_is_refused(tmp_path: Path, onnx_file: Callable[..., Path]) -> None:
    options = RuntimeOptions(providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    with pytest.raises(BundleError, match="CUDAExecutionProvider"):
        load_runtime("onnxruntime").open(onnx_file(tmp_path / "m.onnx"), options)


def test_a_provider_that_is_offered_but_does_not_load_is_refused(
    tmp_path: Path, onnx_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What onnxruntime does on a board whose CUDA libraries do not load: a log line, and the CPU."""
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **_: real(*a, providers=["CPUExecutionProvider"]))
    path, options = (
        onnx_file(tmp_path / "m.onnx"),
        RuntimeOptions(providers=("CUDAExecutionProvider", "CPUExecutionProvider")),
    )
    with pytest.raises(BundleError, match="CUDAExecutionProvider"):
        load_runtime("onnxruntime").open(path, options)


def test_options_reach_the_runtime(
    tmp_path: Path, onnx_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, Any]] = []
    real = onnxruntime.InferenceSession

    def spy(path: str, settings: Any, providers: list[str], **more: Any) -> Any:
        seen.append((settings, providers))
        return real(path, settings, providers=providers, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    load_runtime("onnxruntime").open(
        onnx_file(tmp_path / "m.onnx"), RuntimeOptions(threads=2, deterministic=True, exact_sums=True)
    ).close()
    settings, providers = seen[0]
    assert (settings.intra_op_num_threads, settings.inter_op_num_threads) == (2, 1)
    assert settings.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert settings.use_deterministic_compute
    assert settings.get_session_config_entry("session.disable_quant_qdq") == "1"
    assert providers == ["CPUExecutionProvider"]
