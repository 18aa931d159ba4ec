from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest

from rowcol_edge.device import power
from rowcol_edge.device.power import INA3221, RAPL, Rail, Recorder, mean_watts, set_against

from . import trees
from .trees import lay


def watts(root: Path) -> dict[str, float | None]:
    return {rail.name: rail.read() for rail in power.rails(root).found}


def test_linuxs_driver_of_the_monitor_gives_millivolts_and_milliamperes(tmp_path: Path) -> None:
    found = power.rails(lay(tmp_path, trees.ORIN_JETPACK_6))
    assert [(rail.name, rail.source, rail.counter) for rail in found.found] == [
        ("VDD_IN", INA3221, False), ("VDD_CPU_GPU_CV", INA3221, False), ("VDD_SOC", INA3221, False)
    ]  # fmt: skip
    assert watts(tmp_path)["VDD_IN"] == pytest.approx(5.056 * 0.960)
    assert found.unread == ""


def test_the_rail_that_stands_for_the_most_is_first_and_unconnected_channels_are_none(tmp_path: Path) -> None:
    lay(tmp_path, trees.ORIN_JETPACK_6, in2_label="VDD_IN\n", in1_label="VDD_SOC\n", in3_label="NC\n")
    assert list(watts(tmp_path)) == ["VDD_IN", "VDD_SOC"]


def test_where_a_module_has_several_inputs_their_sum_stands_for_the_most(tmp_path: Path) -> None:
    found = power.rails(lay(tmp_path, trees.ORIN_JETPACK_5)).found
    assert [rail.name for rail in found] == ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"]
    idle = {"VDD_GPU_SOC": 4.0, "VDD_CPU_CV": 1.0, "VIN_SYS_5V0": 4.0, "VDDQ_VDD2_1V8AO": 0.5}
    busy = {"VDD_GPU_SOC": 14.0, "VDD_CPU_CV": 2.0, "VIN_SYS_5V0": 5.0, "VDDQ_VDD2_1V8AO": 1.5}

    def taken(names: Sequence[str]) -> list[tuple[str, float, float]]:
        rails = [rail for rail in found if rail.name in names]
        times = (0.0, 1.0, 2.0)
        at_rest, at_work = ([[(t, level[rail.name]) for t in times] for rail in rails] for level in (idle, busy))
        return [(run.rail, run.idle_watts, run.watts) for run in set_against(rails, at_rest, at_work)]

    # memory is behind the 5 V rail, and not counted twice
    assert taken(list(idle))[0] == ("VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", 9.0, 21.0)
    assert [rail for rail, *_ in taken(list(idle))[1:]] == list(idle)
    assert taken(["VDD_GPU_SOC", "VIN_SYS_5V0"])[0] == ("VDD_GPU_SOC", 4.0, 14.0)  # no sum without all of them


def test_rails_of_one_label_are_told_apart(tmp_path: Path) -> None:
    found = power.rails(lay(tmp_path, trees.ORIN_JETPACK_6, in3_label="VDD_IN\n")).found
    assert [rail.name for rail in found] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_IN (2)"]
    assert found[0].files != found[2].files


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (("package-0", "package-1", "package-0/core"), ("package-0 + package-1", 3.0, 30.0)),
        (("package-0-die-0", "package-0-die-1"), ("package-0-die-0 + package-0-die-1", 3.0, 30.0)),
        (("psys", "package-0", "package-1"), ("psys", 1.0, 10.0)),  # the platform, which all packages are in
        (("package-0", "package-0/core"), ("package-0", 1.0, 10.0)),
    ],
)
def test_several_processors_stand_for_the_most_together(
    names: tuple[str, ...], first: tuple[str, float, float]
) -> None:
    found = [Rail(name, RAPL, (), 1.0, counter=True) for name in names]
    at_rest, at_work = ([[(0.0, 0.0), (1.0, factor * (i + 1))] for i in range(len(names))] for factor in (1.0, 10.0))
    runs = set_against(found, at_rest, at_work)
    assert (runs[0].rail, runs[0].idle_watts, runs[0].watts) == first
    assert runs[0].source == RAPL


def test_nvidias_older_driver_gives_milliwatts(tmp_path: Path) -> None:
    assert watts(lay(tmp_path, trees.XAVIER_JETPACK_4)) == {
        "VDD_IN": pytest.approx(4.027), "VDD_CPU_GPU_CV": pytest.approx(0.394)
    }  # fmt: skip


def test_rapl_counts_microjoules_and_names_its_parts(tmp_path: Path) -> None:
    found = power.rails(lay(tmp_path, trees.INTEL)).found
    assert [rail.name for rail in found] == ["psys", "package-0", "package-0/core"]
    package = found[1]
    assert (package.source, package.counter) == (RAPL, True)
    assert package.read() == pytest.approx(262_143.0)
    assert package.range_joules == pytest.approx(262_143.32885)


def test_a_machine_without_rails_says_so(tmp_path: Path) -> None:
    assert power.rails(lay(tmp_path, trees.PI_5)) == power.Rails((), "no INA3221 monitor and no RAPL counter here")


def test_a_counter_that_this_user_may_not_read_is_named_with_the_reason(tmp_path: Path) -> None:
    lay(tmp_path, trees.INTEL)
    for closed in tmp_path.glob("sys/class/powercap/*/energy_uj"):
        closed.unlink()
        closed.mkdir()  # what even root cannot read
    found = power.rails(tmp_path)
    assert found.found == ()
    assert found.unread.split("; ")[0] == "RAPL package-0, energy_uj: Is a directory"
    assert len(found.unread.split("; ")) == 3


def test_one_rail_that_holds_garbage_does_not_hide_the_others(tmp_path: Path) -> None:
    found = power.rails(lay(tmp_path, trees.ORIN_JETPACK_6, curr2_input="ENODATA?\n"))
    assert [rail.name for rail in found.found] == ["VDD_IN", "VDD_SOC"]
    assert found.unread == "INA3221 VDD_CPU_GPU_CV, curr2_input: holds 'ENODATA?', which is no number"


SAMPLED = Rail("VDD_IN", INA3221, (), 1.0)
COUNTED = Rail("package-0", RAPL, (), 1.0, counter=True, range_joules=100.0)


def test_the_mean_of_samples_weighs_them_by_time() -> None:
    assert mean_watts(SAMPLED, [(0.0, 4.0), (1.0, 4.0), (1.5, 8.0), (3.0, 8.0)]) == pytest.approx((4 + 3 + 12) / 3)


def test_a_counter_that_starts_again_goes_on() -> None:
    assert mean_watts(COUNTED, [(10.0, 95.0), (11.0, 99.0), (12.0, 3.0), (14.0, 8.0)]) == pytest.approx(13 / 4)


@pytest.mark.parametrize(
    ("rail", "samples"),
    [
        (SAMPLED, []),
        (SAMPLED, [(0.0, 4.0)]),
        (SAMPLED, [(1.0, 4.0), (1.0, 4.0)]),
        (Rail("package-0", RAPL, (), 1.0, counter=True), [(0.0, 95.0), (1.0, 3.0)]),  # how far it goes is not told
        (COUNTED, [(0.0, 950.0), (1.0, 3.0)]),  # it was beyond what it says it can hold
    ],
)
def test_no_mean_where_the_samples_do_not_tell(rail: Rail, samples: list[tuple[float, float]]) -> None:
    assert mean_watts(rail, samples) is None


def test_a_rail_that_fell_silent_is_left_out() -> None:
    rails = (SAMPLED, COUNTED)
    idle = [[(0.0, 4.0), (1.0, 4.0)], [(0.0, 1.0), (1.0, 3.0)]]
    busy = [[(2.0, 9.0)], [(2.0, 5.0), (4.0, 15.0)]]
    assert set_against(rails, idle, busy) == (power.RailRun("package-0", RAPL, 2.0, 5.0, 2),)


def test_the_recorder_reads_at_both_ends_and_in_between(tmp_path: Path) -> None:
    file = tmp_path / "energy_uj"
    file.write_text("0\n")
    rail = Rail("package-0", RAPL, (file,), 1e-6, counter=True)
    ticks = count()
    with Recorder([rail], period_seconds=0.001, clock=lambda: float(next(ticks))) as recorder:
        until = time.monotonic() + 10
        while len(recorder.samples[0]) < 5 and time.monotonic() < until:
            time.sleep(0.001)
        file.write_text("7000000\n")
    times, values = zip(*recorder.samples[0], strict=True)
    assert len(times) >= 6
    assert list(times) == sorted(times)
    assert (values[0], values[-1]) == (0.0, 7.0)
    after = len(recorder.samples[0])
    time.sleep(0.02)
    assert len(recorder.samples[0]) == after  # nothing is read any more


def test_a_reading_that_fails_once_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "in_power0_input"
    rail = Rail("VDD_IN", INA3221, (file,), 1e-3)
    with Recorder([rail], period_seconds=60.0) as recorder:
        file.write_text("4000\n")
    assert [value for _, value in recorder.samples[0]] == [4.0]
