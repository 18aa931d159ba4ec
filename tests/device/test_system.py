from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rowcol_edge.device import system

X86_CORE = "processor\t: 0\nmodel name\t: Some Core\nflags\t\t: fpu sse4_2 avx2 fma avx_vnni hypervisor\n\n"
X86 = X86_CORE * 2
ARM = """processor	: 0
Features	: fp asimd asimddp
CPU implementer	: 0x41
CPU part	: 0xd0b

processor	: 1
Features	: fp asimd
CPU implementer	: 0x41
CPU part	: 0xd05
"""


def machine(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def pi(root: Path, model: str = "Raspberry Pi 5 Model B Rev 1.0\0") -> system.Environment:
    files = {
        "proc__cpuinfo": ARM.replace("fp asimd\n", "fp asimd asimddp asimdhp\n").replace(
            "asimddp\nCPU", "asimddp asimdhp\nCPU"
        )
    }
    return system.environment(machine(root, **files, **{"proc__device-tree__model": model}), {}, "aarch64")


PI5 = {
    "name": "raspberry-pi-5",
    "match": {"machine": "aarch64", "device_tree_model": "Raspberry Pi 5"},
    "isa": ["asimd", "asimddp"],
    "proxy_note": "Nothing\nstands in for it.",
}
GENERIC = {"name": "generic-x86", "match": {"machine": "x86_64"}, "isa": ["avx2", "fma"]}


def test_an_x86_machine(tmp_path: Path) -> None:
    machine(
        tmp_path,
        proc__cpuinfo=X86,
        proc__meminfo="MemTotal:       2048 kB\n",
        proc__loadavg="0.75 0.5 0.2 1/2 3\n",
        sys__class__dmi__id__sys_vendor="QEMU\n",
        **{"etc__machine-id": "abc\n"},
    )
    found = system.environment(tmp_path, {"ONEDNN_MAX_CPU_ISA": "AVX2", "OTHER": "1"}, "x86_64")
    assert found.cpu_model == "Some Core"
    assert found.isa == ("sse4_2", "fma", "avx2", "avx_vnni")
    assert (found.memory_bytes, found.load_1m) == (2048 * 1024, 0.75)
    assert found.virtual == "virtual machine (QEMU)"
    assert found.caps == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert (found.emulated, found.board, found.throttled, found.governor) == ("", "", "", "")
    assert len(found.host_id) == 12
    assert "abc" not in found.host_id


def test_a_board(tmp_path: Path) -> None:
    machine(
        tmp_path,
        proc__cpuinfo=ARM,
        sys__devices__system__cpu__cpu0__cpufreq__scaling_governor="ondemand\n",
        sys__devices__system__cpu__cpu0__cpufreq__scaling_cur_freq="1500000\n",
        sys__class__thermal__thermal_zone0__temp="48312\n",
        **{
            "proc__device-tree__model": "Raspberry Pi 5\0",
            "sys__devices__platform__soc__soc:firmware__get_throttled": "50000\n",
        },
    )
    found = system.environment(tmp_path, {}, "aarch64")
    assert found.board == "Raspberry Pi 5"
    assert found.cpu_model == "Cortex-A76 + Cortex-A55"
    assert found.isa == ("asimd",)  # what both kinds of core have
    assert (found.governor, found.frequency_khz, found.temperature_c, found.throttled) == (
        "ondemand",
        1_500_000,
        48.312,
        "50000",
    )


@pytest.mark.parametrize(
    ("cpuinfo", "target_saturates", "only_here"),
    [
        ("flags\t: sse4_1 avx2 fma\n", False, True),
        ("flags\t: sse4_1 avx2 fma\n", True, False),
        ("flags\t: sse4_1 avx2 avx_vnni\n", False, False),
        ("flags\t: sse4_1 avx512f avx512_vnni\n", False, False),
        (ARM, False, False),
        ("", False, False),
    ],
)
def test_8_bit_sums_saturate_on_x86_without_vnni(
    tmp_path: Path, cpuinfo: str, target_saturates: bool, only_here: bool
) -> None:
    machine(tmp_path, proc__cpuinfo=cpuinfo)
    target = {"int8_saturates": target_saturates}
    assert system.saturates_only_here(target, tmp_path, "x86_64") is only_here
    assert not system.saturates_only_here(target, tmp_path, "aarch64")  # emulated, with the flags of its host
    assert not system.saturates_only_here({}, tmp_path, "x86_64")


def cpufreq(root: Path, *cores: tuple[str, str, int, int, int]) -> system.Environment:
    """A machine whose cores have these governors, drivers, and present, allowed and highest frequencies in kHz."""
    keys = ("scaling_governor", "scaling_driver", "scaling_cur_freq", "scaling_max_freq", "cpuinfo_max_freq")
    for i, values in enumerate(cores):
        files = {
            f"sys__devices__system__cpu__cpu{i}__cpufreq__{key}": f"{value}\n"
            for key, value in zip(keys, values, strict=True)
        }
        machine(root, **files)
    return system.environment(root, {}, "aarch64")


def test_every_core_is_asked_for_its_governor_and_whether_it_is_held_down(tmp_path: Path) -> None:
    slow, fast = (
        ("ondemand", "scmi", 600_000, 1_800_000, 1_800_000),
        ("powersave", "scmi", 408_000, 1_200_000, 2_400_000),
    )
    found = replace(cpufreq(tmp_path, slow, slow, fast, fast), load_1m=None)
    assert found.governor == "ondemand + powersave"
    assert found.frequency_khz == 600_000
    assert found.throttled == "cpu2 + cpu3 at 1200 of 2400 MHz"
    said = system.host_warnings(found, 0)
    assert [text.partition(":")[0] for text in said] == [
        "throttling (cpu2 + cpu3 at 1200 of 2400 MHz)",
        "CPU governor powersave",
    ]


@pytest.mark.parametrize(("driver", "disturbs"), [("intel_pstate", False), ("intel_cpufreq", True)])
def test_the_normal_governor_of_intel_pstate_disturbs_nothing(tmp_path: Path, driver: str, disturbs: bool) -> None:
    found = cpufreq(tmp_path, ("powersave", driver, 800_000, 3_400_000, 3_400_000))
    assert found.throttled == ""
    assert found.governor == ("powersave" if disturbs else "powersave (intel_pstate)")
    assert any("governor" in text for text in system.host_warnings(found, 0)) == disturbs


def test_the_hottest_zone_counts(tmp_path: Path) -> None:
    zones = {
        "0": ("cpu-thermal", "48312"),
        "1": ("gpu-thermal", "84100"),
        "2": ("PMIC-Die", "100000"),
        "3": ("off", ""),
    }
    for number, (kind, value) in zones.items():
        place = f"sys__class__thermal__thermal_zone{number}__"
        machine(tmp_path, **{f"{place}type": f"{kind}\n", f"{place}temp": value})
    assert system.environment(tmp_path, {}, "aarch64").temperature_c == 84.1


def test_the_name_that_all_arm_processors_share_says_less_than_the_part(tmp_path: Path) -> None:
    machine(tmp_path, proc__cpuinfo="model name\t: ARMv8 Processor rev 3 (v8l)\nCPU part\t: 0xd08\n")
    assert system.environment(tmp_path, {}, "aarch64").cpu_model == "Cortex-A72"


def test_what_a_system_does_not_tell_stays_empty(tmp_path: Path) -> None:
    found = system.environment(tmp_path, {}, "riscv64")
    assert (found.cpu_model, found.isa, found.host_id, found.virtual, found.emulated) == ("", (), "", "", "")
    assert (found.memory_bytes, found.load_1m, found.temperature_c, found.frequency_khz) == (None, None, None, None)


def test_this_machine_can_be_read() -> None:
    found = system.environment()
    assert found.cores >= found.cores_usable >= 1
    assert found.machine
    assert found.memory_bytes is None or found.memory_bytes > 1 << 26


@pytest.mark.parametrize(
    ("files", "variables", "kind", "sign"),
    [
        ({}, {"ROWCOL_EMULATED": "1"}, "aarch64", "ROWCOL_EMULATED is set"),
        (
            {"proc__self__task__7__maps": "5500-5600 r-xp /usr/bin/qemu-aarch64-static\n"},
            {},
            "aarch64",
            "QEMU user-mode",
        ),
        ({"proc__cpuinfo": X86}, {}, "aarch64", "aarch64 on a processor of another kind"),
        ({"proc__cpuinfo": ARM}, {}, "x86_64", "x86_64 on a processor of another kind"),
        ({"proc__cpuinfo": ARM}, {"ROWCOL_EMULATED": "0"}, "aarch64", ""),
    ],
)
def test_emulators(tmp_path: Path, files: dict[str, str], variables: dict[str, str], kind: str, sign: str) -> None:
    found = system.environment(machine(tmp_path, **files), variables, kind)
    assert found.emulated.startswith(sign)
    assert bool(found.emulated) == bool(sign)
    assert (system.evidence_for(GENERIC, found).level == system.EMULATED) == bool(sign)


def test_a_container(tmp_path: Path) -> None:
    machine(tmp_path, proc__1__cgroup="0::/docker/1234\n")
    assert system.environment(tmp_path, {}, "x86_64").virtual == "container"


def test_the_board_itself_is_the_target(tmp_path: Path) -> None:
    level, note = system.evidence_for(PI5, pi(tmp_path))
    assert level == system.TARGET
    assert note == "measured on Raspberry Pi 5 Model B Rev 1.0"


def test_another_board_is_a_proxy(tmp_path: Path) -> None:
    level, note = system.evidence_for(PI5, pi(tmp_path, "Raspberry Pi 4 Model B"))
    assert level == system.PROXY
    assert note.startswith("Raspberry Pi 4 Model B (aarch64) stands in for Raspberry Pi 5, no instruction-set cap: ")
    assert note.endswith("Nothing stands in for it.")


def test_a_proxy_names_its_cap(tmp_path: Path) -> None:
    host = system.environment(machine(tmp_path, proc__cpuinfo=X86), {}, "x86_64")
    found = system.evidence_for({**PI5, "proxy_env": {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "proxy_note": ""}, host)
    assert found == (system.PROXY, "Some Core (x86_64) stands in for Raspberry Pi 5, capped by ONEDNN_MAX_CPU_ISA=AVX2")


def test_a_generic_target_is_any_matching_machine_with_its_instructions(tmp_path: Path) -> None:
    host = system.environment(machine(tmp_path, proc__cpuinfo=X86), {}, "x86_64")
    level, note = system.evidence_for(GENERIC, host)
    assert level == system.TARGET
    assert note == "measured on Some Core; it has avx_vnni, which the target does not count on"
    # int8 that does not saturate rests on it
    assert system.evidence_for({**GENERIC, "int8_saturates": False}, host).note == "measured on Some Core"
    level, note = system.evidence_for(GENERIC, replace(host, isa=("fma",)))
    assert level == system.PROXY
    assert note.startswith("Some Core (x86_64) without avx2 stands in for x86_64")
    assert system.evidence_for(GENERIC, replace(host, isa=())).level == system.TARGET


@pytest.mark.parametrize(
    ("machine", "other"), [("aarch64", ""), ("arm64", ""), ("x86_64", "aarch64"), ("AMD64", "aarch64")]
)
def test_another_kind_of_machine_than_the_targets(machine: str, other: str) -> None:
    assert system.another_machine({"match": {"machine": "aarch64"}}, machine) == other
    assert system.another_machine({}, machine) == ""


def firmware(root: Path, answer: str) -> Path:
    tool = root / "usr" / "bin" / "vcgencmd"
    tool.parent.mkdir(parents=True)
    tool.write_text(f"#!/bin/sh\n{answer}\n")
    tool.chmod(0o755)
    return root


def test_a_raspberry_pis_firmware_is_asked_where_no_file_shows_throttling(tmp_path: Path) -> None:
    root = firmware(tmp_path, 'test "$1" = get_throttled && echo throttled=0x50005')
    assert system.environment(root).throttled == "50005"
    file = root / "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled"
    file.parent.mkdir(parents=True)
    file.write_text("20002\n")
    assert system.environment(root).throttled == "20002"


@pytest.mark.parametrize("answer", ["echo VCHI initialization failed; exit 255", "kill -9 $$"])
def test_a_firmware_that_does_not_answer_says_nothing(tmp_path: Path, answer: str) -> None:
    assert system.environment(firmware(tmp_path, answer)).throttled == ""


def test_weaker() -> None:
    assert system.weaker("proxy", "target")
    assert not system.weaker("target", "proxy")
    assert not system.weaker("proxy", "proxy")


def test_a_busy_or_throttled_machine_is_told(tmp_path: Path) -> None:
    host = replace(pi(tmp_path), cores_usable=2, load_1m=0.5, governor="performance")
    assert system.host_warnings(host, 2) == []
    warnings = system.host_warnings(replace(host, load_1m=1.5, throttled="50005", governor="powersave"), 4)
    assert [warning.split(":")[0] for warning in warnings] == [
        "load 1.50 on 2 core(s)",
        "throttling (50005)",
        "CPU governor powersave",
        "4 threads on 2 usable core(s)",
    ]
