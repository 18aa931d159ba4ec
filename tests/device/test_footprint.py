"""Memory at each stage and by the runtime's settings: the protocol over a fake executor, and real processes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rowcol_edge.backends import onnx_liveness
from rowcol_edge.device import footprint, system, worker
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.footprint import DEFAULT, ROUNDS, footprint_runs, footprints, variants
from rowcol_edge.device.measure import profile
from rowcol_edge.device.memory import Usage
from rowcol_edge.device.processes import Processes
from rowcol_edge.device.profile import NULL, TWICE, Profile
from rowcol_edge.device.runtimes import RUNTIMES
from rowcol_edge.device.table import profile_table
from rowcol_edge.device.worker import FOOTPRINT, FootprintRun, Request
from rowcol_edge.errors import BundleError

from ..profiles import ENVIRONMENT, MIB, MS, FakeExecutor

LEVELS = {"factored@fp32": 2.0, "dense@fp32": 4.0}
NAMES = [DEFAULT, "no arena", "no memory pattern", "no prepacking", TWICE]


def usage(mib: float) -> Usage:
    return Usage(int(mib * MIB), int(mib * MIB / 2), int(mib * MIB / 4))


def run(slow: float = 1.0, more: float = 0.0, **changes: Any) -> FootprintRun:
    """A run of so many times 4 ms an inference, with so many MiB more once something is loaded."""
    stages = [usage(50), usage(60 + more), usage(64 + more), usage(66 + more)]
    times = tuple(int(4 * MS * slow * (1 + i / 100)) for i in range(5))
    peaks = int((62 + more) * MIB), int((68 + more) * MIB)
    found = FootprintRun("1.20", *stages, *peaks, 20, times, (300 * MS, 320 * MS, 330 * MS, 900 * MS))
    return replace(found, **changes)


class Settings(FakeExecutor):
    """Without the arena it takes 8 MiB less and a tenth longer; nothing else changes anything."""

    def footprint(self, request: Request, where: str) -> FootprintRun:
        self.requests.append(request)
        arena = request.properties.get("enable_cpu_mem_arena") != "0"
        noise = self._random.normal(1.0, 0.002)
        return run(noise, 0.0) if arena else run(1.1 * noise, -8.0)


def ask(bundle: Bundle, **options: Any) -> tuple[Profile, Settings]:
    executor = Settings(LEVELS)
    return profile(bundle, executor=executor, **options), executor


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "environment", lambda: ENVIRONMENT)


@pytest.mark.usefixtures("quiet")
def test_each_setting_runs_in_processes_of_its_own_beside_the_default_and_a_null_arm(bundle: Bundle) -> None:
    bundle.manifest = replace(
        bundle.manifest, runtime=replace(bundle.manifest.runtime, properties={"session.dynamic_block_base": "4"})
    )
    found, executor = ask(bundle, memory=True)
    asked = [request for request in executor.requests if request.mode == FOOTPRINT]
    assert len(asked) == 2 * len(NAMES) * ROUNDS
    assert {request.properties["session.dynamic_block_base"] for request in asked} == {"4"}
    assert [f.variant for f in found.arms["dense@fp32"].footprints] == NAMES
    assert len(asked[: len(asked) // ROUNDS]) == len({(r.arm, str(r.properties)) for r in asked}) + 2  # the null arms
    arena = found.arms["dense@fp32"].footprints[1]
    assert arena.properties == {"enable_cpu_mem_arena": "0", "enable_mem_pattern": "0"}
    assert arena.latency is not None
    assert (arena.latency.verdict, arena.latency.rounds) == ("slower", ROUNDS)
    assert arena.latency.ratio == pytest.approx(1.1, abs=0.01)
    assert found.arms["dense@fp32"].footprints[0].latency is None
    twice = found.arms["dense@fp32"].footprints[-1]
    assert twice.latency is not None
    assert (twice.latency.arm, twice.latency.verdict) == ("null", "no significant difference")
    assert Profile.from_json(found.to_json()) == found


@pytest.mark.usefixtures("quiet")
def test_memory_that_was_asked_for_under_an_emulator_is_warned_of(bundle: Bundle) -> None:
    found, executor = ask(bundle, memory=True, evidence="emulated")
    assert found.warnings == ("memory at each stage: not measured, emulated runs take another machine's memory",)
    assert all(request.mode != FOOTPRINT for request in executor.requests)
    assert ask(bundle, evidence="emulated")[0].warnings == ()


@pytest.mark.usefixtures("quiet")
def test_the_graphs_own_estimate_comes_from_the_manifest(bundle: Bundle) -> None:
    arms = tuple(replace(arm, activation_bytes=5 * MIB * (i + 1)) for i, arm in enumerate(bundle.manifest.arms))
    bundle.manifest = replace(bundle.manifest, arms=arms)
    found, _ = ask(bundle)
    assert {name: arm.activation_bytes for name, arm in found.arms.items()} == {
        "factored@fp32": 5 * MIB, "dense@fp32": 10 * MIB
    }  # fmt: skip


@pytest.mark.usefixtures("quiet")
def test_the_table_says_what_each_stage_takes_and_what_a_setting_saves_and_costs(bundle: Bundle) -> None:
    arms = tuple(replace(arm, activation_bytes=3 * MIB) for arm in bundle.manifest.arms)
    bundle.manifest = replace(bundle.manifest, arms=arms)
    lines = profile_table(ask(bundle, memory=True)[0]).splitlines()
    [rss] = [line for line in lines if line.startswith("dense@fp32, RSS")]
    assert rss.split()[2:] == ["50.0", "60.0", "64.0", "66.0", "62.0", "68.0", "8.00", "3.00"]
    [private] = [line for line in lines if line.startswith("dense@fp32, private")]
    assert private.split()[2:] == ["12.5", "15.0", "16.0", "16.5", "–", "–", "–", "–"]
    [arena] = [line for line in lines if line.startswith("dense@fp32, no arena")]
    assert arena.split()[3:6] == ["-8.0", "-8.0", "-2.0"]
    assert arena.endswith("slower")
    [twice] = [line for line in lines if line.startswith("dense@fp32, default twice")]
    assert twice.split()[3:6] == ["+0.0", "+0.0", "+0.0"]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("options", [{}, {"memory": True, "evidence": "emulated"}])
def test_it_is_asked_for_and_means_nothing_under_an_emulator(bundle: Bundle, options: dict[str, Any]) -> None:
    found, executor = ask(bundle, **options)
    assert {arm.footprints for arm in found.arms.values()} == {()}
    assert not [request for request in executor.requests if request.mode == FOOTPRINT]
    assert "memory of a process" not in profile_table(found)


def test_a_runtime_without_settings_is_measured_as_it_is() -> None:
    assert list(variants("tensorrt")) == [DEFAULT]
    [found] = footprints("tensorrt", {DEFAULT: [run(), run(more=2.0), run(more=4.0)]}, "target")
    assert (found.loaded, found.latency) == (usage(62), None)
    assert (found.peak_bytes, found.running_bytes) == (70 * MIB, 8 * MIB)


def test_what_one_run_does_not_tell_is_not_told() -> None:
    silent = Usage(60 * MIB, None, None)
    [found] = footprints("tensorrt", {DEFAULT: [run(), run(loaded=silent, run_peak_bytes=None)]}, "target")
    assert found.loaded == silent
    assert (found.run_peak_bytes, found.peak_bytes, found.running_bytes) == (None, None, None)


def test_an_effect_that_the_null_arm_shows_too_is_none() -> None:
    slow = [run(1.05 + i / 1000) for i in range(ROUNDS)]
    runs = {DEFAULT: [run() for _ in range(ROUNDS)], "no arena": [run(1.03) for _ in range(ROUNDS)], TWICE: slow}
    found = footprints("onnxruntime", runs, "target")[1]
    assert found.latency is not None
    assert (found.latency.verdict, found.latency.reason) == (
        "no significant difference", "not larger than what the null arm shows"
    )  # fmt: skip


def test_bytes_are_compared_round_by_round() -> None:
    """Another process with the same libraries, which ends half-way, frees or takes nothing."""
    alone = [Usage(66 * MIB, 40 * MIB, (30 if i < 2 else 39) * MIB) for i in range(5)]
    less = [replace(each, private_bytes=(each.private_bytes or 0) - MIB) for each in alone]
    less[2] = replace(less[2], private_bytes=29 * MIB)  # it ended between the two
    found = footprints(
        "onnxruntime", {DEFAULT: [run(steady=each) for each in alone], "no arena": [run(steady=each) for each in less]},
        "target",
    )  # fmt: skip
    assert found[1].beyond(found[0]) == (0, 0, -MIB)
    assert found[1].beyond(replace(found[0], runs=())) == (None, None, None)


def test_arms_and_settings_take_turns() -> None:
    executor, steps = Settings(LEVELS), []
    request = Request("time", "dense@fp32", "onnxruntime", "x.onnx", "golden.npz", {}, 1)
    runs = footprint_runs({"dense@fp32": request, NULL: request}, executor, lambda *step: steps.append(step))
    assert {name: len(of_name) for name, of_name in runs["dense@fp32"].items()} == dict.fromkeys(NAMES, ROUNDS)
    firsts = [str(request.properties) for request in executor.requests[:: len(NAMES)]]
    assert len(set(firsts)) > 2  # no setting is always the first
    assert (steps[0], steps[-1]) == (("footprint", 0, 30), ("footprint", 30, 30))


def test_every_runtime_of_settings_exists() -> None:
    assert set(footprint.VARIANTS) <= set(RUNTIMES)


@pytest.fixture
def wide(tmp_path: Path) -> Callable[..., Request]:
    """A network whose weights (32 MiB) and activations (two of 16 MiB at a time) can be told apart from noise."""
    rows, width, inner = 4096, 1024, 8192
    weights = [np.ones((width, inner), np.float32), np.ones((inner, 1), np.float32)]
    nodes = [
        helper.make_node("Expand", ["image", "shape"], ["rows"]),
        helper.make_node("Relu", ["rows"], ["positive"]),
        helper.make_node("Sigmoid", ["positive"], ["soft"]),
        helper.make_node("ReduceMean", ["soft"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("MatMul", ["mean", "w0"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "w1"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "wide",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, width])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(weights)]
        + [numpy_helper.from_array(np.array([rows, width]), "shape")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "w.onnx")
    np.savez(tmp_path / "golden.npz", image=np.ones((1, width), np.float32))

    def make(**properties: str) -> Request:
        return Request(
            mode=FOOTPRINT, arm="dense@fp32", runtime="onnxruntime", artifact=str(tmp_path / "w.onnx"),
            golden_inputs=str(tmp_path / "golden.npz"), batch={"image": 1}, threads=1, properties=properties,
            run_seconds=0.1, warmup_seconds=0.02, min_samples=2, max_samples=20,
        )  # fmt: skip

    return make


def test_a_real_process_tells_weights_and_activations_apart(wide: Callable[..., Request]) -> None:
    found = Processes({}, 60.0).footprint(wide(), "arm dense@fp32")
    imported, loaded, steady = (stage.resident_bytes for stage in (found.imported, found.loaded, found.steady))
    assert imported is not None
    assert loaded is not None
    assert steady is not None
    assert found.load_peak_bytes is not None
    assert found.run_peak_bytes is not None
    assert loaded - imported > 30 * MIB
    # the kernel keeps the count behind a peak for each core, and adds it up late
    assert found.load_peak_bytes > loaded - MIB
    estimated = onnx_liveness.activation_bytes(Path(wide().artifact))
    assert estimated == 2 * 16 * MIB  # the rows and their ReLU
    assert estimated * 0.9 < found.run_peak_bytes - loaded < estimated * 1.5
    assert found.run_peak_bytes > steady - MIB
    for stage in (found.imported, found.loaded, found.first, found.steady):
        assert stage.private_bytes is not None
        assert stage.proportional_bytes is not None
        assert stage.resident_bytes is not None
        assert stage.private_bytes <= stage.proportional_bytes <= stage.resident_bytes
    assert found.inferences > len(found.samples_ns) >= 2
    curve = found.curve
    assert curve is not None
    assert 0 < curve.times_ns[0] < curve.marks_ns[0] < curve.marks_ns[1] < curve.marks_ns[2] < curve.marks_ns[3]
    assert curve.resident_bytes[0] < imported
    for mark, told in zip(curve.marks_ns[:2], (imported, loaded), strict=True):
        # a reading may be a period behind (more on a busy machine), and the kernel's count lags by some pages a core
        place = bisect_right(curve.times_ns, mark)
        near = curve.resident_bytes[max(0, place - 3) : place + 3]
        assert min(near) - 4 * MIB < told < max(near) + 24 * MIB
    assert max(curve.resident_bytes) > loaded + 12 * MIB
    assert len(curve.times_ns) == len(curve.resident_bytes) < 2000


def test_without_the_arena_a_process_keeps_less_of_an_inference(wide: Callable[..., Request]) -> None:
    processes = Processes({}, 60.0)
    kept = processes.footprint(wide(), "arm dense@fp32")
    given = processes.footprint(wide(**footprint.VARIANTS["onnxruntime"]["no arena"]), "arm dense@fp32, no arena")
    assert kept.steady.private_bytes is not None
    assert given.steady.private_bytes is not None
    # one of the two activations of 16 MiB: the other is kept by the C library
    assert kept.steady.private_bytes - given.steady.private_bytes > 12 * MIB


def test_a_switch_is_on_or_off(wide: Callable[..., Request]) -> None:
    with pytest.raises(BundleError, match="property enable_cpu_mem_arena: expected 1 or 0, got 'no'"):
        worker.run(wide(enable_cpu_mem_arena="no"))
