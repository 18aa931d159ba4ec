"""The time of operators: the protocol over a fake executor, what is made of it, and real processes."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rowcol_edge.device import layers, system
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.layer_times import LOST, OPEN, WON, ArmOperators, LayerTime, OperatorsRun, compare, of_arm
from rowcol_edge.device.layers import MODEL, FileLayer, FileOperator, LayerMap
from rowcol_edge.device.measure import profile
from rowcol_edge.device.operator_table import TOP, share_text, side_by_side
from rowcol_edge.device.operators import ROUNDS
from rowcol_edge.device.processes import Processes
from rowcol_edge.device.profile import Profile
from rowcol_edge.device.roofline import Peaks
from rowcol_edge.device.runtimes import RuntimeOptions, onnxruntime_profiler
from rowcol_edge.device.runtimes.base import OperatorRuns
from rowcol_edge.device.runtimes.onnxruntime import OnnxRuntime
from rowcol_edge.device.table import profile_table
from rowcol_edge.device.worker import OPERATORS, PEAKS, Request
from rowcol_edge.errors import BundleError, MeasurementError
from rowcol_edge.package import write_bundle

from ..profiles import ENVIRONMENT, MS, FakeExecutor, make_operators, with_arms

LEVELS = {"factored@fp32": 2.0, "dense@fp32": 4.0}
MACHINE = Peaks(1e9, 5e9, 1, "made up")


def layer_map(form: str, macs: int) -> LayerMap:
    return LayerMap(
        (FileLayer("linear", form, 8 if form != "dense" else None, macs, 1_000),),
        (FileOperator("linear/MatMul", "MatMul", 0, macs), FileOperator("Flatten", "Flatten", 0, 0)),
    )


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "environment", lambda: ENVIRONMENT)


@pytest.fixture
def mapped(bundle_parts: dict[str, Any], tmp_path: Path) -> Bundle:
    maps = {"factored@fp32": layer_map("project (column)", 2_000_000), "dense@fp32": layer_map("dense", 8_000_000)}
    extra = {layers.path(arm): found.to_json().encode() for arm, found in maps.items()}
    return Bundle.open(write_bundle(tmp_path / "mapped", **bundle_parts, extra=extra))


@pytest.mark.usefixtures("quiet")
def test_each_arm_is_profiled_in_processes_of_its_own_and_layers_are_set_side_by_side(mapped: Bundle) -> None:
    executor = FakeExecutor(LEVELS)
    measured = profile(mapped, ops=True, executor=executor)
    modes = [request.mode for request in executor.requests]
    assert (modes.count(PEAKS), modes.count(OPERATORS)) == (2, 3 * ROUNDS)  # two arms and the null arm
    assert measured.operators_note == ""
    found = measured.operators
    assert found is not None
    dense = found.arms["dense@fp32"]
    assert dense.attributed == pytest.approx(8 / 9)
    assert dense.total_ns == pytest.approx(0.9 * dense.inference_ns, rel=0.05)
    [layer] = dense.layers
    assert layer.ns == pytest.approx(0.8 * 4 * MS, rel=0.05)
    assert len(layer.rounds_ns) == ROUNDS
    # 8 million multiply-accumulates at 5 a ns, against 1,000 bytes at one
    assert (layer.bound, layer.least_ns) == ("compute", pytest.approx(1.6 * MS))
    assert layer.reached == pytest.approx(0.5, abs=0.03)
    [pair] = found.comparisons
    assert (pair.layer, pair.arm, pair.baseline, pair.verdict) == ("linear", "factored@fp32", "dense@fp32", WON)
    assert pair.ratio == pytest.approx(0.5, abs=0.02)
    assert (found.null_layers, found.null_verdicts) == (1, 0)
    assert Profile.from_json(measured.to_json()) == measured


@pytest.mark.usefixtures("quiet")
def test_the_processors_peaks_are_not_held_against_an_accelerator(mapped: Bundle) -> None:
    runtime = replace(mapped.manifest.runtime, providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    mapped.manifest = replace(mapped.manifest, runtime=runtime)
    measured = profile(mapped, ops=True, executor=FakeExecutor(LEVELS))
    assert measured.operators is not None
    layers_found = [layer for arm in measured.operators.arms.values() for layer in arm.layers]
    assert [(layer.least_ns, layer.bound, layer.reached) for layer in layers_found] == [(None, "", None)] * 2
    assert Profile.from_json(measured.to_json()) == measured


@pytest.mark.usefixtures("quiet")
def test_the_table_names_layers_what_won_and_what_is_elsewhere(mapped: Bundle) -> None:
    text = profile_table(profile(mapped, ops=True, executor=FakeExecutor(LEVELS)))
    assert "machine at most, 1 thread(s): 1.0 GB/s, 5.0 GMAC/s in float32 (made up)" in text
    assert "88.9% of it in layers of the model" in text
    assert "null arm: 0 of 1 layers came out won or lost" in text
    [row] = [line for line in text.splitlines() if line.startswith("linear ")]
    assert row.split()[1:5] == ["project", "(column),", "rank", "8"]
    assert " won " in row
    assert row.split()[-7:-2] == ["8.0", "M", "2.0", "M", "compute"]
    [rest] = [line for line in text.splitlines() if line.startswith("elsewhere")]
    assert rest.split()[:2] == ["elsewhere", "–"]


@pytest.mark.usefixtures("quiet")
def test_a_bundle_without_layers_has_all_its_time_elsewhere(bundle: Bundle) -> None:
    found = profile(bundle, ops=True, executor=FakeExecutor(LEVELS)).operators
    assert found is not None
    assert [(arm.attributed, arm.layers) for arm in found.arms.values()] == [(0.0, ()), (0.0, ())]
    assert found.comparisons == ()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("options", "note"),
    [({}, "not asked for"), ({"ops": True, "evidence": "emulated"}, "emulated runs take another machine's time")],
)
def test_it_is_asked_for_and_means_nothing_under_an_emulator(
    bundle: Bundle, options: dict[str, Any], note: str
) -> None:
    executor = FakeExecutor(LEVELS)
    found = profile(bundle, executor=executor, **options)
    assert (found.operators, found.operators_note) == (None, note)
    assert not [request for request in executor.requests if request.mode in (OPERATORS, PEAKS)]
    assert ("operators: not measured" in profile_table(found)) is bool(options)


@pytest.mark.usefixtures("quiet")
def test_a_runtime_without_a_profiler_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "unprofiled", lambda self: "this build has no profiler")
    found = profile(bundle, ops=True, executor=FakeExecutor(LEVELS))
    assert (found.operators, found.operators_note) == (None, "this build has no profiler")
    assert "operators: not measured (this build has no profiler)" in profile_table(found)


@pytest.mark.parametrize(
    ("mine", "its", "verdict"),
    [
        ((1.0, 1.2, 1.1, 1.0, 1.1, 1.3), (1.4, 1.5, 1.4, 1.6, 1.5, 1.4), WON),
        ((1.4, 1.5, 1.4, 1.6, 1.5, 1.4), (1.0, 1.2, 1.1, 1.0, 1.1, 1.3), LOST),
        ((1.0, 1.2, 1.1, 1.0, 1.1, 1.45), (1.4, 1.5, 1.4, 1.6, 1.5, 1.4), OPEN),
        ((0.0, 1.2, 1.1, 1.0, 1.1, 1.1), (1.4, 1.5, 1.4, 1.6, 1.5, 1.4), OPEN),
    ],
)
def test_nothing_is_said_where_ranges_overlap(mine: tuple[float, ...], its: tuple[float, ...], verdict: str) -> None:
    scaled = [tuple(ms * MS for ms in times) for times in (mine, its)]
    one, other = (LayerTime("l", "dense", None, 1, 1, sorted(t)[2], t, 1.0, "memory") for t in scaled)
    found = compare(one, other, "factored@int8", "dense@int8")
    assert found.verdict == verdict
    assert (found.ratio is None) is (min(mine) == 0)


def test_nothing_is_said_of_what_is_shorter_than_runtimes_count() -> None:
    two, one = (LayerTime("l", "dense", None, 1, 1, ns, (ns,) * 6, 1.0, "memory") for ns in (2_000.0, 1_000.0))
    found = compare(one, two, "factored@int8", "dense@int8")
    assert (found.verdict, found.ratio) == (OPEN, pytest.approx(0.5))


def test_nothing_is_said_of_a_layer_whose_products_are_elsewhere_in_one_arm() -> None:
    slow, fast = (LayerTime("l", "dense", None, macs, 1, t, (t,) * 6, 1.0, "memory") for macs, t in ((9, MS), (0, 9.0)))
    assert compare(fast, slow, "factored@int8", "dense@int8").verdict == OPEN
    assert compare(replace(fast, macs=9), slow, "factored@int8", "dense@int8").verdict == WON


def test_what_the_models_own_code_does_is_in_no_layer() -> None:
    known = layer_map("dense", 10)
    known = replace(known, layers=(*known.layers, FileLayer(MODEL, "dense", None, 0, 0)),
                    operators=(known.operators[0], replace(known.operators[1], layer=1)))  # fmt: skip
    runs = (
        OperatorRuns("linear/MatMul", "MatMul", ("linear/MatMul",), (30_000,) * 4),
        OperatorRuns("Flatten", "Flatten", ("Flatten",), (10_000,) * 4),
    )
    found = of_arm([OperatorsRun("1", (50_000,) * 4, runs)] * 3, known, MACHINE, 50_000.0)
    assert ([layer.layer for layer in found.layers], found.attributed) == (["linear", MODEL], 0.75)


def test_operators_of_one_layer_add_up_within_an_inference() -> None:
    runs = (
        OperatorRuns("linear/MatMul", "MatMul", ("linear/MatMul",), (10, 30, 10, 10)),
        OperatorRuns("Flatten", "Flatten", ("Flatten",), (30, 10, 30, 30)),
        OperatorRuns("Reorder", "Reorder", ("Reorder",), (5, 5, 5, 5)),
    )
    found = of_arm([OperatorsRun("1", (50,) * 4, runs)] * 3, layer_map("dense", 10), MACHINE, 48.0)
    assert (found.layers[0].ns, found.elsewhere_ns, found.total_ns, found.inference_ns) == (40.0, 5.0, 45.0, 50.0)
    assert [(o.origin, o.layer) for o in found.operators] == [
        ("linear/MatMul", "linear"), ("Flatten", "linear"), ("", "")
    ]  # fmt: skip


def arm_of(times_us: tuple[int, ...], latency_us: float, slowed: int = 0) -> ArmOperators:
    """One layer of so many operators, each of so many µs, of which the profiler counts 3 µs too many; so many of six
    processes were slow."""
    known = LayerMap(
        (FileLayer("l", "dense", None, 10, 1_000),),
        tuple(FileOperator(f"l.{i}/MatMul", "MatMul", 0, 5) for i in range(len(times_us))),
    )
    runs = tuple(
        OperatorRuns(f"l.{i}/MatMul", "MatMul", (f"l.{i}/MatMul",), (1_000 * (us + 3),) * 4)
        for i, us in enumerate(times_us)
    )
    run = OperatorsRun("1", (1_000 * (sum(times_us) + 30),) * 4, runs)
    slow = replace(run, operators=tuple(replace(each, runs_ns=(9 * each.runs_ns[0],) * 4) for each in runs))
    return of_arm([run] * (6 - slowed) + [slow] * slowed, known, Peaks(1e9, 1e6, 1, "made up"), 1_000 * latency_us)


def test_what_the_profiler_itself_takes_is_no_time_of_operators() -> None:
    found = arm_of((9, 4, 2), 15.0)
    assert (found.latency_ns, found.uncorrected_ns, found.overhead_ns) == (15_000.0, 24_000.0, 3_000.0)
    assert [operator.ns for operator in found.operators] == [9_000.0, 4_000.0, 2_000.0]
    [layer] = found.layers
    assert (layer.ns, layer.rounds_ns, layer.overhead_ns, layer.operators) == (15_000.0, (15_000.0,) * 6, 9_000.0, 3)
    assert layer.reached == pytest.approx(10_000 / 15_000)
    assert found.total_ns == 24_000.0  # as they ran
    assert (
        "24.0 µs in the fastest process, of an inference's 15.0 µs without the profiler (a tenth is faster): "
        "3.0 µs an operator are the profiler's and subtracted, 15.0 µs left; 100.0% of it in layers"
        in (share_text(found))
    )
    assert replace(layer, overhead_ns=15_001.0).reached is None  # known too roughly
    assert arm_of((9, 4, 2), 15.0, slowed=4).overhead_ns == 3_000.0
    slower = arm_of((9, 4, 2), 30.0)  # calls take time beside the operators: nothing is added to these
    assert (slower.overhead_ns, slower.layers[0].ns) == (0.0, 24_000.0)
    assert "an operator" not in share_text(slower)


@pytest.mark.parametrize(
    ("mine", "its", "verdict"),
    [
        ((1, 1, 1), (4,), OPEN),  # shorter, though the profiler counts 12 µs against 7: too near to be told
        ((2, 2, 2), (4,), OPEN),
        ((4, 4, 4), (30,), WON),
        ((30, 30, 30), (30,), LOST),
    ],
)
def test_nothing_is_said_within_what_is_subtracted(mine: tuple[int, ...], its: tuple[int, ...], verdict: str) -> None:
    [one], [other] = (arm_of(times, float(sum(times))).layers for times in (mine, its))
    found = compare(one, other, "factored@int8", "dense@int8")
    assert (found.verdict, found.ratio) == (verdict, pytest.approx(sum(mine) / sum(its)))


def test_nothing_is_said_within_the_us_that_each_operator_is_counted_in() -> None:
    few, many = arm_of((10,), 99.0), arm_of((4, 4, 4), 99.0)  # a profiler whose cost cannot be told from the latency
    assert (few.overhead_ns, many.overhead_ns) == (0.0, 0.0)
    wide, narrow = many.layers[0], replace(few.layers[0], ns=18_500.0, rounds_ns=(18_500.0,) * 6)
    assert wide.ns - narrow.ns == 2_500.0
    assert compare(wide, narrow, "factored@int8", "dense@int8").verdict == OPEN
    assert compare(replace(wide, operators=1), narrow, "factored@int8", "dense@int8").verdict == LOST


def test_older_profiles_have_uncorrected_times_and_the_table_says_so() -> None:
    found = replace(arm_of((9, 4, 2), 15.0), latency_ns=None, uncorrected_ns=None, overhead_ns=0.0)
    assert "the profiler's own part not subtracted" in share_text(found)


@pytest.mark.usefixtures("quiet")
def test_a_profile_without_the_latency_beside_its_operators_is_read(mapped: Bundle) -> None:
    measured = profile(mapped, ops=True, executor=FakeExecutor(LEVELS))
    values = measured.to_dict()
    for arm in values["operators"]["arms"].values():
        for key in ("latency_ns", "uncorrected_ns", "overhead_ns"):
            del arm[key]
        for layer in arm["layers"]:
            del layer["overhead_ns"], layer["operators"]
    found = Profile.from_dict(values).operators
    assert found is not None
    assert [arm.latency_ns for arm in found.arms.values()] == [None, None]


def test_all_that_lost_stands_in_the_table_beside_what_takes_most() -> None:
    found = make_operators(["dense@int8", "factored@int8"], layers=TOP + 10)
    last = found.arms["factored@int8"].layers[-1]
    slow = replace(last, ns=3 * last.ns, rounds_ns=tuple(3 * ns for ns in last.rounds_ns))
    arm = replace(found.arms["factored@int8"], layers=(*found.arms["factored@int8"].layers[:-1], slow))
    lines = side_by_side(with_arms(found, {**found.arms, "factored@int8": arm}), "factored@int8", "dense@int8")
    names = [line.split()[0] for line in lines]
    assert names[1 : TOP + 3] == [*(f"body.{i}" for i in range(TOP)), f"body.{TOP + 9}", "elsewhere"]
    assert " lost " in lines[TOP + 1]
    assert lines[-1] == (
        f"layers: {TOP + 9} won, 1 lost, 0 without verdict; 9 more in the profile's JSON, none of them lost"
    )


def event(name: str, dur: int, cat: str = "Node", **args: str) -> dict[str, Any]:
    return {"cat": cat, "name": name, "dur": dur, "ts": 0, "ph": "X", "args": args}


TRACE = [
    event("model_loading_uri", 300, "Session"),
    *(
        each
        for i in range(3)
        for each in (
            event("stem_fence_before", 0, op_name="Conv"),  # as onnxruntime 1.17 writes them
            event("stem_kernel_time", 10 + i, op_name="Conv"),
            event("relu_nchwc_kernel_time", 4, op_name="Relu"),
            event("SequentialExecutor::Execute", 20, "Session"),
            event("model_run", 25, "Session"),
        )
    ),
]


def test_a_trace_of_onnxruntime_is_told_apart_by_inferences() -> None:
    assert onnxruntime_profiler.parse(json.dumps(TRACE)) == (
        OperatorRuns("stem", "Conv", ("stem",), (10_000, 11_000, 12_000)),
        OperatorRuns("relu_nchwc", "Relu", ("relu_nchwc",), (4_000, 4_000, 4_000)),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(TRACE)[:-40], "expected a whole trace, got JSONDecodeError"),
        ("", "expected a whole trace"),
        ("{}", "inferences that run the same operators, got 0 inferences of no operators"),
        ("[1]", "expected a whole trace, got TypeError"),
        (json.dumps(TRACE[:1]), "got 0 inferences"),
        (json.dumps(TRACE[:3] + TRACE[5:]), "got 3 inferences of"),
        (json.dumps([{"cat": "Node"}]), "expected a whole trace, got KeyError"),
    ],
)
def test_a_trace_that_is_not_whole_is_one_error(text: str, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        onnxruntime_profiler.parse(text)


def request(bundle: Bundle, arm: str = "dense@fp32") -> Request:
    return Request(
        mode=OPERATORS, arm=arm, runtime="onnxruntime", artifact=str(bundle.artifact(arm)),
        golden_inputs=str(bundle.root / "golden/inputs.npz"), batch={"image": 1}, threads=1, run_seconds=0.1,
        warmup_seconds=0.02,
    )  # fmt: skip


def test_a_real_process_tells_the_time_of_each_operator_and_leaves_nothing_behind(
    bundle: Bundle, tmp_path: Path
) -> None:
    found = Processes({"TMPDIR": str(tmp_path / "t")}, 60.0)
    (tmp_path / "t").mkdir()
    run = found.operators(request(bundle), "arm dense@fp32")
    assert {operator.kind for operator in run.operators} >= {"MatMul"}
    assert all(len(operator.runs_ns) == len(run.samples_ns) >= 5 for operator in run.operators)
    assert sum(operator.runs_ns[-1] for operator in run.operators) <= max(run.samples_ns)
    assert not list((tmp_path / "t").glob("rowcol-*"))  # onnxruntime itself keeps a file there


def test_a_temporary_folder_that_cannot_be_made_is_one_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(MeasurementError, match=r"a temporary folder for the trace, got .*No space left"):
        OnnxRuntime().open_profiled(bundle.artifact("dense@fp32"), RuntimeOptions(threads=1))


def test_a_file_that_does_not_open_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Bundle
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(BundleError, match=r"broken\.onnx"):
        OnnxRuntime().open_profiled(tmp_path / "broken.onnx", RuntimeOptions(threads=1))
    assert not list((tmp_path / "t").glob("rowcol-*"))


@pytest.mark.usefixtures("quiet")
def test_a_verdict_that_does_not_exist_is_refused(mapped: Bundle) -> None:
    measured = profile(mapped, ops=True, executor=FakeExecutor(LEVELS))
    assert measured.operators is not None
    [pair] = measured.operators.comparisons
    broken = replace(measured, operators=replace(measured.operators, comparisons=(replace(pair, verdict="great"),)))
    with pytest.raises(BundleError, match="verdict on linear: expected one of won, lost, no verdict"):
        Profile.from_json(broken.to_json())
