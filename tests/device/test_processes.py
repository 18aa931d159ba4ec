"""Real worker processes, one each: that they start, fail and hang as they should. No time is asserted."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from rowcol_edge.device import processes
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.processes import Processes, worker_command
from rowcol_edge.device.worker import FOOTPRINT, MEMORY, TIME, Request
from rowcol_edge.errors import MeasurementError


@pytest.fixture
def request_(bundle: Bundle) -> Request:
    return Request(
        TIME,
        "dense@fp32",
        "onnxruntime",
        str(bundle.artifact("dense@fp32")),
        str(bundle.root / bundle.manifest.golden_inputs),
        {"image": 1},
        1,
        run_seconds=0.02,
        warmup_seconds=0.01,
        max_samples=8,
    )


def test_a_fresh_process_measures(request_: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # nothing may hang on the folder it is started in
    executor = Processes({}, 120.0)
    timed = executor.time(request_, "arm dense@fp32, block 1")
    assert 5 <= len(timed.samples_ns) <= 8
    assert timed.import_ns > timed.first_ns > 0
    memory = executor.memory(replace(request_, mode=MEMORY), "arm dense@fp32, memory run 1")
    assert memory.runtime_version == timed.runtime_version
    assert memory.peak_bytes is not None
    assert memory.baseline_bytes is not None
    assert memory.peak_bytes >= memory.baseline_bytes > 1 << 20


def test_a_failing_process_is_named_with_its_last_words(request_: Request) -> None:
    broken = replace(request_, artifact="no/such.onnx")
    with pytest.raises(MeasurementError, match=r"arm x, block 3: .*exit code 2: error: .*no/such.onnx") as e:
        Processes({}, 120.0).time(broken, "arm x, block 3")
    assert e.value.what == "arm x, block 3"


def stub(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(processes, "worker_command", lambda: ([sys.executable, "-c", code], ""))


def test_a_crash_names_its_signal(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "import os, sys; sys.stderr.write('going down\\n'); sys.stderr.flush(); os.kill(os.getpid(), 9)")
    with pytest.raises(MeasurementError, match="signal 9: going down – Linux does that where memory runs out"):
        Processes({}, 60.0).time(request_, "arm x, block 1")


def test_a_process_that_hangs_is_ended(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "import time; time.sleep(600)")
    with pytest.raises(MeasurementError, match="arm x, block 1: expected a result within"):
        Processes({}, 0.2).time(request_, "arm x, block 1")


def test_a_slow_model_gets_the_time_that_its_inferences_are_known_to_take(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, "import time; time.sleep(2); print('[]')")
    with pytest.raises(MeasurementError, match="arm x, block 1: expected a result within"):
        Processes({}, 0.2).time(request_, "arm x, block 1")
    with pytest.raises(MeasurementError, match="expected an object, got"):  # of the result, which came
        Processes({}, 0.2).time(replace(request_, inference_seconds=1.0), "arm x, block 1")


def test_a_process_that_was_stopped_is_ended_too(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process takes no signal but the one that kills it."""
    stub(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
    with pytest.raises(MeasurementError, match="arm x, block 1: expected a result within"):
        Processes({}, 0.5).footprint(request_, "arm x, block 1")


@pytest.mark.parametrize("mode", [TIME, MEMORY, FOOTPRINT], ids=["latency", "memory", "footprint"])
def test_a_process_that_runs_out_of_memory_is_named(
    request_: Request, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """A limit on its address space that the import of the runtime meets."""
    command, folder = worker_command()
    limited = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_AS, (96 << 20, 96 << 20)); "
    start = f"os.execv(sys.executable, {[sys.executable, *command[1:]]!r})"
    monkeypatch.setattr(processes, "worker_command", lambda: ([sys.executable, "-c", limited + start], folder))
    run = getattr(Processes({}, 120.0), mode)
    with pytest.raises(MeasurementError, match="arm x, run 1: expected a process that ends well, got ") as e:
        run(replace(request_, mode=mode), "arm x, run 1")
    assert e.value.exit_code == 2
    assert "memory" in e.value.got.lower() or "signal" in e.value.got


@pytest.mark.parametrize(("printed", "what"), [("chatter", "one JSON result"), ('{"import_ns": 1}', "result of arm x")])
def test_a_result_that_is_none(request_: Request, monkeypatch: pytest.MonkeyPatch, printed: str, what: str) -> None:
    stub(monkeypatch, f"print({printed!r})")
    with pytest.raises(MeasurementError, match=what):
        Processes({}, 60.0).time(request_, "arm x")


def test_caps_reach_the_process(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "import os, sys; sys.exit(os.environ['ONEDNN_MAX_CPU_ISA'])")
    with pytest.raises(MeasurementError, match="exit code 1: AVX2"):
        Processes({"ONEDNN_MAX_CPU_ISA": "AVX2"}, 60.0).time(request_, "arm x")


def test_inside_an_archive_the_worker_is_the_archive_itself(tmp_path: Path, root: Path) -> None:
    archive = tmp_path / "device.pyz"
    with zipfile.ZipFile(archive, "w") as target:
        for path in [root / "rowcol_edge/errors.py", *(root / "rowcol_edge/device").rglob("*.py")]:
            target.write(path, path.relative_to(root).as_posix())
        target.writestr("rowcol_edge/__init__.py", "")
    code = "from rowcol_edge.device.processes import worker_command; print(worker_command())"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(archive)!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == repr(([sys.executable, str(archive), "_worker"], ""))
    assert worker_command() == ([sys.executable, "-m", "rowcol_edge.device", "_worker"], str(root))
