"""Whole runs on a board behind a real sshd: a run that goes well, and lines and boards that do not hold."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.profile import Profile
from rowcol_edge.errors import BoardError, BudgetError, UnreachableError
from rowcol_edge.fleet import connection, remote
from rowcol_edge.package import write_bundle

from .conftest import Home, Sshd, kill, until

pytestmark = pytest.mark.system("openssh")


def test_a_profile_comes_back_and_nothing_stays(sshd: Sshd, home: Home, opened: Bundle, said: list[str]) -> None:
    steps: list[tuple[str, int, int]] = []
    measured = sshd.profile(
        opened, arms=("dense@fp32", "factored@fp32"), baseline="factored@fp32", say=said.append,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert measured.digest == opened.digest
    assert {(c.arm, c.baseline) for c in measured.comparisons} == {("dense@fp32", "factored@fp32")}
    assert (measured.threads, measured.protocol.budget_seconds) == (1, 2.0)
    assert list(dict.fromkeys(label for label, _, _ in steps))[:2] == ["copy", "verify"]
    assert {"memory", "latency"} <= {label for label, _, _ in steps}
    assert home.is_clean()
    assert not [line for line in said if "trying again" in line]


def test_a_profile_of_arms_that_are_too_large_comes_back_and_says_so(
    sshd: Sshd, home: Home, bundle_parts: dict[str, Any], tmp_path: Path
) -> None:
    manifest = bundle_parts["manifest"]
    parts = bundle_parts | {"manifest": replace(manifest, target={**manifest.target, "memory_mb": 1})}
    with Bundle.open(write_bundle(tmp_path / "large" / "bundle", **parts)) as opened:
        measured = sshd.profile(opened, arms=("dense@fp32",), memory=True, ops=True)
    assert measured.memory_budget is not None
    assert measured.memory_budget.over == ("dense@fp32",)
    assert measured.operators is not None
    assert "MatMul" in {operator.kind for operator in measured.operators.arms["dense@fp32"].operators}
    assert measured.arms["dense@fp32"].footprints
    with pytest.raises(BudgetError, match="at most 1 MiB"):
        measured.raise_if_over_budget()
    assert home.is_clean()


def at_once(sshd: Sshd, opened: Bundle, said: list[str], run: str) -> tuple[Profile, Profile]:
    """Two measurements, the second begun while the first is under way; never are both of them."""
    first: list[Profile] = []
    options: dict[str, Any] = {"run": run, "blocks": 12, "seconds": 6.0}
    measuring = threading.Thread(target=lambda: first.append(sshd.profile(opened, say=lambda _: None, **options)))
    measuring.start()
    until(lambda: sshd.home.steps("profile"), 60)
    seen: list[int] = []

    def look(label: str, done: int, total: int) -> None:
        seen.append(len(sshd.home.steps("profile")))

    second = sshd.profile(opened, say=said.append, progress=look, **options)
    measuring.join()
    assert max(seen) <= 1
    return first[0], second


def test_two_desks_at_one_board_measure_one_after_the_other(
    sshd: Sshd, home: Home, opened: Bundle, said: list[str]
) -> None:
    first, second = at_once(sshd, opened, said, "")
    assert first.digest == second.digest == opened.digest
    assert first.created < second.created
    [waited] = [line for line in said if "waiting" in line]
    holder = f"process {os.getpid()} on {platform.node()}"
    assert re.search(rf"is in use by the run of {re.escape(holder)}, \d+ min old: waiting$", waited)
    assert home.is_clean()


def test_one_measurement_asked_for_twice_comes_back_twice(
    sshd: Sshd, home: Home, opened: Bundle, said: list[str]
) -> None:
    """Whichever ends first removes nothing that the other one needs."""
    first, second = at_once(sshd, opened, said, "same")
    assert first.digest == second.digest == opened.digest
    assert home.is_clean()


def test_a_run_that_is_killed_lets_go_of_the_board(sshd: Sshd, home: Home, opened: Bundle, said: list[str]) -> None:
    lost: list[BoardError] = []

    def lose() -> None:
        try:
            sshd.profile(opened, blocks=600, seconds=600.0, say=lambda _: None)
        except BoardError as e:
            lost.append(e)

    losing = threading.Thread(target=lose)
    losing.start()
    until(lambda: home.steps("profile"), 60)
    holding = home.running()

    def told(line: str) -> None:
        said.append(line)
        kill(holding)

    assert sshd.profile(opened, say=told).digest == opened.digest
    losing.join()
    assert len(lost) == 1
    assert any("waiting" in line for line in said)
    assert home.is_clean()


def test_a_dropped_line_does_not_end_the_run(sshd: Sshd, home: Home, opened: Bundle, said: list[str]) -> None:
    seen: dict[str, list[int]] = {}

    def drop() -> None:
        seen["before"] = home.steps("profile")
        sshd.drop()
        until(sshd.sessions)  # it has connected again
        seen["after"] = home.steps("profile")

    dropping = home.during("profile", drop)
    measured = sshd.profile(opened, say=said.append)
    dropping.join()
    assert measured.digest == opened.digest
    assert seen["before"] == seen["after"] != []  # the very process
    assert sum("trying again for 20 s" in line for line in said) == 1
    assert any("connected to" in line for line in said)
    assert not any("begins again" in line or "copying again" in line for line in said)
    assert home.is_clean()


def test_a_line_that_goes_silent_is_a_dropped_one(
    sshd: Sshd, home: Home, opened: Bundle, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 10.0)
    stopping = home.during("profile", lambda: [os.kill(pid, signal.SIGSTOP) for pid in sshd.sessions()])
    assert sshd.profile(opened, say=said.append).digest == opened.digest
    stopping.join()
    assert any("dropped (nothing for 10 s)" in line for line in said)
    assert home.is_clean()


def test_a_board_that_lets_nobody_in_while_it_starts_is_waited_for(
    sshd: Sshd, home: Home, opened: Bundle, said: list[str]
) -> None:
    keys = sshd.folder / "authorized_keys"

    def shut_for_a_while() -> None:
        keys.rename(sshd.folder / "away")
        sshd.drop()
        until(lambda: said)
        until(lambda: b"Connection closed by authenticating user" in (sshd.folder / "sshd.log").read_bytes())
        (sshd.folder / "away").rename(keys)

    shutting = home.during("profile", shut_for_a_while)
    assert sshd.profile(opened, say=said.append).digest == opened.digest
    shutting.join()
    assert home.is_clean()


@pytest.mark.parametrize("gone", [False, True])
def test_a_reboot_begins_again_what_had_not_finished(
    sshd: Sshd, home: Home, opened: Bundle, said: list[str], gone: bool
) -> None:
    steps: list[tuple[str, int, int]] = []

    def reboot() -> None:
        until(lambda: "memory" in {label for label, _, _ in steps})  # all before it has been told
        sshd.reboot()
        steps.append(("reboot", 0, 0))
        if gone:
            for folder in home.left:
                shutil.rmtree(folder)
        sshd.start()

    rebooting = home.during("profile", reboot)
    measured = sshd.profile(opened, say=said.append, progress=lambda *step: steps.append(step))
    rebooting.join()
    assert measured.digest == opened.digest
    afterwards = [label for label, _, _ in steps[steps.index(("reboot", 0, 0)) + 1 :]]
    assert ("copy" in afterwards) == gone  # what lies there by its digest is not copied again
    assert ("verify" in afterwards) == gone  # and what had ended well is not repeated
    assert "latency" in afterwards
    assert any("begins again" in line for line in said)
    assert any("copying again" in line for line in said) == gone
    assert home.is_clean()


def test_a_line_that_drops_while_copying_goes_on_where_it_was(
    sshd: Sshd, home: Home, opened: Bundle, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[tuple[str, int]] = []
    send = remote.File._pieces

    def cut(self: remote.File, offset: int, end: int | None = None) -> Any:
        if self.name == "bundle.zip" and end is None:
            copied.append((self.name, offset))
            if len(copied) == 1:
                yield next(send(self, 0, 1000))
                until(lambda: [p for p in home.tmp.glob("*/bundle.zip") if p.stat().st_size == 1000])
                sshd.drop()
                return
        yield from send(self, offset, end)

    monkeypatch.setattr(remote.File, "_pieces", cut)
    assert sshd.profile(opened, say=said.append).digest == opened.digest
    assert copied == [("bundle.zip", 0), ("bundle.zip", 1000)]
    assert home.is_clean()


def test_a_board_that_does_not_come_back_is_given_up(
    sshd: Sshd, home: Home, opened: Bundle, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RECONNECT_SECONDS", 2.0)
    monkeypatch.setattr(remote, "CLEAN_SECONDS", 1.0)
    monkeypatch.setattr(remote, "LEASE_SECONDS", 8.0)
    stopping = home.during("profile", sshd.stop)
    with pytest.raises(UnreachableError, match="expected an ssh server"):
        sshd.profile(opened, say=said.append)
    stopping.join()
    [folder] = home.left
    assert any(f"it removes {folder} by itself" in line for line in said)
    until(home.is_clean)  # and so it does


def test_a_line_that_keeps_dropping_is_given_up(
    sshd: Sshd, home: Home, opened: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "OUTAGES", 1)
    ended = threading.Event()

    def keep_dropping() -> None:
        while not ended.is_set():
            sshd.drop()
            ended.wait(1.0)

    dropping = home.during("profile", keep_dropping)
    with pytest.raises(UnreachableError, match="dropped"):
        sshd.profile(opened, say=lambda _: ended.set() if home.left == [] else None)
    ended.set()
    dropping.join()
    assert home.is_clean()


def test_a_run_that_takes_the_board_down_is_not_begun_for_ever(
    sshd: Sshd, home: Home, opened: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STARTS", 1)

    def reboot() -> None:
        sshd.reboot()
        sshd.start()

    rebooting = home.during("profile", reboot)
    with pytest.raises(BoardError, match="got 1 that were lost"):
        sshd.profile(opened)
    rebooting.join()
    assert home.is_clean()


@pytest.mark.parametrize(("signals", "code"), [([signal.SIGINT], 130), ([signal.SIGTERM, signal.SIGTERM], 143)])
def test_ctrl_c_and_sigterm_clean_the_board_and_this_machine(
    signals: list[int], code: int, sshd: Sshd, home: Home, bundle_path: Path, tmp_path: Path, root: Path
) -> None:
    (here := tmp_path / "here").mkdir()
    started = subprocess.Popen(
        [
            *(sys.executable, "-m", "rowcol_edge", "profile", str(bundle_path), "--on", sshd.address),
            *("--known-hosts", str(sshd.known_hosts), "--board-python", home.python3),
        ],
        cwd=root, env={**os.environ, "TMPDIR": str(here)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    until(lambda: home.steps("profile"), 60)
    assert list(here.iterdir())
    for number in signals:  # as a terminal does, and timeout twice: the whole group
        os.killpg(started.pid, number)
    out, err = started.communicate(timeout=30)
    assert started.returncode == code
    assert (out, "Traceback" in err) == ("", False)
    assert home.is_clean()
    assert list(here.iterdir()) == []


def test_what_was_killed_on_the_board_is_an_error(sshd: Sshd, home: Home, opened: Bundle) -> None:
    killing = home.during("profile", lambda: kill(home.steps("profile")))
    with pytest.raises(BoardError, match="killed by SIGKILL") as caught:
        sshd.profile(opened)
    killing.join()
    assert caught.value.what.startswith("profile on ")
    assert "out of memory" in caught.value.hint
    assert home.is_clean()


def test_a_run_whose_keeper_was_killed_is_an_error(sshd: Sshd, home: Home, opened: Bundle) -> None:
    killing = home.during("profile", lambda: kill(home.keepers()))
    with pytest.raises(BoardError, match="expected one that ends by itself"):
        sshd.profile(opened)
    killing.join()
    assert home.is_clean()
