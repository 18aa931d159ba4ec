from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from rowcol_edge.device import system

from . import trees
from .trees import lay


def read(root: Path, tree: dict[str, str], **changes: str) -> system.Environment:
    return system.environment(lay(root, tree, **changes), {}, "aarch64")


def test_a_raspberry_pi_5(tmp_path: Path) -> None:
    found = read(tmp_path, trees.PI_5)
    assert (found.board, found.cpu_model) == ("Raspberry Pi 5 Model B Rev 1.0", "Cortex-A76")
    assert (found.throttled, found.temperature_c, found.firmware_temperature_c) == ("50000", 60.85, 61.5)
    assert (found.governor, found.frequency_khz) == ("ondemand", 2_400_000)
    assert (found.power_mode, found.clocks_held, found.rails) == ("", None, ())


@pytest.mark.parametrize("answer", ["temp=hot'C", "error=1 error_msg=Command not registered", "temp=61.5", ""])
def test_a_firmware_that_tells_no_temperature(tmp_path: Path, answer: str) -> None:
    found = read(tmp_path, trees.PI_5, vcgencmd=f'#!/bin/sh\necho "{answer}"\n')
    assert found.firmware_temperature_c is None
    assert found.throttled == ""


def test_a_jetson_with_held_clocks(tmp_path: Path) -> None:
    found = read(tmp_path, trees.ORIN_JETPACK_6)
    assert (found.power_mode, found.clocks_held) == ("MAXN_SUPER (2)", True)
    assert found.rails == ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")
    assert (found.throttled, found.firmware_temperature_c) == ("", None)


def test_a_gpu_whose_clock_may_fall_is_not_held(tmp_path: Path) -> None:
    found = read(tmp_path, trees.ORIN_JETPACK_5)
    assert found.clocks_held is False
    held = read(tmp_path, trees.ORIN_JETPACK_5, min_freq="1300500000\n")
    assert held.clocks_held is True
    assert read(tmp_path, trees.ORIN_JETPACK_6, scaling_min_freq="729600\n").clocks_held is False


def test_nvpmodel_is_asked_where_it_kept_no_mode(tmp_path: Path) -> None:
    found = read(tmp_path, trees.XAVIER_JETPACK_4)
    assert found.power_mode == "MODE_15W_6CORE (2)"
    assert found.clocks_held is None  # no clock of it can be read


@pytest.mark.parametrize(
    ("status", "conf", "mode"),
    [
        ("pmode:0002\n", "", "2"),
        ("pmode:0000 fmode:quiet\n", "< POWER_MODEL ID=0 NAME=MAXN >\n", "MAXN (0)"),
        ("pmode:0001\n", "# < POWER_MODEL ID=1 NAME=OFF >\n< POWER_MODEL ID=10 NAME=TEN >\n", "1"),
        ("\0\0\0", "< POWER_MODEL ID=0 NAME=MAXN >\n", ""),
        ("pmode:", "", ""),
    ],
)
def test_what_nvpmodel_kept(tmp_path: Path, status: str, conf: str, mode: str) -> None:
    files = {"var/lib/nvpmodel/status": status, "etc/nvpmodel.conf": conf}
    assert read(tmp_path, files).power_mode == mode


def test_garbage_is_not_measured(tmp_path: Path) -> None:
    """Every number of these trees is replaced by what is none."""
    for i, tree in enumerate((trees.PI_5, trees.ORIN_JETPACK_6, trees.XAVIER_JETPACK_4, trees.INTEL)):
        garbled = {name: "²--7\n" if text.strip().isdigit() else text for name, text in tree.items()}
        found = read(tmp_path / str(i), garbled)
        assert (found.frequency_khz, found.temperature_c, found.clocks_held) == (None, None, None)
        assert found.rails == ()


def test_of_the_environment_what_may_change_is_kept_from_after_the_measurement(tmp_path: Path) -> None:
    before = read(tmp_path, trees.ORIN_JETPACK_6)
    after = asdict(system.readings(read(tmp_path, trees.ORIN_JETPACK_6, temp="71000\n", scaling_cur_freq="729600\n")))
    changed = {name for name, value in after.items() if value != getattr(before, name)}
    assert changed == {"temperature_c", "frequency_khz"}
    assert (after["temperature_c"], after["frequency_khz"]) == (71.0, 729_600)
