"""TFLite at the device: what its runtime does beyond the contract, on files made by hand."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from rowcol_edge.backends import tflite_files, tflite_metadata
from rowcol_edge.device.manifest import TensorSpec
from rowcol_edge.device.runtimes import RuntimeOptions, load_runtime, seal
from rowcol_edge.device.runtimes import tflite as tflite_runtime
from rowcol_edge.errors import BundleError, DataError

OPTIONS = RuntimeOptions(threads=1)


def tensor(name: str, shape: Sequence[int], scale: float = 0.0, zero: int = 0, free: bool = False) -> schema.TensorT:
    made = schema.TensorT()
    made.name, made.shape = name.encode(), list(shape)
    made.type = schema.TensorType.INT8 if scale else schema.TensorType.FLOAT32
    if free:
        made.shapeSignature = [-1, *shape[1:]]
    if scale:
        made.quantization = schema.QuantizationParametersT()
        made.quantization.scale, made.quantization.zeroPoint = [scale], [zero]
    return made


def addition(path: Path, *tensors: schema.TensorT) -> Path:
    """A file that adds its inputs ``b`` and ``a`` (in this order) to ``sum``."""
    model, graph, code, operator = schema.ModelT(), schema.SubGraphT(), schema.OperatorCodeT(), schema.OperatorT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.ADD
    operator.inputs, operator.outputs = [0, 1], [2]
    operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.AddOptions, schema.AddOptionsT()
    graph.tensors, graph.operators, graph.inputs, graph.outputs = list(tensors), [operator], [0, 1], [2]
    signature = schema.SignatureDefT()
    signature.signatureKey = b"serving_default"
    signature.inputs = [schema.TensorMapT(), schema.TensorMapT()]
    signature.outputs = [schema.TensorMapT()]
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [graph], [schema.BufferT()]
    model.signatureDefs = [signature]
    tflite_files.name_signature(model, ["b", "a"], ["sum"])
    path.write_bytes(tflite_metadata.attached(tflite_files.packed(model), {}))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return addition(tmp_path / "sum.tflite", *(tensor(name, (1, 3)) for name in ("b", "a", "sum")))


def test_inputs_come_in_the_order_of_the_graph(path: Path) -> None:
    with load_runtime("tflite").open(path, OPTIONS) as session:
        assert session.inputs == (TensorSpec("b", (1, 3), "float32"), TensorSpec("a", (1, 3), "float32"))
        assert session.outputs == (TensorSpec("sum", (1, 3), "float32"),)


def test_a_file_is_mapped_unless_its_bytes_are_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    interpreter = tflite_runtime.lite.Interpreter

    def watched(**arguments: object) -> object:
        asked.append(arguments)
        return interpreter(**arguments)

    monkeypatch.setattr(tflite_runtime.lite, "Interpreter", watched)
    for properties in ({}, {"model_content": "1"}):
        load_runtime("tflite").open(path, RuntimeOptions(properties=properties)).close()
    assert [(one["model_path"], one["model_content"]) for one in asked] == [
        (str(path), None),
        (None, path.read_bytes()),
    ]
    with pytest.raises(BundleError, match="property speed: expected a delegate"):
        load_runtime("tflite").open(path, RuntimeOptions(properties={"model_content": "1", "speed": "2"}))


def test_a_free_batch_follows_the_feeds(tmp_path: Path) -> None:
    path = addition(tmp_path / "free.tflite", *(tensor(name, (1, 3), free=True) for name in ("b", "a", "sum")))
    with load_runtime("tflite").open(path, OPTIONS) as session:
        assert session.inputs[0] == TensorSpec("b", (None, 3), "float32")
        for samples in (2, 5, 1):
            ones = np.ones((samples, 3), np.float32)
            np.testing.assert_array_equal(session.run({"a": ones, "b": 2 * ones})["sum"], 3 * ones)
        with pytest.raises(DataError, match=r"expected float32 \?×3"):
            session.run({"a": np.ones((2, 4), np.float32), "b": np.ones((2, 3), np.float32)})


def test_integers_inside_are_float32_outside_by_the_tensor_s_own_scale(tmp_path: Path) -> None:
    ports = (tensor("b", (1, 3), 0.5, 3), tensor("a", (1, 3), 0.25, -7), tensor("sum", (1, 3), 1.0, 20))
    with load_runtime("tflite").open(addition(tmp_path / "int8.tflite", *ports), OPTIONS) as session:
        assert {spec.dtype for spec in (*session.inputs, *session.outputs)} == {"float32"}
        # 0.5 · round(1.4 / 0.5) = 1.5; 10,000 is clipped to 0.25 · (127 + 7)
        given = {"b": np.array([[1.4, 2.0, 0.0]], np.float32), "a": np.array([[1.5, 10_000.0, 0.0]], np.float32)}
        [out] = session.infer(given)
        np.testing.assert_allclose(out, [[3.0, 2.0 + 33.5, 0.0]], atol=0.5)
        assert out.dtype == np.float32


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_is_an_error_before_the_interpreter_sees_it(
    path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tflite_runtime, "lite", None)  # whoever reaches the interpreter raises AttributeError
    rng, content = random.Random(seed), bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"sum\.tflite: expected the \.tflite file as it was built"):
        load_runtime("tflite").open(path, OPTIONS)


@pytest.mark.parametrize("lost", [1, 8, 26, 27, 60, 100, 200, 300, 400, 500])
def test_a_file_cut_short_is_an_error(path: Path, lost: int) -> None:
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(BundleError, match=r"sum\.tflite"):
        load_runtime("tflite").open(path, OPTIONS)


def test_the_seal_is_the_crc32_of_all_before_it() -> None:
    content = seal.sealed(b"model" + seal.MARK + seal.BLANK)
    assert content[-8:] == b"%08x" % zlib.crc32(content[:-8])


@pytest.mark.parametrize(
    ("package", "version", "oldest", "good"),
    [
        ("tflite-runtime", "2.14.0", "2.14.0", True),
        ("tflite-runtime", "2.13.1", "2.14.0", False),
        ("ai-edge-litert", "1.0.1", "2.14.0", True),
        ("ai-edge-litert", "2.3.0", "2.14.0", True),
        ("ai-edge-litert", "1.0.1", "2.17.0", True),
    ],
)
def test_ai_edge_litert_is_newer_than_every_tflite_runtime(
    package: str, version: str, oldest: str, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tflite_runtime.TfliteRuntime()
    monkeypatch.setattr(tflite_runtime.TfliteRuntime, "package", package)
    monkeypatch.setattr(tflite_runtime.TfliteRuntime, "version", lambda _: version)
    assert runtime.fulfils(oldest) is good


def test_a_library_that_is_no_delegate_is_refused(path: Path) -> None:
    with pytest.raises(BundleError, match=r"delegate libc\.so\.6.*is no TFLite delegate"):
        load_runtime("tflite").open(path, RuntimeOptions(providers=("libc.so.6",)))


def test_a_delegate_that_takes_nothing_is_no_silent_run_on_the_processor(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tflite_runtime, "_delegate", lambda *_: None)
    monkeypatch.setattr(tflite_runtime, "_delegated", lambda _: False)
    real = tflite_runtime.lite.Interpreter
    monkeypatch.setattr(
        tflite_runtime.lite, "Interpreter", lambda **more: real(**{**more, "experimental_delegates": None})
    )
    with pytest.raises(BundleError, match=r"delegate libnpu\.so: .*takes none"):
        load_runtime("tflite").open(path, RuntimeOptions(providers=("libnpu.so",)))
    load_runtime("tflite").open(path, RuntimeOptions(providers=("libnpu.so", "CPU"))).close()


def test_properties_are_a_delegate_s_options(path: Path) -> None:
    with pytest.raises(BundleError, match="property cache: expected a delegate"):
        load_runtime("tflite").open(path, RuntimeOptions(providers=("CPU",), properties={"cache": "x"}))


@pytest.mark.parametrize(("version", "numpy", "loads"), [
    ("2.14.0", "2.1.0", False), ("2.14.0", "1.26.4", True), ("2.16.2", "2.1.0", True),
])  # fmt: skip
def test_only_the_tflite_runtime_of_pypi_is_refused_beside_numpy_2(
    tmp_path: Path, version: str, numpy: str, loads: bool
) -> None:
    for name, text in (
        ("tflite_runtime/__init__.py", f"__version__ = '{version}'"),
        ("tflite_runtime/interpreter.py", ""),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code = (
        "import sys; sys.modules['ai_edge_litert'] = None; import numpy; "
        f"numpy.__version__ = '{numpy}'; import rowcol_edge.device.runtimes.tflite as t; print(t.RUNTIME.package)"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == loads, done.stderr
    assert loads or f"numpy before 2, which tflite-runtime {version} was built for" in done.stderr


@pytest.mark.parametrize(("other", "package"), [(True, "tflite-runtime"), (False, "")])
def test_tflite_runtime_is_used_where_ai_edge_litert_does_not_load(tmp_path: Path, other: bool, package: str) -> None:
    broken = "raise ImportError('/lib/libstdc++.so.6: version GLIBCXX_3.4.32 not found')"
    files = {
        "ai_edge_litert/__init__.py": "__version__ = '2.3.0'",
        "ai_edge_litert/interpreter.py": broken,
        "tflite_runtime/__init__.py": "__version__ = '2.16.2'",
        "tflite_runtime/interpreter.py": "class Interpreter: pass",
    }
    for name, text in files.items():
        if other or name.startswith("ai_edge_litert"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
    code = (
        "import rowcol_edge.device.installed as i; print(i.load('tflite').module.replace('_', '-'))\n"
        "import rowcol_edge.device.runtimes.tflite as t; print(t.RUNTIME.package)"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [package] * 2 if other else done.stdout.split() == [], done.stderr
    assert other or "expected a version that loads on this machine, got /lib/libstdc++" in done.stderr
