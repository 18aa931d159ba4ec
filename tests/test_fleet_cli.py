"""`rowcol-edge fleet profile` as it is typed, where nothing is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rowcol_edge import cli
from rowcol_edge.errors import MeasurementError
from rowcol_edge.fleet import boards, campaign
from rowcol_edge.fleet.queueing import Queue

from .profiles import make_bundle, make_manifest


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run_command([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


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
