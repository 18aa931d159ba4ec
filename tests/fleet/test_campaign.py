"""`rowcol-edge fleet` without a scheduler: boards behind real sshds on loopback, and this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rowcol_edge import cli
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.profile import Profile
from rowcol_edge.errors import BudgetError, BundleError, ConfigError, FleetError
from rowcol_edge.fleet import campaign, work
from rowcol_edge.fleet.boards import Board
from rowcol_edge.fleet.gather import FAILED, KEPT, MEASURED
from rowcol_edge.fleet.queueing import DONE
from rowcol_edge.package import write_bundle, zip_bundle

from .conftest import OPTIONS, TESTS, Home, Sshd, kill, parent, processes, script, until

LOCAL = Board("here", "generic-x86", "local", "here")


def board(name: str, sshd: Sshd) -> Board:
    known_hosts = sshd.known_hosts.read_text()
    return Board(name, "generic-x86", sshd.address, "generic-x86", sshd.home.python3, None, known_hosts)


def request(bundle: Path, /, **changes: Any) -> dict[str, Any]:
    """What the process of a job on this machine is told."""
    with Bundle.open(bundle) as opened:
        digest = opened.digest
    reach = {"on": "local", "python": "python3", "folder": None, "known_hosts": None}
    told = {"kind": "profile", "bundle": str(bundle), "digest": digest, "options": OPTIONS, "board": reach, "run": "1"}
    return {**told, **changes}


def children() -> list[int]:
    """Of this process of the tests; another one may have its own at the same time. Not what they start, which has their
    command line, and no handlers of signals any more, from fork to exec."""
    mine = f"{TESTS}={os.getpid()}\0".encode()

    def wanted(entry: Path) -> bool:
        job = b"rowcol_edge.fleet.child" in (entry / "cmdline").read_bytes()
        return job and mine in (entry / "environ").read_bytes()

    found = processes(wanted)
    return [pid for pid in found if parent(pid) not in found]


def test_a_job_is_done_in_a_process_of_its_own(bundle_path: Path) -> None:
    told: list[dict[str, Any]] = []
    outcome = work.run(request(bundle_path), limit_seconds=100, tell=told.append, wanted=lambda: True)
    assert outcome.state == DONE
    with Bundle.open(bundle_path) as opened:
        assert Profile.from_json(outcome.result).digest == opened.digest
    assert {"latency", "memory"} <= {message["progress"][0] for message in told if "progress" in message}
    assert children() == []


def test_a_job_that_takes_too_long_is_ended(bundle_path: Path) -> None:
    slow = request(bundle_path, options={**OPTIONS, "seconds": 600.0, "blocks": 600})
    started = time.monotonic()
    outcome = work.run(slow, limit_seconds=5, tell=lambda _: None, wanted=lambda: True)
    assert (outcome.state, outcome.reason) == ("failed", "not done within 5 s, the time limit of a job")
    assert time.monotonic() - started < 30
    assert children() == []


def test_a_job_that_hears_nothing_is_ended_all_the_same(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "GRACE_SECONDS", 1.0)
    monkeypatch.setattr(work, "_END_SECONDS", 1.0)
    stopping = threading.Thread(target=lambda: [os.kill(pid, signal.SIGSTOP) for pid in until(children)])
    stopping.start()
    outcome = work.run(request(bundle_path), limit_seconds=3, tell=lambda _: None, wanted=lambda: True)
    stopping.join()
    assert "not done within 3 s" in outcome.reason
    assert children() == []


def test_the_parent_reports_a_job_whose_process_was_killed_and_removes_what_it_has_left(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(here))
    packed = zip_bundle(bundle_path, tmp_path / "bundle.zip", "bundle")  # which the job unpacks
    unpacked: list[Path] = []

    def kill_once_it_measures() -> None:
        unpacked.extend(until(lambda: list(here.glob("rowcol-edge-job-*/rowcol-edge-*/**/manifest.json"))))
        kill(children())

    killing = threading.Thread(target=kill_once_it_measures)
    killing.start()
    told = {**request(bundle_path), "bundle": str(packed)}
    outcome = work.run(told, limit_seconds=100, tell=lambda _: None, wanted=lambda: True)
    killing.join()
    assert outcome.state == "failed"
    assert "killed by SIGKILL: out of memory?" in outcome.reason
    assert unpacked != []
    assert list(here.iterdir()) == []


def test_sigterm_is_left_to_whoever_asked(bundle_path: Path) -> None:
    """A service manager sends it to all processes at once; the one that asked ends the others in an orderly way."""

    def terminate() -> None:
        until(lambda: told)
        for pid in children():
            os.kill(pid, signal.SIGTERM)

    told: list[dict[str, Any]] = []
    terminating = threading.Thread(target=terminate)
    terminating.start()
    outcome = work.run(request(bundle_path), limit_seconds=100, tell=told.append, wanted=lambda: True)
    terminating.join()
    assert outcome.state == DONE


def test_a_job_that_is_killed_while_it_answers_is_reported_at_once(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short = script(tmp_path / "python", """printf '{"say": "a"}\\n{"done": "{'; kill -9 $$""")
    monkeypatch.setattr(sys, "executable", str(cut_short))
    told: list[dict[str, Any]] = []
    outcome = work.run(request(bundle_path), limit_seconds=100, tell=told.append, wanted=lambda: True)
    assert told == [{"say": "a"}]
    assert outcome.state == "failed"
    assert "killed by SIGKILL" in outcome.reason


def group(leader: int) -> list[int]:
    """The processes of a group that have not ended."""

    def wanted(entry: Path) -> bool:
        state, _, led_by, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
        return led_by == str(leader) and state != "Z"

    return processes(wanted)


def test_what_a_job_has_started_ends_with_its_process(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = script(tmp_path / "python", f"sleep 600 > /dev/null &\necho $$ > {tmp_path}/leader\nkill -9 $$")
    monkeypatch.setattr(sys, "executable", str(left))
    outcome = work.run(request(bundle_path), limit_seconds=100, tell=lambda _: None, wanted=lambda: True)
    assert "killed by SIGKILL" in outcome.reason
    until(lambda: not group(int((tmp_path / "leader").read_text())), 20)


def test_what_a_job_has_started_ends_with_whoever_asked(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import subprocess, time\ndef build():\n    subprocess.Popen(['sleep', '600'])\n    time.sleep(600)\n"
    )
    job = {"kind": "build", "options": {"model": "net.py:build"}, "folder": str(tmp_path)}
    program = f"from rowcol_edge.fleet import work\nwork.run({job}, limit_seconds=600, tell=print, wanted=lambda: True)"
    asker = subprocess.Popen([sys.executable, "-c", program], cwd=Path(cli.__file__).parents[1])
    [leader] = until(lambda: [pid for pid in children() if parent(pid) == asker.pid])
    until(lambda: len(group(leader)) == 2)
    asker.kill()
    asker.wait()
    until(lambda: not group(leader), 20)
    assert group(leader) == []


def test_a_process_that_cannot_be_started_fails_its_job_and_no_other(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    starts = iter([OSError(28, "No space left on device")])
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> Any:
        if "start_new_session" in options:
            for error in starts:
                raise error
        return popen(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    there = replace(LOCAL, name="there")
    found = campaign.profile([bundle_path], [LOCAL, there], out=tmp_path / "out", say=said.append, **OPTIONS)
    assert [entry.state for entry in found.entries] == [FAILED, MEASURED]
    assert "could not be started or followed: OSError: [Errno 28] No space left" in found.entries[0].reason


@pytest.mark.parametrize(
    ("change", "message"),
    [({"digest": "0" * 64}, "expected bundle 0000"), ({"bundle": "/nowhere"}, "a bundle folder or .zip"),
     ({"options": {"threds": 1}}, "TypeError"), ({"kind": "nothing"}, "KeyError")],
)  # fmt: skip
def test_what_a_job_raises_is_its_reason(bundle_path: Path, change: dict[str, Any], message: str) -> None:
    outcome = work.run(request(bundle_path, **change), limit_seconds=100, tell=lambda _: None, wanted=lambda: True)
    assert outcome.state == "failed"
    assert message in outcome.reason


def test_this_machine_is_a_board_too(bundle_path: Path, tmp_path: Path, said: list[str]) -> None:
    out = tmp_path / "results"
    found = campaign.profile([bundle_path], [LOCAL], out=out, say=said.append, **OPTIONS)
    [entry] = found.entries
    assert (entry.state, entry.board, entry.arm, entry.attempts) == (MEASURED, "here", "dense@fp32", 1)
    measured = Profile.load(out / entry.file)
    peak = measured.arms["dense@fp32"].memory
    assert measured.digest == entry.digest
    assert peak is not None
    assert entry.memory == f"{peak.peak_bytes / (1 << 20):.0f} MiB"  # of a target that grants as much as there is
    assert json.loads((out / "fleet.json").read_text()) == found.to_dict()
    found.raise_if_incomplete()
    assert [line.partition(":")[0] for line in said] == ["1/1 tiny on here"]

    again = campaign.profile([bundle_path], [LOCAL], out=out, say=said.append, **OPTIONS)
    assert [(e.state, e.file, e.board) for e in again.entries] == [(KEPT, entry.file, "here")]
    other = campaign.profile([bundle_path], [LOCAL], out=out, say=said.append, **{**OPTIONS, "threads": 2})
    assert [e.state for e in other.entries] == [MEASURED]  # other settings are another measurement
    (out / entry.file).write_text("{")
    mended = campaign.profile([bundle_path], [LOCAL], out=out, say=said.append, **OPTIONS)
    assert [e.state for e in mended.entries] == [MEASURED]


def test_what_takes_more_than_the_target_grants_is_measured_and_said(
    bundle_parts: dict[str, Any], tmp_path: Path, said: list[str]
) -> None:
    manifest = bundle_parts["manifest"]
    parts = bundle_parts | {"manifest": replace(manifest, target={**manifest.target, "memory_mb": 1})}
    path = write_bundle(tmp_path / "large" / "bundle", **parts)
    found = campaign.profile([path], [LOCAL], out=tmp_path / "results", say=said.append, **OPTIONS)
    [entry] = found.entries
    assert (entry.state, entry.memory.partition(", ")[2]) == (MEASURED, "over")
    with pytest.raises(BudgetError, match="at most 1 MiB"):
        found.raise_if_incomplete()


@pytest.mark.system("openssh")
def test_two_boards_at_once_and_one_that_is_away(
    sshd: Sshd, second_sshd: Sshd, bundle_path: Path, tmp_path: Path, said: list[str]
) -> None:
    away = Board("away", "generic-x86", "ssh://127.0.0.1:1", "generic-x86", known_hosts="")
    boards = [board("one", sshd), board("two", second_sshd), away]
    found = campaign.profile([bundle_path], boards, out=tmp_path / "results", retries=0, say=said.append, **OPTIONS)
    states = {entry.board: entry.state for entry in found.entries}
    assert states == {"one": MEASURED, "two": MEASURED, "away": FAILED}
    assert "Connection refused" in found.entries[2].reason
    with pytest.raises(FleetError, match="1 of 3 profiles were not measured") as raised:
        found.raise_if_incomplete()
    assert raised.value.exit_code == 1
    assert sshd.home.is_clean()
    assert second_sshd.home.is_clean()


@pytest.mark.system("openssh")
def test_a_board_that_was_away_is_tried_again(
    sshd: Sshd, bundle_path: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "REST_SECONDS", 3.0)
    sshd.stop()
    coming = threading.Timer(4.0, sshd.start)
    coming.start()
    found = campaign.profile([bundle_path], [board("one", sshd)], out=tmp_path / "results", say=said.append, **OPTIONS)
    coming.join()
    [entry] = found.entries
    assert entry.state == MEASURED
    assert entry.attempts >= 2


@pytest.mark.system("openssh")
def test_what_a_killed_process_has_begun_on_a_board_is_gone_on_with(sshd: Sshd, home: Home, bundle_path: Path) -> None:
    told = request(bundle_path)
    reach = {"on": sshd.address, "python": home.python3, "folder": None, "known_hosts": sshd.known_hosts.read_text()}
    told |= {"board": reach, "run": "abc"}
    seen: list[list[int]] = []

    def lose() -> None:
        seen.append(home.steps("profile"))
        kill(children())

    losing = home.during("profile", lose)
    lost = work.run(told, limit_seconds=100, tell=lambda _: None, wanted=lambda: True)
    losing.join()
    assert lost.state == "failed"
    seen.append(home.steps("profile"))
    again = work.run(told, limit_seconds=100, tell=lambda _: None, wanted=lambda: True)
    assert again.state == DONE
    assert seen[0] == seen[1] != []  # the board went on, and was not made to begin again
    assert home.is_clean()


@pytest.mark.system("openssh")
def test_a_time_limit_leaves_nothing_on_the_board(sshd: Sshd, home: Home, bundle_path: Path, tmp_path: Path) -> None:
    slow = {**OPTIONS, "seconds": 600.0, "blocks": 600}
    found = campaign.profile([bundle_path], [board("one", sshd)], out=tmp_path / "results", limit_seconds=12, **slow)
    assert "not done within 12 s" in found.entries[0].reason
    assert found.entries[0].attempts == 1
    assert home.is_clean()


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    bundle_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(ConfigError, match="a folder that can be written"):
        campaign.profile([bundle_path], [LOCAL], out=tmp_path / "results")


def test_a_place_without_room_is_refused_before_anything_is_measured(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BundleError, match=r"room for the profile, 4 MiB, got 1\.0 MiB free"):
        campaign.profile([bundle_path], [LOCAL], out=tmp_path / "results")


def test_a_disk_that_fills_up_meanwhile_costs_no_measurement(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    there = replace(LOCAL, name="there")
    (tmp_path / "spare").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spare"))
    full, _ = campaign.making.profiles([bundle_path], [LOCAL, there], OPTIONS)
    out = tmp_path / "results"
    (out / "profiles").mkdir(parents=True)
    (out / "profiles" / f"tiny--here-{full.id}.json").symlink_to("/dev/full")
    found = campaign.profile([bundle_path], [LOCAL, there], out=out, say=said.append, **OPTIONS)
    assert [entry.state for entry in found.entries] == [FAILED, MEASURED]
    [kept] = (tmp_path / "spare").glob("rowcol-edge-*/tiny--here-*.json")
    assert Profile.load(kept).digest == full.work["digest"]
    assert found.entries[0].reason.endswith(f"No space left on device – nothing is lost: the profile is kept in {kept}")

    (out / "fleet.json").unlink()
    (out / "fleet.json").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"a folder that can be written, got .*No space left on device"):
        campaign.profile([bundle_path], [there], out=out, say=said.append, **OPTIONS)

    def interrupted(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        campaign.profile([bundle_path], [there], out=out, say=interrupted, again=True, **OPTIONS)


def test_what_was_not_begun_is_listed_with_its_reason(bundle_path: Path, tmp_path: Path) -> None:
    def interrupted(line: str) -> None:
        raise KeyboardInterrupt

    boards = [LOCAL, replace(LOCAL, name="there")]
    with pytest.raises(KeyboardInterrupt):
        campaign.profile([bundle_path], boards, out=tmp_path, say=interrupted, **OPTIONS)
    written = json.loads((tmp_path / "fleet.json").read_text())["entries"]
    assert [(entry["board"], entry["state"], entry["reason"]) for entry in written] == [
        ("here", MEASURED, ""), ("there", FAILED, "interrupted"),
    ]  # fmt: skip


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run_command([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.system("openssh")
def test_as_it_is_typed(sshd: Sshd, bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "boards.toml").write_text(
        f'schema = 1\n[[boards]]\nname = "one"\ntarget = "generic-x86"\non = "{sshd.address}"\n'
        f'python = "{sshd.home.python3}"\nknown_hosts = "{sshd.known_hosts}"\n'
    )
    command = [sys.executable, "-m", "rowcol_edge", "fleet", "profile", str(bundle_path), "--blocks=6", "--seconds=2"]
    root = Path(cli.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "factored@fp32" in shown.stdout
    assert "measured" in shown.stdout
    assert "1/1 tiny on one" in shown.stderr
    assert len(list((tmp_path / "fleet" / "profiles").glob("tiny--one-*.json"))) == 1
    assert "<html" in (tmp_path / "fleet" / "report.html").read_text()
    told = subprocess.run([*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert [entry["state"] for entry in json.loads(told.stdout)["entries"]] == ["kept"]


def test_errors_are_lines_with_a_hint(bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fleet", "profile", bundle_path, "--boards", tmp_path / "nothing.toml") == 2
    assert "expected: a file of boards" in capsys.readouterr().err
    (tmp_path / "boards.toml").write_text('schema = 1\n[[boards]]\nname = "a"\ntarget = "generic-x86"\non = "local"\n')
    given = ["--boards", tmp_path / "boards.toml", "--out", tmp_path / "results"]
    assert run("fleet", "profile", bundle_path, *given, "--tls-ca", tmp_path) == 2
    assert "no scheduler" in capsys.readouterr().err
    tls = [*given, "--scheduler", "tls://127.0.0.1:1"]
    assert run("fleet", "profile", bundle_path, *tls) == 2
    assert "  got:      none of them" in capsys.readouterr().err
    assert (
        run("fleet", "profile", bundle_path, *tls, *(f"--tls-{what}=/nowhere" for what in ("ca", "cert", "key"))) == 2
    )
    assert "/nowhere, which is no file" in capsys.readouterr().err
    assert run("fleet", "workers", "--boards", tmp_path / "boards.toml") == 0
    assert 'dask worker tcp://SCHEDULER:8786 --nthreads 1 --resources "a=1"' in capsys.readouterr().out


def test_a_sweep_builds_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    from rowcol_edge.fleet import sweep

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROWCOL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "sweep.toml").write_text(
        'model = ["net.py:build", "net.py:broken"]\ntarget = ["generic-x86", "raspberry-pi-5"]\nprecision = "fp32"\n'
        'budget = "params<=0.9x"\ncalib = "net.py:data"\nzip = false\n'
    )
    found = campaign.sweep(sweep.read(Path("sweep.toml")), say=said.append)
    states = {(cell.model, cell.target): cell.state for cell in found.cells}
    assert states == {
        ("net.py:build", "generic-x86"): "built", ("net.py:build", "raspberry-pi-5"): "built",
        ("net.py:broken", "generic-x86"): "failed", ("net.py:broken", "raspberry-pi-5"): "failed",
    }  # fmt: skip
    good, bad = found.cells[0], found.cells[2]
    assert Bundle.open(good.path).manifest.default_arm == good.arm == "factored@fp32"
    assert 0 < (good.size_bytes or 0) < (good.dense_bytes or 0)
    assert "this net is broken" in bad.reason
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == found.to_dict()
    with pytest.raises(FleetError, match="2 of 4 builds failed"):
        found.raise_if_incomplete()
    again = campaign.sweep(sweep.read(Path("sweep.toml")), say=said.append)
    assert [cell.state for cell in again.cells] == ["unchanged", "unchanged", "failed", "failed"]


NET = """
import numpy as np
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 3))

def broken():
    raise ValueError("this net is broken")

def data():
    return np.random.default_rng(0).normal(size=(64, 1, 8, 8)).astype("float32")
"""
