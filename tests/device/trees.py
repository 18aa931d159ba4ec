"""What /proc and /sys of some boards hold, as far as it is read, cut to a few cores: put together by hand after the
documentation of kernels and boards, not recorded on any of them."""

from __future__ import annotations

from pathlib import Path

_ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp asimdhp\nCPU implementer\t: 0x41\nCPU part\t: {part}\n"


def lay(root: Path, tree: dict[str, str], **changes: str) -> Path:
    """Write a tree below ``root``; what begins with ``#!`` is a program. ``changes``: other contents, by file name."""
    for name, content in tree.items():
        content = changes.get(name.rpartition("/")[2], content)
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        if content.startswith("#!"):
            path.chmod(0o755)
    return root


def cpufreq(cores: int, governor: str, driver: str, lowest: int, now: int, highest: int, able: int) -> dict[str, str]:
    """Frequencies in kHz."""
    values = {
        "scaling_governor": governor, "scaling_driver": driver, "scaling_min_freq": lowest, "scaling_cur_freq": now,
        "scaling_max_freq": highest, "cpuinfo_max_freq": able,
    }  # fmt: skip
    return {
        f"sys/devices/system/cpu/cpu{i}/cpufreq/{name}": f"{value}\n"
        for i in range(cores)
        for name, value in values.items()
    }


def ina3221(folder: str, **channels: tuple[str, int, int]) -> dict[str, str]:
    """Linux's driver: ``in1`` and so on with label, mV and mA; and the sum of all shunt voltages, which is no rail."""
    tree = {f"{folder}/in7_label": "sum of shunt voltages\n", f"{folder}/in7_input": "12\n"}
    for name, (label, millivolts, milliamperes) in channels.items():
        tree |= {
            f"{folder}/{name}_label": f"{label}\n",
            f"{folder}/{name}_input": f"{millivolts}\n",
            f"{folder}/curr{name[2:]}_input": f"{milliamperes}\n",
        }
    return tree


VCGENCMD = """#!/bin/sh
case "$1" in
get_throttled) echo throttled=0x50000 ;;
measure_temp) echo "temp=61.5'C" ;;
esac
"""
PI_5 = {
    "proc/cpuinfo": _ARM.format(part="0xd0b"),
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "60850\n",
    "usr/bin/vcgencmd": VCGENCMD,
    **cpufreq(4, "ondemand", "cpufreq-dt", 1_500_000, 2_400_000, 2_400_000, 2_400_000),
}

_MODES = "# comment\n< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
_ORIN_NANO = {
    "proc/cpuinfo": _ARM.format(part="0xd42"),
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "etc/nvpmodel.conf": _MODES,
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48593\n",
    **cpufreq(2, "schedutil", "tegra194", 1_728_000, 1_728_000, 1_728_000, 1_728_000),
    **ina3221(
        "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1",
        in1=("VDD_IN", 5056, 960), in2=("VDD_CPU_GPU_CV", 5056, 208), in3=("VDD_SOC", 5048, 296),
    ),
}  # fmt: skip
ORIN_JETPACK_6 = {
    **_ORIN_NANO,
    "sys/class/devfreq/17000000.gpu/min_freq": "1020000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
}
ORIN_JETPACK_5 = {
    **{name: text for name, text in _ORIN_NANO.items() if "hwmon" not in name},
    "proc/device-tree/model": "Jetson AGX Orin Developer Kit\0",
    "sys/class/devfreq/17000000.ga10b/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.ga10b/max_freq": "1300500000\n",
    **ina3221(
        "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3",
        in1=("VDD_GPU_SOC", 19_176, 208), in2=("VDD_CPU_CV", 19_176, 40), in3=("VIN_SYS_5V0", 4_936, 808),
    ),
    **ina3221(
        "sys/bus/i2c/drivers/ina3221/1-0041/hwmon/hwmon4",
        in1=("NC", 19_192, 0), in2=("VDDQ_VDD2_1V8AO", 4_968, 80), in3=("NC", 19_176, 0),
    ),
}  # fmt: skip
NVPMODEL = """#!/bin/sh
test "$1" = -q && echo "NV Fan Mode:quiet
NV Power Mode: MODE_15W_6CORE
2"
"""
_MONITOR = "sys/bus/i2c/drivers/ina3221x/7-0040/iio:device0"
XAVIER_JETPACK_4 = {
    "proc/device-tree/model": "NVIDIA Jetson Xavier NX Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3449-0000+p3668-0000\0nvidia,p3509-0000+p3668-0000\0nvidia,tegra194\0",
    "usr/sbin/nvpmodel": NVPMODEL,
    f"{_MONITOR}/rail_name_0": "VDD_IN\n",
    f"{_MONITOR}/in_voltage0_input": "4936\n",
    f"{_MONITOR}/in_current0_input": "816\n",
    f"{_MONITOR}/in_power0_input": "4027\n",
    f"{_MONITOR}/rail_name_1": "VDD_CPU_GPU_CV\n",
    f"{_MONITOR}/in_power1_input": "394\n",
}

_RAPL = "sys/class/powercap/intel-rapl"
INTEL = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Intel(R) N100\nflags\t\t: fpu sse4_2 avx2 fma avx_vnni\n\n",
    f"{_RAPL}/enabled": "1\n",
    f"{_RAPL}:0/name": "package-0\n",
    f"{_RAPL}:0/energy_uj": "262143000000\n",
    f"{_RAPL}:0/max_energy_range_uj": "262143328850\n",
    f"{_RAPL}:0:0/name": "core\n",
    f"{_RAPL}:0:0/energy_uj": "1500000\n",
    f"{_RAPL}:0:0/max_energy_range_uj": "262143328850\n",
    f"{_RAPL}:1/name": "psys\n",
    f"{_RAPL}:1/energy_uj": "7000000\n",
    f"{_RAPL}:1/max_energy_range_uj": "262143328850\n",
    "sys/class/powercap/intel-rapl-mmio:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl-mmio:0/energy_uj": "1\n",
    **cpufreq(4, "powersave", "intel_pstate", 700_000, 2_900_000, 3_400_000, 3_400_000),
}
