"""`rowcol-edge fleet profile` as it is typed, where nothing is measured."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from rowcol_edge import cli
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.errors import ConfigError, MeasurementError
from rowcol_edge.fleet import boards, campaign, gather
from rowcol_edge.fleet.gather import MEASURED, Entry, Gathered
from rowcol_edge.fleet.queueing import DONE, FAILED, Ended, Job, Outcome, Queue

from .profiles import make_bundle, make_manifest, make_profile


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run_command([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the page goes of a campaign that gave one profile."""
    folder = tmp_path / "results"

    def profile(bundles: list[Path], *given: Any, **named: Any) -> Gathered:
        with Bundle.open(bundles[0]) as bundle:
            digest = bundle.digest
        (folder / "profiles").mkdir(parents=True)
        (folder / "profiles/a.json").write_text(make_profile(samples=6, digest=digest).to_json(), encoding="utf-8")
        return Gathered(folder, (Entry("tiny", digest, "generic-x86", "a", MEASURED, file="profiles/a.json"),))

    monkeypatch.setattr(campaign, "profile", profile)
    return folder / "report.html"


@pytest.fixture
def asked(tmp_path: Path) -> list[object]:
    """A command with a bundle, a board and a place for what is measured."""
    make_bundle(tmp_path / "bundle", make_manifest())
    listed = tmp_path / "boards.toml"
    listed.write_text('schema = 1\n[[boards]]\nname = "a"\ntarget = "generic-x86"\non = "local"\n')
    return ["fleet", "profile", tmp_path / "bundle", "--boards", listed, "--out", tmp_path / "results"]


def test_a_time_that_does_not_end_is_refused_before_anything_is_sent(
    asked: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sent(*given: Any, **named: Any) -> None:
        raise AssertionError("sent")

    monkeypatch.setattr(campaign, "_engine", sent)
    assert run(*asked, "--seconds", "inf") == 2
    assert "a time > 0 that ends\n  got:      inf" in capsys.readouterr().err
    with pytest.raises(MeasurementError, match="a time > 0 that ends, got nan"):
        campaign.profile([tmp_path / "bundle"], boards.read(tmp_path / "boards.toml"), seconds=float("nan"))
    assert run(*asked, "--limit", "inf") == 2
    assert "error: --limit\n  expected: a time > 0 that ends\n  got:      inf" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="a time > 0 that ends, got nan"):
        campaign.profile([tmp_path / "bundle"], boards.read(tmp_path / "boards.toml"), limit_seconds=float("nan"))
    (tmp_path / "sweep.toml").write_text('model = "sample:fmnist-vit"\n')
    assert run("fleet", "sweep", tmp_path / "sweep.toml", "--out", tmp_path / "results", "--limit", "inf") == 2
    assert "error: --limit" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_what_is_to_be_measured_is_handed_on(
    asked: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[dict[str, Any]] = []

    def drive(queue: Queue, *given: Any, **named: Any) -> None:
        jobs.extend(job.work for job in queue.jobs)

    monkeypatch.setattr(campaign, "drive", drive)
    options = ("--arms", "factored@int8, dense@int8", "--baseline", "dense@fp32", "--threads", "3")
    assert run(*asked, *options) == 1
    assert [job["options"] for job in jobs] == [
        {"arms": ("factored@int8", "dense@int8"), "baseline": "dense@fp32", "threads": 3}
    ]
    capsys.readouterr()
    assert run(*asked, "--arms", "dense@int16") == 2
    assert "dense@int16" in capsys.readouterr().err
    assert run(*asked, "--arms", ",") == 2
    assert "at least one arm" in capsys.readouterr().err
    assert len(jobs) == 1


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_the_results_are_printed_before_the_page_is_written(
    flags: tuple[str, ...], asked: list[object], measured: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("rowcol_edge.report.fleet.write_whole", full)
    assert run(*asked, *flags) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["entries"][0]["board"] == "a" if flags else "measured" in said.out
    assert f"{measured}: No space left on device" in said.err


def test_what_is_not_known_is_empty_in_the_document_and_a_dash_in_the_table(
    asked: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("1", "tiny", {"name": "tiny", "digest": "cd" * 32, "target": "generic-x86"}, ("a", "b"))
    emulated = make_profile(levels_ms={"dense@fp32": 8.0, "dense@int8": 4.0}, evidence="emulated", samples=6).to_json()
    folder = gather.Folder(tmp_path / "results")
    entries = [
        folder.keep(Ended(job, "a", Outcome(FAILED, reason="away"), 1, 2.0)),
        folder.keep(Ended(job, "b", Outcome(DONE, emulated), 2, 2.0)),
    ]
    monkeypatch.setattr(campaign, "profile", lambda *_, **__: folder.write(entries))
    assert run(*asked, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "results/fleet.json").read_text(encoding="utf-8"))
    assert [entry["state"] for entry in found["entries"]] == ["failed", "measured"]
    assert [(entry["latency"], entry["ratio"]) for entry in found["entries"]] == [("", ""), ("", "")]
    assert run(*asked) == 1
    shown = capsys.readouterr().out
    assert "tiny on a, 1 try: away" in shown
    assert "–" in next(line for line in shown.splitlines() if " failed" in line)


def test_the_page_is_named_or_the_extra_that_makes_it(
    asked: list[object], measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert run(*asked, "--json") == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)["entries"]) == 1
    assert f"page written to {measured}\n" in said.err
    assert "<html" in measured.read_text(encoding="utf-8")
    shutil.rmtree(measured.parent)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run(*asked) == 0
    assert "no page: a report needs jinja2" in (err := capsys.readouterr().err)
    assert "pip install 'rowcol-edge[report]'" in err
    assert not measured.exists()
