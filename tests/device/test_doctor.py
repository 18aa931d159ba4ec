from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rowcol_edge import targets
from rowcol_edge.device import doctor, installed
from rowcol_edge.device.doctor import GOOD, NOTE, STOP, Diagnosis, Finding, Needs
from rowcol_edge.device.main import main
from rowcol_edge.device.manifest import RuntimeEntry
from rowcol_edge.errors import BundleError

ROOT = Path(__file__).resolve().parents[2]
INSTALL = 'python3 -m pip install "onnxruntime>=1.17" numpy pillow'
PI5 = Needs(
    "demo",
    RuntimeEntry("onnxruntime", "1.17.0", 18, 9, 4, INSTALL, ("CPUExecutionProvider",)),
    targets.load("raspberry-pi-5").to_dict(),
)
TFLITE = replace(PI5, runtime=RuntimeEntry("tflite", "2.14.0", None, None, 4, INSTALL, ("CPU",)))
CORE = "Features\t: fp asimd asimddp asimdhp\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def pi(tmp_path: Path) -> Path:
    """What a Raspberry Pi 5 at rest shows in /proc and /sys."""
    return write(
        tmp_path / "pi",
        {
            "proc/cpuinfo": CORE * 4,
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            "proc/meminfo": "MemAvailable: 4194304 kB\nSwapTotal: 524272 kB\nSwapFree: 524272 kB\n",
            "proc/loadavg": "0.05 0.02 0.00 1/150 900\n",
            "sys/class/thermal/thermal_zone0/temp": "48312\n",
            "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": "0\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
        },
    )


Packages = Callable[..., None]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Packages:
    """Pretend that these packages are installed, and that loading a runtime ends like this."""

    def pretend(loaded: installed.Loaded | None = None, **versions: str) -> None:
        there = {name.replace("_", "-"): version for name, version in versions.items()}
        good = installed.Loaded("1", ("CPUExecutionProvider", "CPU"))
        alone = {"numpy": installed.Loaded("2"), "pillow": installed.Loaded("12")}
        monkeypatch.setattr(installed, "version", lambda name: there.get(name, ""))
        monkeypatch.setattr(installed, "load", lambda what: alone.get(what) or loaded or good)
        monkeypatch.setattr(doctor.system, "_usable", lambda: 4)

    return pretend


def findings(diagnosis: Diagnosis, what: str) -> list[tuple[str, str, str]]:
    return [(f.level, f.found, f.do) for f in diagnosis.findings if f.what == what]


def only(diagnosis: Diagnosis, what: str) -> tuple[str, str, str]:
    [found] = findings(diagnosis, what)
    return found


GOOD_PACKAGES = {"numpy": "2.4.6", "pillow": "12.0.0", "onnxruntime": "1.32.0"}


def test_a_board_that_has_everything(pi: Path, packages: Packages) -> None:
    packages(**GOOD_PACKAGES)
    needs = replace(PI5, target={**PI5.target, "pythons": [f"3.{sys.version_info[1]}"], "platform": ""})
    found = doctor.diagnose(needs, pi, "aarch64")
    assert [f for f in found.findings if f.level != GOOD] == []
    assert not found.stopped
    assert only(found, "machine")[1].startswith("Raspberry Pi 5 Model B Rev 1.0, aarch64")
    assert only(found, "free memory")[1] == "4,096 MiB"
    assert "nothing in the way, 0 to know of" in doctor.report(found)


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"onnxruntime": "1.16.3"}, "1.16.3 is older than 1.17.0, the oldest that reads opset 18 and IR version 9"),
        ({"onnxruntime": ""}, "not installed"),
    ],
)
def test_a_runtime_that_is_missing_or_too_old_stops_and_says_how_to_install_it(
    pi: Path, packages: Packages, versions: dict[str, str], message: str
) -> None:
    missing = installed.Loaded(failure="No module named 'onnxruntime'") if not versions["onnxruntime"] else None
    packages(missing, **{**GOOD_PACKAGES, **versions})
    found = doctor.diagnose(PI5, pi, "aarch64")
    level, said, do = only(found, "onnxruntime")
    assert (level, do) == (STOP, INSTALL)
    assert message in said
    assert found.stopped


def test_a_missing_provider_stops(pi: Path, packages: Packages) -> None:
    packages(installed.Loaded("1.32.0", ("CPUExecutionProvider",)), **GOOD_PACKAGES)
    needs = replace(PI5, runtime=replace(PI5.runtime, providers=("CUDAExecutionProvider", "CPUExecutionProvider")))
    level, said, _ = only(doctor.diagnose(needs, pi, "aarch64"), "onnxruntime")
    assert level == STOP
    assert said == "onnxruntime 1.32.0 offers CPUExecutionProvider, not CUDAExecutionProvider"


def test_a_delegate_is_a_library_that_must_be_there(pi: Path, packages: Packages, tmp_path: Path) -> None:
    packages(numpy="1.26.4", pillow="12.0.0", tflite_runtime="2.16.2")
    library = tmp_path / "libvx_delegate.so"
    needs = replace(TFLITE, runtime=replace(TFLITE.runtime, providers=(str(library),)))
    assert only(doctor.diagnose(needs, pi, "aarch64"), "tflite")[0] == STOP
    library.touch()
    assert only(doctor.diagnose(needs, pi, "aarch64"), "tflite")[0] == GOOD


@pytest.mark.parametrize(
    ("needs", "versions", "conflict"),
    [
        (TFLITE, {"tflite_runtime": "2.14.0"}, "2.4.6, which tflite-runtime 2.14.0 does not work with"),
        (replace(TFLITE, target={}), {"tflite_runtime": "2.16.2"}, ""),  # a vendor's
        (TFLITE, {"tflite_runtime": "2.14.0", "ai_edge_litert": "2.3.0"}, ""),
        (PI5, {"onnxruntime": "1.17.0"}, "2.4.6, which onnxruntime 1.17.0 does not work with"),
        (PI5, {"onnxruntime": "1.19.2"}, ""),
    ],
)
def test_numpy_2_with_a_runtime_built_against_1(
    pi: Path, packages: Packages, needs: Needs, versions: dict[str, str], conflict: str
) -> None:
    packages(numpy="2.4.6", pillow="12.0.0", **versions)
    found = only(doctor.diagnose(needs, pi, "aarch64"), "numpy")
    assert found == ((STOP, conflict, 'python3 -m pip install "numpy<2"') if conflict else (GOOD, "2.4.6", ""))


def test_any_ai_edge_litert_is_new_enough(pi: Path, packages: Packages) -> None:
    packages(numpy="2.4.6", pillow="12.0.0", ai_edge_litert="1.4.0")
    found = doctor.diagnose(TFLITE, pi, "aarch64")
    assert only(found, "tflite") == (GOOD, "ai-edge-litert 1.4.0", "")
    # but not what the target's own requirement says
    said = only(found, "ai-edge-litert")
    assert said == (NOTE, "1.4.0, not ai-edge-litert>=2", 'python3 -m pip install "ai-edge-litert>=2"')


def test_the_package_that_loads_is_the_one_that_counts(pi: Path, packages: Packages) -> None:
    both = {"ai_edge_litert": "2.3.0", "tflite_runtime": "2.14.0"}
    packages(installed.Loaded("2.14.0", ("CPU",), module="tflite_runtime"), numpy="2.4.6", pillow="12.0.0", **both)
    found = doctor.diagnose(TFLITE, pi, "aarch64")
    assert only(found, "tflite") == (GOOD, "tflite-runtime 2.14.0", "")
    assert only(found, "numpy")[:2] == (STOP, "2.4.6, which tflite-runtime 2.14.0 does not work with")
    packages(
        installed.Loaded(failure="importing it ends the process (SIGILL)"), numpy="1.26.4", pillow="12.0.0", **both
    )
    level, said, do = only(doctor.diagnose(TFLITE, pi, "aarch64"), "tflite")
    assert (level, said) == (STOP, "ai-edge-litert 2.3.0 does not load: importing it ends the process (SIGILL)")
    assert do.endswith("\n# before another package: python3 -m pip uninstall -y ai-edge-litert")


def test_a_vendors_package_without_metadata_has_the_version_of_its_module(pi: Path, packages: Packages) -> None:
    packages(installed.Loaded("2.16.2", ("CPU",), module="tflite_runtime"), numpy="1.26.4", pillow="12.0.0")
    found = only(doctor.diagnose(TFLITE, pi, "aarch64"), "tflite")
    assert found == (GOOD, "tflite-runtime 2.16.2", "")


def test_the_requirements_are_those_of_the_alternative_in_use(pi: Path, packages: Packages) -> None:
    packages(numpy="1.26.4", pillow="12.0.0", tflite_runtime="2.14.0")
    found = doctor.diagnose(TFLITE, pi, "aarch64")
    assert only(found, "tflite") == (GOOD, "tflite-runtime 2.14.0", "")
    assert only(found, "numpy") == (GOOD, "1.26.4", "")


def test_two_builds_of_onnxruntime_are_told(pi: Path, packages: Packages) -> None:
    packages(**GOOD_PACKAGES, onnxruntime_gpu="1.23.0")
    level, said, do = findings(doctor.diagnose(PI5, pi, "aarch64"), "onnxruntime")[0]
    assert (level, said) == (NOTE, "onnxruntime and onnxruntime-gpu overwrite each other's files")
    assert "uninstall onnxruntime onnxruntime-gpu" in do


def test_another_board_is_a_proxy(pi: Path, packages: Packages) -> None:
    packages(**GOOD_PACKAGES)
    write(pi, {"proc/device-tree/model": "Raspberry Pi 4 Model B\0"})
    level, said, do = only(doctor.diagnose(PI5, pi, "aarch64"), "machine")
    assert level == NOTE
    assert said.startswith("Raspberry Pi 4 Model B")
    assert do.startswith("figures from here are of evidence proxy: Raspberry Pi 4 Model B (aarch64) stands in for")
    level, _, do = only(doctor.diagnose(PI5, pi, "x86_64"), "machine")
    assert level == NOTE
    assert "evidence emulated" in do  # an Arm processor that says it is an x86


def test_another_python_and_an_older_c_library_than_the_wheels_are_told(pi: Path, packages: Packages) -> None:
    packages(**GOOD_PACKAGES)
    needs = replace(PI5, target={**PI5.target, "pythons": ["3.99"], "platform": "manylinux_2_99_aarch64"})
    found = doctor.diagnose(needs, pi, "aarch64")
    assert only(found, "Python")[::2] == (NOTE, "the target lists 3.99: there may be no wheels for this one")
    assert only(found, "C library")[::2] == (NOTE, "the target counts on 2.99: pip may find older wheels only")


def test_what_disturbs_a_measurement_is_told(pi: Path, packages: Packages) -> None:
    packages(**GOOD_PACKAGES)
    write(
        pi,
        {
            "proc/meminfo": "MemAvailable: 524288 kB\nSwapTotal: 524288 kB\nSwapFree: 262144 kB\n",
            "proc/loadavg": "3.5 1 1 1/150 900\n",
            "sys/class/thermal/thermal_zone0/temp": "84100\n",
            "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": "50005\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        },
    )
    found = doctor.diagnose(PI5, pi, "aarch64")
    assert [said for _, said, _ in findings(found, "measuring")] == [
        "load 3.50 on 4 core(s)",
        "throttling (50005)",
        "CPU governor powersave",
    ]
    assert only(found, "temperature")[:2] == (NOTE, "84 °C")
    assert only(found, "swap")[:2] == (NOTE, "256 MiB in use")
    level, said, do = only(found, "free memory")
    assert (level, said, do) == (
        NOTE,
        "512 MiB",
        "the target allows an inference 1,024 MiB: end other programs",
    )
    assert not found.stopped


def test_a_zip_that_does_not_fit_the_temporary_folder_stops(
    pi: Path, packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages(**GOOD_PACKAGES)
    usage = shutil.disk_usage("/")._replace(free=100 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    stopped = [
        [f.level for f in doctor.diagnose(replace(PI5, unpacked_bytes=size), pi, "aarch64").findings][-1]
        for size in (0, 50 << 20, 200 << 20)
    ]
    assert stopped == [GOOD, GOOD, STOP]


def test_the_same_advice_is_printed_once() -> None:
    text = doctor.report(
        Diagnosis("demo", (Finding(STOP, "numpy", "not installed", INSTALL), Finding(STOP, "x", "neither", INSTALL)))
    )
    assert text.count(INSTALL) == 1
    assert text.splitlines()[-1] == "2 thing(s) in the way, 0 to know of"


def test_needs_are_read_from_a_folder_and_a_zip(bundle_path: Path) -> None:
    folder, zipped = doctor.read_needs(bundle_path), doctor.read_needs(bundle_path.with_name("bundle.zip"))
    assert folder.subject == zipped.subject == "tiny"
    assert folder.runtime == zipped.runtime
    assert folder.unpacked_bytes == 0
    assert zipped.unpacked_bytes > 1000


@pytest.mark.parametrize("content", [None, b"no zip", b'{"schema": 1}'])
def test_what_is_no_bundle_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bundle"
    if content == b"no zip":
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
        (path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError):
        doctor.read_needs(path)


def test_the_command_prints_json_and_exits_with_2_if_something_is_in_the_way(
    bundle_path: Path, capsys: pytest.CaptureFixture[str], packages: Packages
) -> None:
    packages(**GOOD_PACKAGES)
    assert main(["doctor", str(bundle_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    packages(installed.Loaded(failure="gone"), numpy="2.4.6", pillow="12.0.0")
    assert main(["doctor", str(bundle_path)]) == 2
    assert "✗ onnxruntime" in capsys.readouterr().out


Board = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without any package, not even pip."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


@pytest.fixture
def board(bare: Path, tmp_path: Path) -> Board:
    """Run doctor there, beside packages that are made up: name → (version, source of its module)."""

    def run(*arguments: object, **made_up: tuple[str, str]) -> dict[str, Any]:
        site = tmp_path / "site"
        for name, (version, source) in made_up.items():
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            write(site, {f"{name}.py": source, f"{name}-{version}.dist-info/METADATA": metadata})
        command = [bare, "-m", "rowcol_edge.device", "doctor", *arguments, "--json"]
        paths = os.pathsep.join([str(site), str(ROOT)])
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
        )
        found: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (0 if found["ok"] else 2), done.stderr
        return found

    return run


def levels(found: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {f["what"]: (f["level"], f["found"]) for f in found["findings"]}


def test_it_works_where_nothing_is_installed(board: Board, bundle_path: Path) -> None:
    found = levels(board(bundle_path))
    assert found["numpy"] == (STOP, "not installed: nothing runs without it")
    assert found["Pillow"] == (NOTE, "not installed: image files need it")
    assert found["onnxruntime"] == (STOP, "not installed")
    assert levels(board())["runtimes"] == (STOP, "none is installed")


def test_a_wheel_for_another_processor_does_not_take_the_doctor_with_it(board: Board, bundle_path: Path) -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    found = levels(
        board(bundle_path, onnxruntime=("1.20.0", crash), numpy=("2.0.0", "raise ImportError('no libblas')"))
    )
    assert found["onnxruntime"] == (
        STOP,
        "onnxruntime 1.20.0 does not load: importing it ends the process (SIGILL)",
    )
    assert found["numpy"] == (STOP, "2.0.0 does not load: ImportError: no libblas")


def test_an_installed_runtime_is_asked_what_it_offers(board: Board, bundle_path: Path) -> None:
    working = "print('noise'); __version__ = '1.20.0'\ndef get_available_providers(): return ['CPUExecutionProvider']"
    array = "class ones:\n  def __init__(self, n): pass\n  def __matmul__(self, other): return 0.0\nzeros = ones\n"
    made_up = {"onnxruntime": ("1.20.0", working), "numpy": ("2.0.0", f"{array}__version__ = '2.0.0'")}
    found = levels(board(bundle_path, **made_up))
    assert found["onnxruntime"] == (GOOD, "onnxruntime 1.20.0")
    assert found["numpy"] == (GOOD, "2.0.0")
    assert levels(board(**made_up))["onnxruntime"] == (GOOD, "onnxruntime 1.20.0: CPUExecutionProvider")
