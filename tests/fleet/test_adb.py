"""Boards by adb. What stands in for the system's ``adb`` runs the commands here; no USB and no adbd take part."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rowcol_edge.device.bundle import Bundle
from rowcol_edge.errors import BoardError, LoginError, MissingDependencyError, RowcolError, UnreachableError
from rowcol_edge.fleet import remote

from .conftest import OPTIONS, Home, kill, processes, script


@pytest.fixture
def adb(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``adb`` that knows one board, with the messages of the real one; it notes its arguments."""
    variables = " ".join(f"{k}={v}" for k, v in home.variables.items())
    path = script(
        tmp_path / "adb" / "adb",
        f'''printf "%s\\n" "$@" > {tmp_path}/arguments
[ "$1 $3 $4" = "-s shell -T" ] || exit 9
[ "$2" = 0123456789ABCDEF ] || {{ echo "adb: device '$2' not found" >&2; exit 1; }}
shift 4
exec env -i {variables} /bin/sh -c "$*"''',
    )
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path


def test_a_profile_by_adb(adb: Path, home: Home, opened: Bundle) -> None:
    assert remote.profile(opened, "adb:0123456789ABCDEF", **OPTIONS).digest == opened.digest
    assert home.is_clean()


def test_a_cable_that_is_pulled_does_not_end_the_run(adb: Path, home: Home, opened: Bundle, said: list[str]) -> None:
    place = f"TMPDIR={home.tmp}\0".encode()

    def pull() -> None:
        mine = processes(lambda entry: place in (entry / "environ").read_bytes())
        kill(list(set(mine) - set(home.running())))  # all but the run, which nothing holds to the line

    pulling = home.during("profile", pull)
    assert remote.profile(opened, "adb:0123456789ABCDEF", say=said.append, **OPTIONS).digest == opened.digest
    pulling.join()
    assert sum("trying again" in line for line in said) == 1
    assert not any("begins again" in line for line in said)
    assert home.is_clean()


def test_a_board_that_adb_does_not_list(adb: Path, opened: Bundle) -> None:
    with pytest.raises(UnreachableError, match="device 'AAAA' not found"):
        remote.profile(opened, "adb:AAAA")


@pytest.mark.parametrize(
    ("message", "code", "kind"),
    [
        ("error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set", 1, LoginError),
        ("error: insufficient permissions for device: no permissions (user in plugdev group?)", 1, LoginError),
        ("error: device offline", 1, UnreachableError),
        ("error: target doesn't support PTY args -Tt", 1, BoardError),
        ("/bin/sh: python3: not found", 127, BoardError),
        ("something new", 3, BoardError),
    ],
)
def test_what_adb_says_has_a_type(adb: Path, opened: Bundle, message: str, code: int, kind: type[RowcolError]) -> None:
    script(adb, f"cat >&2 <<'END'\n{message}\nEND\nexit {code}")
    with pytest.raises(RowcolError) as caught:
        remote.profile(opened, "adb:0123456789ABCDEF")
    assert type(caught.value) is kind
    assert caught.value.got in message


def test_no_adb_on_this_machine(opened: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="sudo apt-get install adb"):
        remote.profile(opened, "adb:x")
