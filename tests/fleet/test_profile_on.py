"""``rowcol-edge profile BUNDLE --on BOARD`` as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import rowcol_edge
from rowcol_edge import cli
from rowcol_edge.device.profile import Profile
from rowcol_edge.errors import ConfigError

from .conftest import Home, Sshd


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run_command([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.system("openssh")
@pytest.mark.parametrize("packed", [False, True])
def test_the_profile_is_kept_and_shown_as_a_local_one(
    sshd: Sshd, home: Home, bundle_path: Path, root: Path, tmp_path: Path, packed: bool
) -> None:
    reach = ["--on", sshd.address, "--known-hosts", str(sshd.known_hosts), "--board-python", home.python3]
    source = bundle_path.with_name("bundle.zip") if packed else bundle_path
    run_briefly = ["--blocks", "6", "--seconds", "2", "--arms", "dense@fp32", *(["--json"] if packed else [])]
    command = [sys.executable, "-m", "rowcol_edge", "profile", str(source), *reach, *run_briefly]
    environment = {"PYTHONPATH": str(root), "COLUMNS": "200"}
    done = subprocess.run(
        command, cwd=tmp_path, env={**_environment(), **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    [kept] = (tmp_path if packed else bundle_path / "profiles").glob("*.json")
    assert "127.0.0.1" in kept.name
    measured = Profile.load(kept)
    if packed:
        assert json.loads(done.stdout) == json.loads(kept.read_text())
    else:
        assert "dense@fp32" in done.stdout
        assert measured.evidence_note.split(",")[0] in done.stdout
    assert home.is_clean()


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


def test_errors_are_lines_with_a_hint(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", bundle_path, "--on", "ssh://-oProxyCommand=x") == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[0]) == ("", "error: the host name of a board")
    assert "  hint:     ssh://[user@]host[:port]" in err


@pytest.mark.parametrize("option", ["--known-hosts", "--board-python", "--board-folder"])
def test_what_belongs_to_a_board_needs_one(bundle_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert run("profile", bundle_path, option, "x") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {option}\n")
    assert "name it with --on" in said


def test_the_function_takes_the_same(bundle_path: Path) -> None:
    with pytest.raises(ConfigError, match="the address of a board"):
        rowcol_edge.profile(bundle_path, on="telnet://board")
    with pytest.raises(ConfigError, match="the board's Python"):
        rowcol_edge.profile(bundle_path, on="ssh://board", board={"python": "-c"})
