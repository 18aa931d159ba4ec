"""The sequence of calls, the cache and the errors of the TensorRT runtime, against a stand-in for TensorRT.

See `fake_nvidia`: whether TensorRT itself takes a model is not tested here, nor anywhere else without a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rowcol_edge.device.engines import build_engines, prepare
from rowcol_edge.device.main import main
from rowcol_edge.device.manifest import TensorSpec
from rowcol_edge.device.runtimes import ENGINE_BUILDERS, RUNTIMES, RuntimeOptions, load_runtime
from rowcol_edge.errors import BundleError, DataError, MeasurementError, MissingDependencyError, RowcolError

from . import fake_nvidia
from .fake_nvidia import Libcudart, installed

ONE = np.random.default_rng(0).normal(size=(1, 1, 5, 6)).astype(np.float32)
OPTIONS = RuntimeOptions(providers=("cuda:0",))


@pytest.fixture
def trt() -> Any:
    return fake_nvidia.make()


@pytest.fixture
def library() -> Libcudart:
    return Libcudart()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ROWCOL_ENGINE_CACHE", str(folder))
    return folder


@pytest.fixture
def runtime(trt: Any, library: Libcudart, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with installed(monkeypatch, trt, library) as runtime:
        yield runtime


@pytest.fixture
def model(tmp_path: Path, onnx_file: Callable[..., Path]) -> Path:
    return onnx_file(tmp_path / "arm@fp32.onnx")


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """x through Q/DQ to a sum."""
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("ReduceSum", ["d", "axes"], ["output"], keepdims=0),
    ]
    constants = {"s": np.float32(0.05), "z": np.int8(0), "axes": np.array([1, 2])}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 5, 6])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 6])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    path = tmp_path / "arm@int8.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def expected(model: Path, images: np.ndarray) -> np.ndarray:
    with load_runtime("onnxruntime").open(model, RuntimeOptions(threads=1)) as session:
        return session.run({"image": images})["output"]


def test_outputs_are_copied_back_for_any_batch_up_to_the_largest(runtime: Any, model: Path, library: Libcudart) -> None:
    with runtime.open(model, OPTIONS) as session:
        assert session.inputs == (TensorSpec("image", (None, 1, 5, 6), "float32"),)
        assert session.outputs == (TensorSpec("output", (None, 2), "float32"),)
        first = session.run({"image": ONE})["output"]
        kept = first.copy()
        for batch in (8, 3, 1):
            images = np.random.default_rng(batch).normal(size=(batch, 1, 5, 6)).astype(np.float32)
            outputs = session.run({"image": images})
            np.testing.assert_allclose(outputs["output"], expected(model, images), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(first, kept)
        strided = np.repeat(ONE, 2, axis=3)[:, :, :, ::2]
        np.testing.assert_array_equal(session.run({"image": strided})["output"], kept)
        with pytest.raises(DataError, match=r"input 'image': expected a batch of 1 to 8, got 9 – a larger max_batch"):
            session.run({"image": np.repeat(ONE, 9, 0)})
        with pytest.raises(DataError, match="expected a batch of 1 to 8, got 0"):
            session.run({"image": ONE[:0]})
        with pytest.raises(DataError, match="no 'image'"):
            session.run({})
    assert (library.memory, library.streams) == ({}, set())
    assert not [call for call in library.calls if call.startswith("misuse")]
    with pytest.raises(BundleError, match="an open session, got one that was closed"):
        session.run({"image": ONE})


def test_layers_report_their_times_and_what_they_were_made_of(
    runtime: Any, trt: Any, model: Path, library: Libcudart
) -> None:
    trt.told.layers = {"stem/Conv + stem/Relu": 0.25, "copy": 0.0015}
    with runtime.open_profiled(model, OPTIONS) as profiler:
        for _ in range(3):
            np.testing.assert_allclose(profiler.run({"image": ONE})[0], expected(model, ONE), rtol=1e-5, atol=1e-6)
        found = profiler.operators()
    assert [(each.name, each.origins, each.runs_ns) for each in found] == [
        ("stem/Conv + stem/Relu", ("stem/Conv", "stem/Relu"), (250_000,) * 3),
        ("copy", ("copy",), (1_500,) * 3),
    ]
    assert (library.memory, library.streams) == ({}, set())


def test_a_device_that_reports_no_layers_is_one_error(runtime: Any, model: Path) -> None:
    with runtime.open_profiled(model, OPTIONS) as profiler:
        profiler.run({"image": ONE})
        with pytest.raises(MeasurementError, match="layers that report their times, got none in 1 inferences"):
            profiler.operators()


def test_a_file_without_quantizers_is_built_strongly_typed(runtime: Any, trt: Any, model: Path) -> None:
    runtime.open(model, OPTIONS).close()
    assert (trt.told.typing, trt.told.flags) == ([True], set())  # TF32, on by default, was cleared
    assert trt.told.order == ["plugins"]


def test_a_file_with_quantizers_is_built_for_int8_with_float16_beside_it(
    runtime: Any, trt: Any, quantized: Path
) -> None:
    with runtime.open(quantized, OPTIONS) as session:
        np.testing.assert_allclose(session.run({"image": ONE})["output"], expected(quantized, ONE), rtol=1e-6)
    assert (trt.told.typing, trt.told.flags) == ([True, False], {trt.BuilderFlag.INT8, trt.BuilderFlag.FP16})
    assert trt.told.profiles == []  # no size is free


def test_the_properties_of_the_target_reach_the_builder(runtime: Any, trt: Any, model: Path) -> None:
    properties = {"max_batch": "2", "tf32": "1", "builder_optimization_level": "5", "workspace_mib": "64"}
    with (
        runtime.open(model, RuntimeOptions(properties=properties)) as session,
        pytest.raises(DataError, match="1 to 2"),
    ):
        session.run({"image": np.repeat(ONE, 3, 0)})
    assert trt.told.profiles == [{"image": [[1, 1, 5, 6], [1, 1, 5, 6], [2, 1, 5, 6]]}]
    assert (trt.told.flags, trt.told.level, trt.told.workspace) == ({trt.BuilderFlag.TF32}, 5, 64 << 20)


@pytest.mark.parametrize(
    ("properties", "message"),
    [({"max_batches": "2"}, "did you mean max_batch"), ({"tf32": "yes"}, "expected a whole number, got 'yes'")],
)
def test_another_property_is_refused(runtime: Any, model: Path, properties: dict[str, str], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        runtime.open(model, RuntimeOptions(properties=properties))


def test_the_second_opening_takes_the_engine_from_the_cache(
    runtime: Any, trt: Any, model: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = runtime.build_engine(model, OPTIONS)
    assert built.seconds > 0
    assert built.path is not None
    assert built.path.parent == cache
    shown = capsys.readouterr().err
    assert "arm@fp32: building the engine, Building Engine 12/12" in shown
    assert "Optimizing" not in shown  # a phase of three steps
    found = runtime.build_engine(model, OPTIONS)
    assert (found.path, found.seconds) == (built.path, 0.0)
    runtime.open(model, OPTIONS).close()
    assert trt.told.builds == 1
    assert capsys.readouterr().err == ""


def test_another_model_or_setting_is_another_engine_with_the_same_timings(
    runtime: Any, trt: Any, tmp_path: Path, model: Path, onnx_file: Callable[..., Path]
) -> None:
    runtime.open(model, OPTIONS).close()
    runtime.open(onnx_file(tmp_path / "other.onnx", seed=1), OPTIONS).close()
    runtime.open(model, RuntimeOptions(properties={"max_batch": "2"})).close()
    assert trt.told.builds == 3
    assert trt.told.timings == [b"", b"t", b"tt"]


def test_a_damaged_engine_is_built_again_and_never_handed_over(runtime: Any, trt: Any, model: Path) -> None:
    path = runtime.build_engine(model, OPTIONS).path
    path.write_bytes(path.read_bytes()[:-9])
    loads = trt.told.loads
    runtime.open(model, OPTIONS).close()
    assert (trt.told.builds, trt.told.loads) == (2, loads + 1)


def test_an_engine_of_another_version_is_built_again(
    trt: Any, library: Libcudart, cache: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key names the version; an engine that got under the wrong key is refused by TensorRT itself."""
    newer = fake_nvidia.make("10.7.0")
    with installed(monkeypatch, trt, library) as runtime:
        old = runtime.build_engine(model, OPTIONS).path
    with installed(monkeypatch, newer, library) as runtime:
        new = runtime.build_engine(model, OPTIONS).path
        assert old != new
        new.write_bytes(old.read_bytes())
        new.with_suffix(".json").write_bytes(old.with_suffix(".json").read_bytes())
        runtime.open(model, OPTIONS).close()
        assert newer.told.builds == 2
        runtime.open(model, OPTIONS).close()
        assert newer.told.builds == 2


def test_another_gpu_gets_an_engine_of_its_own(
    trt: Any, cache: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, capability in ((b"Orin", (8, 7)), (b"Orin NX", (8, 7)), (b"Orin", (8, 9))):
        with installed(monkeypatch, trt, Libcudart(name=name, capability=capability)) as runtime:
            runtime.build_engine(model, OPTIONS)
    assert trt.told.builds == 3


def test_an_engine_that_cannot_be_kept_runs_with_a_warning(
    runtime: Any, model: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.write_text("a file where the folder should be")
    with runtime.open(model, OPTIONS) as session:
        assert session.run({"image": ONE})["output"].shape == (1, 2)
    assert "warning: the engine cannot be kept" in capsys.readouterr().err
    assert runtime.build_engine(model, OPTIONS).path is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("gpu", r"tensorrt 10\.3\.0: expected a GPU that it can use, got CUDA initialization failure with error: 35"),
        (
            "parse",
            r"arm@fp32: expected a model that TensorRT 10\.3\.0 can read, got In node 3 \(importFoo\): UNSUPPORTED",
        ),
        ("build", r"arm@fp32: expected an engine from TensorRT 10\.3\.0, got Error Code 10: Could not find any impl"),
        ("deserialize", r"arm@fp32\.onnx: expected an engine that TensorRT 10\.3\.0 loads, got Error Code 6"),
        ("context", r"arm@fp32\.onnx on tensorrt 10\.3\.0: expected memory on the GPU for the engine"),
    ],
)
def test_what_tensorrt_says_of_a_failure_is_in_the_error(
    runtime: Any, trt: Any, library: Libcudart, model: Path, broken: str, message: str, cache: Path
) -> None:
    trt.told.broken = broken
    with pytest.raises(BundleError, match=message) as caught:
        runtime.open(model, OPTIONS)
    assert "a warning that nobody needs" not in str(caught.value)
    assert (library.memory, library.streams) == ({}, set())


def test_a_run_that_fails_is_an_error(runtime: Any, trt: Any, model: Path) -> None:
    with runtime.open(model, OPTIONS) as session:
        trt.told.broken = "execute"
        with pytest.raises(BundleError, match="expected a run on valid inputs, got no reason given"):
            session.run({"image": ONE})


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaStreamCreate", "cudaMemcpyAsync"])
def test_a_full_gpu_is_an_error_and_leaves_nothing(runtime: Any, library: Libcudart, model: Path, call: str) -> None:
    library.fail[call] = 2
    with pytest.raises(BundleError, match=f"CUDA: {call}: .* out of memory"), runtime.open(model, OPTIONS) as session:
        session.run({"image": ONE})
    assert (library.memory, library.streams) == ({}, set())


def test_ctrl_c_ends_the_build_and_keeps_nothing(runtime: Any, trt: Any, model: Path, cache: Path) -> None:
    trt.told.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        runtime.open(model, OPTIONS)
    assert not cache.exists()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_model_cut_short_is_one_error(runtime: Any, model: Path, keep: float) -> None:
    whole = model.read_bytes()
    model.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(BundleError, match="arm@fp32: expected a model that TensorRT"):
        runtime.open(model, OPTIONS)


def test_no_file_and_no_such_device_are_refused(runtime: Any, tmp_path: Path, model: Path) -> None:
    with pytest.raises(BundleError, match="no such file"):
        runtime.open(tmp_path / "none.onnx", OPTIONS)
    with pytest.raises(BundleError, match=r"device Abacus: expected a GPU such as cuda:0"):
        runtime.open(model, RuntimeOptions(providers=("Abacus",)))
    with pytest.raises(BundleError, match="device cuda:1: expected one of 1"):
        runtime.open(model, RuntimeOptions(providers=("cuda:1",)))


def test_another_major_version_is_refused(library: Libcudart, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        installed(monkeypatch, fake_nvidia.make("11.0.0"), library) as runtime,
        pytest.raises(BundleError, match=r"package tensorrt: expected version 10, got 11\.0\.0"),
    ):
        runtime.open(model, OPTIONS)


def test_without_tensorrt_the_error_has_jetpacks_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    sys.modules.pop(RUNTIMES["tensorrt"], None)
    sys.modules.pop(f"{RUNTIMES['tensorrt']}_build", None)
    with pytest.raises(
        MissingDependencyError, match=r"sudo apt-get install python3-libnvinfer; .*system-site-packages"
    ):
        load_runtime("tensorrt")


def test_bindings_without_their_library_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    for name in (RUNTIMES["tensorrt"], f"{RUNTIMES['tensorrt']}_build"):
        sys.modules.pop(name, None)
    with pytest.raises(RowcolError, match=r"package tensorrt: .* got libnvinfer\.so\.10: cannot open"):
        load_runtime("tensorrt")


@pytest.fixture
def board_bundle(bundle_parts: dict[str, Any], tmp_path: Path) -> Path:
    from dataclasses import replace

    from rowcol_edge.package import write_bundle

    manifest = bundle_parts["manifest"]
    entry = replace(manifest.runtime, name="tensorrt", oldest="10.3.0", providers=("cuda:0",))
    return write_bundle(tmp_path / "board", **{**bundle_parts, "manifest": replace(manifest, runtime=entry)})


def test_engine_builds_those_of_all_arms_ahead_of_time(
    runtime: Any, trt: Any, board_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["engine", str(board_bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["factored@fp32", "dense@fp32"]
    assert all("built in" in line for line in lines)
    assert main(["engine", str(board_bundle), "--arms", "dense@fp32"]) == 0
    assert "dense@fp32: found" in capsys.readouterr().out
    assert main(["verify", str(board_bundle)]) == 0
    assert trt.told.builds == 2


def test_an_older_tensorrt_than_promised_is_refused_before_anything_is_built(
    library: Libcudart, cache: Path, board_bundle: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with installed(monkeypatch, fake_nvidia.make("10.0.1"), library):
        assert main(["engine", str(board_bundle)]) == 2
    assert "package tensorrt: expected 10.3.0 or newer, got 10.0.1" in capsys.readouterr().err
    assert not cache.exists()


def test_a_bundle_for_another_runtime_needs_no_engine(bundle: Any) -> None:
    with pytest.raises(BundleError, match="engine: expected a bundle for tensorrt, got one for onnxruntime"):
        list(build_engines(bundle))
    prepare(bundle, ["dense@fp32"])  # nothing to do


def test_the_table_of_engine_builders_names_runtimes(runtime: Any) -> None:
    assert set(RUNTIMES) >= ENGINE_BUILDERS
    assert hasattr(runtime, "build_engine")
