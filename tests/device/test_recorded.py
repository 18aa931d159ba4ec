"""What the probes read of machines as they were recorded, by tools/record_tree.py, and the tool itself."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rowcol_edge.device import doctor, power, system
from rowcol_edge.device.system import Environment

from . import trees
from .trees import lay

RECORDED = Path(__file__).parent / "recorded"
SERIAL = "10000000abcdef01"


def recorded(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDED / name).read_text(encoding="utf-8"))
    assert found["schema"] == 1
    return found


def read(root: Path, machine: str) -> Environment:
    return system.environment(root, {}, machine)


def test_a_virtual_machine_of_two_epyc_cores(tmp_path: Path) -> None:
    found = recorded("epyc-virtual.json")
    root = lay(tmp_path, found["files"])
    host = read(root, found["machine"])
    assert (host.machine, host.board, host.cpu_model) == ("x86_64", "", "AMD EPYC")
    assert host.isa == (
        "sse4_1", "sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    )  # fmt: skip
    assert (host.governor, host.frequency_khz, host.temperature_c, host.throttled) == ("", None, None, "")
    assert (host.power_mode, host.clocks_held, host.rails) == ("", None, ())
    assert host.rails_unread == power.rails(root).unread == "no INA3221 monitor and no RAPL counter here"
    assert (host.memory_bytes, host.load_1m) == (24_684_084 * 1024, 5.46)
    assert (host.virtual, host.emulated, host.host_id) == ("virtual machine", "", "")
    [finding] = doctor.memory({}, root)
    assert (finding.what, finding.found) == ("free memory", "22,424 MiB")
    assert system.host_warnings(host, 1)[0].startswith("load 5.46 on ")


def record(tmp_path: Path, root: Path) -> dict[str, Any]:
    tool = Path(__file__).parents[2] / "tools" / "record_tree.py"
    out = tmp_path / "recorded.json"
    subprocess.run([sys.executable, str(tool), str(out), "--root", str(root)], check=True, capture_output=True)
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def test_a_recording_says_what_the_board_says(tmp_path: Path) -> None:
    for name, tree in (("pi", trees.PI_5), ("orin", trees.ORIN_JETPACK_6), ("xavier", trees.XAVIER_JETPACK_4),
                       ("intel", trees.INTEL)):  # fmt: skip
        root = lay(tmp_path / name, {"proc/meminfo": "MemTotal: 4 kB\nMemAvailable: 2 kB\n", ".dockerenv": "", **tree})
        again = lay(tmp_path / f"{name}-again", record(tmp_path, root)["files"])
        assert read(again, "aarch64") == read(root, "aarch64")
        rails, wanted = power.rails(again), power.rails(root)
        assert [rail.name for rail in rails.found] == [rail.name for rail in wanted.found]
        assert doctor.memory({}, again) == doctor.memory({}, root)


def test_a_recording_holds_only_what_is_read_and_does_not_name_the_machine(tmp_path: Path) -> None:
    container = f"0::/docker/{'ab' * 32}\n"
    root = lay(tmp_path / "board", {
        **trees.PI_5,
        "proc/cpuinfo": f"{trees.PI_5['proc/cpuinfo']}\nSerial\t\t: {SERIAL}\n",
        "proc/1/cgroup": container,
        "proc/loadavg": f"0.10 0.20 0.30 1/100 {platform.node()}\n",
        "proc/self/maps": "00400000-00452000 r-xp /home/somebody/python\n",
        "proc/device-tree/serial-number": SERIAL,
        "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
        "etc/shadow": "secret",
    })  # fmt: skip
    found = record(tmp_path, root)
    text = json.dumps(found)
    for private in (SERIAL, platform.node(), "somebody", "abab", "machine-id", "secret", "serial-number"):
        assert private not in text, private
    assert found["files"]["proc/1/cgroup"] == "0::/docker/0\n"
    host = read(lay(tmp_path / "again", found["files"]), "aarch64")
    assert host == replace(read(root, "aarch64"), host_id="")
    assert (host.virtual, host.board) == ("container", "Raspberry Pi 5 Model B Rev 1.0")
    assert (host.throttled, host.firmware_temperature_c) == ("50000", 61.5)
