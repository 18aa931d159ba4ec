"""Files that take short turns: what they share of a machine's moods is in no ratio."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from rowcol_edge.device.profile import NULL
from rowcol_edge.device.stats import NO_DIFFERENCE, NOT_COMPARABLE, SLOWER
from rowcol_edge.device.worker import TIME, Request
from rowcol_edge.errors import MeasurementError


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(root / "tools")
    return importlib.import_module("benchmark_turns")


def request_for(arm: str, artifact: Path, inputs: Path) -> Request:
    return Request(TIME, arm, "onnxruntime", str(artifact), str(inputs), {"x": 1}, 1, ("CPUExecutionProvider",))


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "inputs.npz"
    np.savez(path, x=np.ones((1, 8), np.float32))
    return path


@pytest.fixture
def product(tmp_path: Path) -> Path:
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 8]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "product.onnx")
    return tmp_path / "product.onnx"


def test_each_file_has_as_many_turns(
    script: ModuleType, product: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "_TURN_SECONDS", 0.001)
    medians = script._round({arm: request_for(arm, product, inputs) for arm in ("tied", "untied")})
    assert {arm: len(each) for arm, each in medians.items()} == {"tied": 2, "untied": 2}
    assert all(median > 0 for each in medians.values() for median in each)


def test_the_first_inference_of_a_turn_does_not_count(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cold:
        def __init__(self, arm: str, _: Request) -> None:
            self.pace = 20_000_000 if arm == "tied" else 10_000_000

        def __enter__(self) -> Cold:
            return self

        def __exit__(self, *_: object) -> None: ...

        def inferences(self, count: int) -> list[int]:
            return [1_000_000_000, *[self.pace] * (count - 1)]

    monkeypatch.setattr(script, "_File", Cold)
    medians = script._round({arm: request_for(arm, Path("a.onnx"), Path("g.npz")) for arm in ("tied", "untied")})
    assert medians == {"tied": [2e7, 2e7], "untied": [1e7, 1e7]}


def test_what_slows_all_for_a_while_is_in_no_ratio(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    moods = iter(np.random.default_rng(0).uniform(1.0, 3.0, (6, 6)))
    hit = np.array([1.0, 1.0, 1.5, 1.0, 1.0, 1.5])  # two turns of one arm alone
    seen: list[tuple[str, ...]] = []

    def played(requests: dict[str, Request]) -> dict[str, list[float]]:
        seen.append(tuple(requests))
        mood = next(moods)
        return {arm: (mood * (1.02e6 * hit if arm == "tied" else 1e6)).tolist() for arm in requests}

    monkeypatch.setattr(script, "_round", played)
    requests = {arm: request_for(arm, Path("a.onnx"), Path("g.npz")) for arm in ("tied", "untied", NULL)}
    judged = script.take_turns(requests, "untied", 6).judged("target")
    [tied] = judged.comparisons
    assert (tied.arm, tied.baseline, tied.rounds) == ("tied", "untied", 6)
    assert (tied.ci_low, tied.ci_high) == (pytest.approx(1.02), pytest.approx(1.02))
    assert judged.null.ratio == pytest.approx(1.0)
    assert len(set(seen)) == 6  # each order once


@pytest.mark.parametrize(
    ("null", "verdict"),
    [
        (np.linspace(0.98, 1.02, 6), SLOWER),  # undisturbed
        (np.linspace(1.005, 1.02, 6), SLOWER),  # disturbed by less than what was found
        (np.linspace(0.94, 0.96, 6), NO_DIFFERENCE),
    ],
)
def test_what_is_no_larger_than_the_null_arm_shows_is_no_finding(
    script: ModuleType, null: np.ndarray, verdict: str
) -> None:
    turns = script.Turns("untied", {"tied": [1.03, 1.035, 1.04, 1.04, 1.045, 1.05], NULL: null.tolist()})
    [tied] = turns.judged("target").comparisons
    assert tied.verdict == verdict


def test_times_of_an_emulated_machine_are_compared_with_nothing(script: ModuleType) -> None:
    [tied] = script.Turns("untied", {"tied": [1.5] * 6, NULL: [1.0] * 6}).judged("emulated").comparisons
    assert tied.verdict == NOT_COMPARABLE


def test_a_process_that_ends_is_an_error_with_its_arm(script: ModuleType, tmp_path: Path, inputs: Path) -> None:
    missing = request_for("tied", tmp_path / "none.onnx", inputs)
    with pytest.raises(MeasurementError, match=r"arm tied: .*exit code 1: .*none\.onnx"):
        script.take_turns({"tied": missing, "untied": missing}, "untied", 6)


def test_so_is_one_that_had_ended_before_it_is_asked(script: ModuleType, tmp_path: Path, inputs: Path) -> None:
    with script._File("tied", request_for("tied", tmp_path / "none.onnx", inputs)) as file:
        file._process.wait()
        with pytest.raises(MeasurementError, match="arm tied: "):
            file.inferences(1)


def test_one_that_hangs_is_an_error(
    script: ModuleType, product: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "_TIMEOUT_SECONDS", 0.0)
    with (
        script._File("tied", request_for("tied", product, inputs)) as file,
        pytest.raises(MeasurementError, match=r"arm tied: .*times within 0 s"),
    ):
        file.inferences(1)
