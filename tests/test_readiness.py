from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rowcol_edge
from rowcol_edge import cli, readiness, targets
from rowcol_edge.device import installed
from rowcol_edge.device.doctor import GOOD, NOTE, STOP, TOLD, Diagnosis

REQUIRES = [
    "numpy>=1.24",
    'torch>=2.10; extra == "build"',
    'onnx>=1.20; extra == "build"',
    'nncf>=3; extra == "openvino"',
]

Pretend = Callable[..., None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Installed packages, by name, and backends that do not load, with why."""

    def load(what: str) -> installed.Loaded:
        if any(map(installed.version, installed.PACKAGES.get(what, (what,)))):
            return installed.Loaded("1", ("CPUExecutionProvider",))
        return installed.Loaded(failure="not there")

    def there(broken: dict[str, str] | None = None, **versions: str) -> None:
        monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
        monkeypatch.setattr(installed, "version", lambda name: versions.get(name, ""))
        monkeypatch.setattr(installed, "load", load)
        monkeypatch.setattr(readiness, "_failure", lambda name: (broken or {}).get(name, ""))

    return there


def by_what(found: Diagnosis) -> dict[str, tuple[str, str, str]]:
    return {f.what: (f.level, f.found, f.do) for f in found.findings}


def test_an_extra_is_what_this_installation_says(pretend: Pretend) -> None:
    pretend()
    assert readiness.requirements("build") == [Requirement(text) for text in REQUIRES[1:3]]
    assert readiness.requirements("fleet") == []


def test_all_that_is_there_is_good(pretend: Pretend) -> None:
    pretend(torch="2.13.0+cpu", onnx="1.23.2", nncf="3.4.0", pip="25.0")
    found = by_what(rowcol_edge.doctor())
    assert found["extra build"] == (GOOD, "torch 2.13.0+cpu, onnx 1.23.2", "")
    assert found["extra openvino"] == (GOOD, "nncf 3.4.0", "")
    assert found["backend onnxruntime"][0] == found["backend openvino"][0] == GOOD
    assert found["pip"] == (GOOD, "25.0", "")
    assert "board onnxruntime" not in found


def test_a_package_that_is_missing_or_too_old_says_how_to_install_the_extra(pretend: Pretend) -> None:
    pretend(torch="2.4.0", nncf="2.9")
    found = rowcol_edge.doctor()
    said = by_what(found)
    do = "python -m pip install 'rowcol-edge[build]'"
    assert said["extra build"] == (STOP, "torch 2.4.0 (>=2.10), onnx missing (>=1.20)", do)
    assert said["extra openvino"][:2] == (NOTE, "nncf 2.9 (>=3)")
    assert found.stopped


def test_one_backend_that_loads_is_enough(pretend: Pretend) -> None:
    good = {"torch": "2.13", "onnx": "1.23", "nncf": "3.4"}
    broken = {"openvino": "needs openvino: expected package openvino, got none – install it with: pip install openvino"}
    pretend(broken, **good)
    found = rowcol_edge.doctor("intel-n100")
    assert by_what(found)["backend openvino"] == (
        NOTE,
        "needs openvino: expected package openvino, got none",
        "install it with: pip install openvino",
    )
    assert not found.stopped
    pretend({"openvino": "gone", "onnxruntime": "gone"}, **good)
    assert rowcol_edge.doctor("intel-n100").stopped


def test_a_target_says_what_its_board_installs(pretend: Pretend) -> None:
    pretend(torch="2.13", onnx="1.23")
    found = by_what(rowcol_edge.doctor("raspberry-pi-5"))
    spec = targets.load("raspberry-pi-5").runtime("onnxruntime")
    assert found["board onnxruntime"] == (
        TOLD,
        "≥ 1.17.0, opset 20, IR 9",
        f"on the board:\n{targets.install_lines(spec)}",
    )
    assert found["board tflite"][1] == "≥ 2.14.0"


@pytest.fixture
def pi(tmp_path: Path) -> Path:
    """What a Raspberry Pi 5 shows in /proc."""
    files = {
        "cpuinfo": "Features\t: asimd asimddp asimdhp\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\n" * 4,
        "device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "meminfo": "MemAvailable: 524288 kB\n",
    }
    for name, text in files.items():
        (tmp_path / "proc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc" / name).write_text(text)
    return tmp_path


TFLITE_OLD = {"numpy": "2.4.6", "tflite-runtime": "2.14.0"}


@pytest.mark.parametrize(
    ("there", "what", "level", "said"),
    [
        ({"numpy": "2.4.6", "onnxruntime": "1.32.0"}, "onnxruntime", GOOD, "onnxruntime 1.32.0"),
        ({"numpy": "2.4.6", "onnxruntime": "1.16.3"}, "onnxruntime", STOP, "older than 1.17.0, the oldest that reads"),
        (TFLITE_OLD, "numpy", STOP, "which tflite-runtime 2.14.0 does not work with"),
        (TFLITE_OLD | {"onnxruntime": "1.32.0"}, "numpy", NOTE, "which tflite-runtime 2.14.0 does not work with"),
        ({"onnxruntime": "1.32.0"}, "numpy", STOP, "nothing runs without it"),
        ({"numpy": "2.4.6", "openvino": "2026.1"}, "openvino", STOP, "offers CPUExecutionProvider, not CPU"),
    ],
)  # fmt: skip
def test_on_the_board_the_runtimes_matter_and_the_build_extra_does_not(
    pretend: Pretend, pi: Path, there: dict[str, str], what: str, level: str, said: str
) -> None:
    pretend({"onnxruntime": "needs onnx"}, **there)
    found = readiness.diagnose(targets.load("raspberry-pi-5"), pi, "aarch64")
    board = by_what(found)
    assert board[what][0] == level
    assert said in board[what][1]
    assert found.stopped == (level == STOP)
    assert {board[name][0] for name in ("extra build", "backend onnxruntime")} == {NOTE}
    assert board["free memory"] == (NOTE, "512 MiB", "the target allows an inference 1,024 MiB: end other programs")
    assert board["board onnxruntime"][2] == targets.install_lines(targets.load("raspberry-pi-5").runtimes[0])


def test_where_any_machine_is_the_target_builds_are_wanted_too(pretend: Pretend) -> None:
    pretend(onnx="1.23")
    found = by_what(rowcol_edge.doctor("generic-x86"))
    assert found["extra build"][0] == STOP
    assert found["openvino"][0] == STOP
    assert "openvino>=2024.6" in found["openvino"][2]


def test_free_memory_is_always_told(pretend: Pretend) -> None:
    pretend(onnx="1.23")
    found = by_what(rowcol_edge.doctor())
    assert found["free memory"][0] == GOOD
    assert "onnxruntime" not in found


def test_an_installation_without_metadata_is_told(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    pretend()
    monkeypatch.setattr(metadata, "requires", none)
    assert by_what(rowcol_edge.doctor())["extra build"][:2] == (NOTE, "unknown: this checkout was not installed")


def test_a_backend_is_loaded_in_a_process_of_its_own() -> None:
    assert readiness._failure("onnxruntime") == ""
    assert "'onnxrt'" in readiness._failure("onnxrt")
    assert "did you mean onnxruntime" in readiness._failure("onnxrt")


def test_the_command(pretend: Pretend, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.run_command(["doctor", *arguments])
        return int(ended.value.code or 0), capsys.readouterr().out

    pretend(torch="2.13", onnx="1.23", nncf="3.4", numpy="2.4.6", onnxruntime="1.32.0")
    code, out = run("generic-x86", "--json")
    assert (code, json.loads(out)["ok"]) == (0, True)
    pretend(onnx="1.23")
    code, out = run()
    assert code == 2
    assert "✗ extra build: torch missing (>=2.10)" in out
    assert "    python -m pip install 'rowcol-edge[build]'" in out
    assert run("raspbery-pi-5")[0] == 2
