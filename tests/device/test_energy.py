"""Energy of an inference: the protocol over a fake executor, and one real process whose rail is a file of the test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rowcol_edge.device import energy, power, system, worker
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.energy import by_rail, energy_runs
from rowcol_edge.device.measure import profile
from rowcol_edge.device.power import RailRun
from rowcol_edge.device.profile import NOT_ASKED, NULL, Profile
from rowcol_edge.device.table import profile_table
from rowcol_edge.device.worker import ENERGY, EnergyRun, Request

from ..profiles import ENVIRONMENT, FakeExecutor
from . import trees
from .trees import lay

LEVELS = {"factored@fp32": 2.0, "dense@fp32": 4.0}
WITH_RAILS = replace(ENVIRONMENT, rails=("VDD_IN",), rails_unread="")


def run(joules: float, *rails: str, idle_watts: float = 4.0, inferences: int = 100, seconds: float = 5.0) -> EnergyRun:
    """A run whose rails take so much an inference above idle."""
    watts = idle_watts + joules * inferences / seconds
    return EnergyRun(
        "1.20", inferences, seconds, tuple(RailRun(name, "INA3221", idle_watts, watts, 50) for name in rails)
    )


def test_idle_power_is_subtracted_and_the_spread_is_kept() -> None:
    [rail] = by_rail([run(0.05, "VDD_IN"), run(0.08, "VDD_IN", idle_watts=5.0), run(0.06, "VDD_IN", inferences=50)])
    assert (rail.rail, rail.source) == ("VDD_IN", "INA3221")
    assert (rail.joules, rail.low, rail.high) == pytest.approx((0.06, 0.05, 0.08))
    assert [reading.inferences for reading in rail.runs] == [100, 100, 50]


def test_only_rails_that_every_run_could_read_count() -> None:
    found = by_rail([run(0.05, "VDD_IN", "VDD_SOC"), run(0.05, "VDD_SOC"), run(0.05, "VDD_SOC", "VDD_IN")])
    assert [rail.rail for rail in found] == ["VDD_SOC"]
    assert by_rail([]) == ()


def test_arms_take_turns_and_the_null_arm_has_none() -> None:
    executor, steps = FakeExecutor(LEVELS), []
    request = Request("time", "", "onnxruntime", "x.onnx", "golden.npz", {}, 1)
    requests = {name: replace(request, arm=name) for name in LEVELS} | {NULL: replace(request, arm="dense@fp32")}
    runs = energy_runs(requests, executor, lambda *step: steps.append(step), 2.5)
    assert [asked.arm for asked in executor.requests] == ["factored@fp32", "dense@fp32"] * 3
    assert {(asked.mode, asked.run_seconds) for asked in executor.requests} == {(ENERGY, 2.5)}
    assert {name: len(of_arm) for name, of_arm in runs.items()} == {"factored@fp32": 3, "dense@fp32": 3}
    assert steps[0] == ("energy", 0, 6)
    assert steps[-1] == ("energy", 6, 6)


def measured(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, host: system.Environment, **options: object) -> Profile:
    monkeypatch.setattr(system, "environment", lambda: host)
    return profile(bundle, executor=FakeExecutor(LEVELS), **options)  # type: ignore[arg-type]


def test_a_profile_holds_energy_by_rail_where_it_was_asked_for(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(bundle, monkeypatch, WITH_RAILS, energy=True)
    assert found.energy_note == ""
    # 2 W more at work; 500 and 250 inferences a second
    assert found.arms["factored@fp32"].energy[0].joules == pytest.approx(0.004)
    assert found.arms["dense@fp32"].energy[0].joules == pytest.approx(0.008)
    assert found.null_arm.energy == ()
    assert Profile.from_json(found.to_json()) == found
    lines = profile_table(found).splitlines()
    [row] = [line for line in lines if line.startswith("factored@fp32 on VDD_IN")]
    assert row.split()[4:] == ["4", "mJ", "4", "mJ,", "4", "mJ", "4.00", "W", "6.00", "W", "7,500", "15", "s"]


@pytest.mark.parametrize(
    ("host", "options", "note"),
    [
        (WITH_RAILS, {}, NOT_ASKED),
        (ENVIRONMENT, {"energy": True}, "no INA3221 monitor and no RAPL counter here"),
        (WITH_RAILS, {"energy": True, "evidence": "emulated"}, "emulated runs take another machine's energy"),
    ],
)
def test_why_there_is_no_energy(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    host: system.Environment,
    options: dict[str, object],
    note: str,
) -> None:
    found = measured(bundle, monkeypatch, host, **options)
    assert found.energy_note == note
    assert {arm.energy for arm in found.arms.values()} == {()}
    said = f"energy: not measured ({note})" in profile_table(found)
    assert said == (note != NOT_ASKED)


def test_energy_that_drowns_in_what_else_the_board_does_is_told(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def energy(self: FakeExecutor, request: Request, where: str) -> EnergyRun:
        added = -0.002 if where == "arm dense@fp32, energy run 2" else 0.004
        return run(added, "VDD_IN", "VDD_SOC")

    monkeypatch.setattr(FakeExecutor, "energy", energy)
    found = measured(bundle, monkeypatch, WITH_RAILS, energy=True)
    [warning] = found.warnings
    assert warning.startswith(
        "energy of dense@fp32 on VDD_IN does not stand out from the power at rest (least -0.002 J)"
    )


def test_rails_that_fall_silent_are_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeExecutor, "energy", lambda self, request, where: EnergyRun("1.20", 9, 5.0, ()))
    found = measured(bundle, monkeypatch, WITH_RAILS, energy=True)
    assert found.energy_note == "VDD_IN could not be read throughout"


def test_a_mode_that_changes_meanwhile_is_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([replace(ENVIRONMENT, power_mode="15W (0)"), replace(ENVIRONMENT, power_mode="7W (3)")])
    monkeypatch.setattr(system, "environment", lambda: next(seen))
    found = profile(bundle, executor=FakeExecutor(LEVELS))
    assert found.warnings == ("power mode changed while measuring (15W (0) to 7W (3)): measure again",)
    assert (found.environment.power_mode, found.after.power_mode) == ("15W (0)", "7W (3)")


def test_a_real_process_counts_what_runs(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = lay(tmp_path / "board", trees.ORIN_JETPACK_6)
    rails = power.rails(root)
    monkeypatch.setattr(power, "rails", lambda: rails)
    monkeypatch.setattr(worker, "SETTLE_SECONDS", 0.0)
    stream = worker.stream

    def working(*arguments: object) -> tuple[int, float]:
        lay(root, trees.ORIN_JETPACK_6, curr1_input="1960\n")  # an ampere more while it works
        return stream(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "stream", working)
    request = Request(
        mode=ENERGY, arm="dense@fp32", runtime="onnxruntime", artifact=str(bundle.artifact("dense@fp32")),
        golden_inputs=str(bundle.root / bundle.manifest.golden_inputs), batch={"image": 1}, threads=1,
        run_seconds=0.3, warmup_seconds=0.02,
    )  # fmt: skip
    found = worker.run(request)
    assert isinstance(found, EnergyRun)
    assert found.inferences > 10
    assert found.seconds >= 0.3
    module = found.rails[0]
    assert module.rail == "VDD_IN"
    assert module.samples >= 3
    assert module.idle_watts == pytest.approx(5.056 * 0.96)
    assert module.watts == pytest.approx(5.056 * 1.96, rel=0.15)  # the first sample is from before the work began
    assert found.rails[1].watts == pytest.approx(found.rails[1].idle_watts)


def test_a_stream_runs_at_least_once_and_until_its_time_is_up() -> None:
    now = [0.0]

    def infer(feed: object) -> None:
        now[0] += 0.4

    assert worker.stream(infer, {}, 1.0, lambda: now[0]) == (3, pytest.approx(1.2))
    now[0] = 0.0
    assert worker.stream(infer, {}, 0.0, lambda: now[0]) == (1, pytest.approx(0.4))


def test_a_run_is_long_enough_for_the_slowest_monitor() -> None:
    # 1024 averages of three channels, bus and shunt, at 140 µs each: kernel.org, hwmon/ina3221
    assert energy.SECONDS > 5 * 1024 * 6 * 140e-6
