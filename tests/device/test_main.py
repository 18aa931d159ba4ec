from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.main import main
from rowcol_edge.errors import BudgetError, MeasurementError, NotComparableError
from rowcol_edge.package import write_bundle

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, stdout and stderr of a command."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def frame(tmp_path: Path) -> Path:
    path = tmp_path / "part.npy"
    np.save(path, np.full((5, 6), 200, np.uint8))
    return path


def test_verify_says_what_it_checked(run: Run, bundle_path: Path) -> None:
    code, out, err = run("verify", bundle_path)
    assert (code, err) == (0, "")
    assert "7 files match the manifest" in out
    assert out.count("ok    ") == 2
    assert "4 of 4 labels the same" in out


def test_verify_json_is_the_report(run: Run, bundle_path: Path) -> None:
    code, out, err = run("verify", bundle_path.with_name("bundle.zip"), "--json", "--threads", 1)
    report = json.loads(out)
    assert (code, err, report["ok"], report["bundle"]) == (0, "", True, "tiny")
    assert [arm["name"] for arm in report["arms"]] == ["factored@fp32", "dense@fp32"]


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_failed_arm_exits_with_1_after_the_whole_report(
    run: Run, bundle_parts: dict[str, Any], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    outputs = bundle_parts["golden_outputs"]
    wrong = {**outputs, "dense@fp32": {"output": outputs["dense@fp32"]["output"] + 1}}
    path = write_bundle(tmp_path / "b", **{**bundle_parts, "golden_outputs": wrong})
    code, out, err = run("verify", path, *flags)
    assert code == 1
    assert err.startswith("error: arm dense@fp32")
    assert err.count("\n") == 1
    if flags:
        assert [arm["ok"] for arm in json.loads(out)["arms"]] == [True, False]
    else:
        assert "FAILED dense@fp32" in out


def test_run_prints_a_line_for_each_input(run: Run, bundle_path: Path, frame: Path) -> None:
    code, out, err = run("run", bundle_path, frame, frame, "--arm", "dense@fp32")
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 2)
    assert lines[0].startswith(f"{frame}: ")
    assert lines[0] == lines[1]


def test_run_json_holds_all_predictions(run: Run, bundle_path: Path, frame: Path) -> None:
    code, out, _ = run("run", bundle_path, frame, "--json")
    document = json.loads(out)
    assert (code, document["arm"], document["digest"]) == (0, "factored@fp32", Bundle.open(bundle_path).digest)
    [result] = document["results"]
    assert result["source"] == str(frame)
    assert sum(result["prediction"]["scores"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nowhere"], "nowhere: expected a bundle folder or .zip"),
        (["run", "BUNDLE", "nowhere.png", "--json"], "nowhere.png: expected a readable file"),
        (["run", "BUNDLE", "FRAME", "--arm", "dense@fp3"], "did you mean dense@fp32?"),
        (["profile", "BUNDLE", "--out", "no/such/folder/p.json"], "name another place with --out"),
    ],
)
def test_bad_input_is_one_line_on_stderr(
    run: Run, bundle_path: Path, frame: Path, arguments: list[str], message: str, measure: dict[str, Any]
) -> None:
    places = {"BUNDLE": str(bundle_path), "FRAME": str(frame)}
    code, out, err = run(*(places.get(a, a) for a in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert measure == {}


def test_a_damaged_bundle_is_named(run: Run, bundle_path: Path) -> None:
    (bundle_path / "arms" / "dense@fp32.onnx").write_bytes(b"short")
    code, _, err = run("verify", bundle_path)
    assert code == 2
    assert "arms/dense@fp32.onnx: expected" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["verify"],
        ["guess", "b"],
        ["run", "b"],
        ["profile", "b", "--seconds", "-1"],
        ["verify", "b", "--threads", "-2"],
    ],
)
def test_a_wrong_command_line_exits_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The profiler replaced by one that notes what it was asked for."""
    asked: dict[str, Any] = {}

    def profile(bundle: Bundle, *, progress: Callable[[str, int, int], None], **options: Any) -> Any:
        asked.update(options, bundle=bundle.manifest.name)
        for done in range(1, 21):
            progress("blocks", done, 20)
        content = {"schema": 1, "arms": {}}

        def raise_if_over_budget() -> None:
            if "--over" in bundle.manifest.build.get("command", ""):
                raise BudgetError("memory on a board")

        return SimpleNamespace(
            to_dict=lambda: content, to_json=lambda: json.dumps(content), raise_if_over_budget=raise_if_over_budget
        )

    modules = {"measure": {"profile": profile}, "table": {"profile_table": lambda _: "the table"}}
    for name, members in modules.items():
        module = ModuleType(f"rowcol_edge.device.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_profile_writes_into_the_bundle_and_prints_the_table(
    run: Run, bundle_path: Path, measure: dict[str, Any]
) -> None:
    code, out, err = run("profile", bundle_path)
    assert (code, out) == (0, "the table\n")
    [written] = (bundle_path / "profiles").iterdir()
    assert written.suffix == ".json"
    assert json.loads(written.read_text()) == {"schema": 1, "arms": {}}
    assert str(written) in err
    assert "blocks 20/20" in err
    assert measure == {"bundle": "tiny"}  # nothing else: the profiler's own defaults hold
    Bundle.open(bundle_path)


def test_profile_hands_on_what_was_asked_for(
    run: Run, bundle_path: Path, tmp_path: Path, measure: dict[str, Any]
) -> None:
    out_file = tmp_path / "p.json"
    flags = [
        "--arms",
        "factored@fp32, dense@fp32",
        "--baseline",
        "dense@fp32",
        "--blocks",
        3,
        "--seconds",
        1.5,
        "--threads",
        0,
        "--energy",
        "--memory",
        "--ops",
    ]
    code, out, _ = run("profile", bundle_path, *flags, "--out", out_file, "--json")
    assert code == 0
    assert json.loads(out) == json.loads(out_file.read_text())
    assert measure == {
        "arms": ("factored@fp32", "dense@fp32"),
        "baseline": "dense@fp32",
        "blocks": 3,
        "seconds": 1.5,
        "threads": 0,
        "energy": True,
        "memory": True,
        "ops": True,
        "bundle": "tiny",
    }
    assert not (bundle_path / "profiles").exists()


@pytest.mark.usefixtures("measure")
@pytest.mark.parametrize("command", ["profile", "engine"])
@pytest.mark.parametrize("given", ["", " , "])
def test_a_list_without_an_arm_is_refused(run: Run, bundle_path: Path, command: str, given: str) -> None:
    code, out, err = run(command, bundle_path, "--arms", given)
    assert (code, out, err) == (2, "", f"error: arms: expected at least one arm, got {given!r}\n")


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_too_much_memory_exits_with_1_after_the_profile_was_written(
    run: Run, bundle_parts: dict[str, Any], tmp_path: Path, measure: dict[str, Any], flags: tuple[str, ...]
) -> None:
    manifest = replace(bundle_parts["manifest"], build={"command": "--over"})
    path = write_bundle(tmp_path / "b", **{**bundle_parts, "manifest": manifest})
    code, out, err = run("profile", path, *flags)
    assert code == 1
    assert err.endswith("\nerror: memory on a board\n")
    assert len(list((path / "profiles").iterdir())) == 1
    assert json.loads(out) == {"schema": 1, "arms": {}} if flags else out == "the table\n"


def test_the_profile_of_a_zip_goes_to_the_current_folder(
    run: Run, bundle_path: Path, tmp_path: Path, measure: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert run("profile", bundle_path.with_name("bundle.zip"))[0] == 0
    assert [path.suffix for path in here.iterdir()] == [".json"]


def test_a_disk_that_fills_up_meanwhile_costs_no_measurement(
    run: Run, bundle_path: Path, tmp_path: Path, measure: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spare").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spare"))
    code, out, err = run("profile", bundle_path, "--out", "/dev/full")
    [kept] = (tmp_path / "spare").glob("*/full")
    assert (code, out) == (2, "")
    assert f"No space left on device – nothing is lost: the profile is kept in {kept}" in err
    assert json.loads(kept.read_text()) == {"schema": 1, "arms": {}}


def test_a_profile_that_can_be_kept_nowhere_says_so(
    run: Run, bundle_path: Path, tmp_path: Path, measure: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    code, out, err = run("profile", bundle_path, "--out", "/dev/full")
    assert (code, out) == (2, "")
    assert "No space left on device – make room" in err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (NotComparableError("two boards", hint="measure on one"), 3, "two boards – measure on one"),
        (MeasurementError("two\nlines"), 2, "two lines"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (MemoryError(), 2, "not enough memory"),
    ],
)
def test_what_goes_wrong_inside_becomes_an_exit_code(
    run: Run,
    bundle_path: Path,
    measure: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    text: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["rowcol_edge.device.measure"], "profile", fail)
    assert run("profile", bundle_path) == (
        code,
        "",
        f"error: {text}\n" if not isinstance(error, OSError) else f"error: {error}\n",
    )
    assert list((bundle_path / "profiles").iterdir()) == []


def test_the_worker_gets_its_arguments_untouched(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    worker = ModuleType("rowcol_edge.device.worker")
    vars(worker)["main"] = lambda argv: seen.append(argv) or 5
    monkeypatch.setitem(sys.modules, worker.__name__, worker)
    assert run("_worker", "--anything", "x")[0] == 5
    assert seen == [["--anything", "x"]]
