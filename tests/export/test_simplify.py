from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rowcol_edge import native
from rowcol_edge.errors import StageError
from rowcol_edge.export.onnx import export
from rowcol_edge.export.simplify import simplify


def model(*, redundant: int = 3, hidden: int = 0, output: str = "y", padding: int = 0) -> onnx.ModelProto:
    """y = relu(x + 1) with a chain of foldable nodes and weights beside, at opset 18, IR 9."""
    nodes = [helper.make_node("Identity", ["one"], ["c0"])]
    nodes += [helper.make_node("Identity", [f"c{i}"], [f"c{i + 1}"]) for i in range(redundant)]
    nodes.append(helper.make_node("Add", ["x", f"c{redundant}"], ["sum"]))
    nodes += [helper.make_node("Neg", ["x"], [f"{i}"]) for i in range(hidden)]
    nodes.append(helper.make_node("Relu", ["sum"], [output]))
    constants = [
        numpy_helper.from_array(np.ones(2, np.float32), "one"),
        numpy_helper.from_array(np.ones(500, np.float32), "weights"),
    ]
    if padding:
        constants.append(numpy_helper.from_array(np.zeros(padding, np.float32), "padding"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, 2])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    onnx.save(model(), tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def python(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Put ``code`` in the worker's place; it finds the paths in ``source`` and ``out``."""

    def command(_: str, arguments: Sequence[object]) -> list[str]:
        return [sys.executable, "-c", f"import sys; source, out = sys.argv[1:]; {code}", *map(str, arguments)]

    monkeypatch.setattr(native, "_command", command)


def writing(monkeypatch: pytest.MonkeyPatch, result: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(result, tmp_path / "worker.onnx")
    python(monkeypatch, f"import shutil; shutil.copy({str(tmp_path / 'worker.onnx')!r}, out)")


def test_onnxsim_removes_what_is_not_needed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "onnx.py").write_text("raise SystemExit('imported from the working folder')")
    monkeypatch.chdir(trap)
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "torch.py").write_text("raise SystemExit('imported, though only because it is there')")
    monkeypatch.setenv("PYTHONPATH", str(slow))
    done = simplify(source, tmp_path / "out.onnx")
    assert done.applied, done.reason
    assert (done.nodes_before, done.nodes_after) == (6, 2)
    assert done.size_bytes_after < done.size_bytes_before
    proto = onnx.load(done.path)
    assert (proto.ir_version, [(o.domain, o.version) for o in proto.opset_import]) == (9, [("", 18)])
    session = ort.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.array([[-3, 2]], np.float32)})[0].tolist() == [[0.0, 3.0]]
    assert done.to_dict()["applied"] is True
    assert "path" not in done.to_dict()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", "onnxsim crashed (SIGABRT)"),
        ("import time; time.sleep(60)", "onnxsim took longer than 0.5 s"),
        ("sys.exit(40)", "onnxsim is not installed"),
        ("sys.exit(41)", "onnxsim says that its result computes something else"),
        ("sys.exit('out of ideas')", "onnxsim failed: out of ideas"),
        ("pass", "onnxsim wrote no file"),
        ("open(out, 'wb').write(b'no model')", "onnxsim wrote an invalid model"),
    ],
)
def test_whatever_the_worker_does_the_model_goes_on_as_it_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    python(monkeypatch, code)
    done = simplify(source, tmp_path / "out.onnx", timeout_s=0.5 if "sleep" in code else 60)
    assert not done.applied
    assert done.reason.startswith(reason)
    assert done.nodes_after == done.nodes_before == 6
    assert onnx.load(done.path) == onnx.load(source)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (model(padding=500), "the result grew from"),
        (model(hidden=1), "the result has 7 nodes, more than the 6 before"),
        (model(output="z"), "onnxsim changed the model's interface: outputs y became z"),
    ],
)
def test_a_worse_result_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: onnx.ModelProto, reason: str
) -> None:
    writing(monkeypatch, result, tmp_path)
    done = simplify(source, tmp_path / "out.onnx")
    assert not done.applied
    assert done.reason.startswith(reason)
    assert onnx.load(done.path) == onnx.load(source)


def test_a_result_that_grew_but_is_shallower_is_taken(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing(monkeypatch, model(redundant=0, padding=500), tmp_path)
    done = simplify(source, tmp_path / "out.onnx")
    assert done.applied
    assert done.nodes_after == 3
    assert done.size_bytes_after > done.size_bytes_before


def test_another_opset_is_refused_and_the_ir_version_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = model(redundant=0)
    changed.opset_import[0].version = 19
    writing(monkeypatch, changed, tmp_path)
    assert "expected opset 18, got opset 19" in simplify(source, tmp_path / "out.onnx").reason
    newer = model(redundant=0)
    newer.ir_version = 13
    writing(monkeypatch, newer, tmp_path)
    assert simplify(source, tmp_path / "out.onnx").applied
    assert onnx.load(tmp_path / "out.onnx").ir_version == 9


def test_a_source_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in.onnx").write_bytes(b"no model")
    with pytest.raises(StageError, match=r"reading in\.onnx: expected an ONNX file"):
        simplify(tmp_path / "in.onnx", tmp_path / "out.onnx")
    with pytest.raises(StageError, match=r"reading gone\.onnx"):
        simplify(tmp_path / "gone.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_attention_stays_in_operators_that_every_runtime_has(tmp_path: Path) -> None:
    class Heads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.output = (torch.nn.Linear(12, 12) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (each(x).unflatten(-1, (3, -1)).transpose(1, 2) for each in (self.query, self.key, self.value))
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
            return self.output(mixed.transpose(1, 2).flatten(2))

    export(Heads(), {"x": np.zeros((1, 5, 12), np.float32)}, tmp_path / "m.onnx", opset=18, ir_version=9)
    assert simplify(tmp_path / "m.onnx", tmp_path / "s.onnx").applied
    assert {node.domain for node in onnx.load(tmp_path / "s.onnx").graph.node} == {""}
