"""Lines that do not come about: keys, logins, hosts; against a real sshd."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

from rowcol_edge.device.bundle import Bundle
from rowcol_edge.errors import (
    BoardError,
    ConfigError,
    HostKeyError,
    LoginError,
    MissingDependencyError,
    UnreachableError,
)
from rowcol_edge.fleet import remote

from .conftest import Home, Sshd, script

pytestmark = pytest.mark.system("openssh")


def test_an_unknown_host_key_is_refused(sshd: Sshd, home: Home, opened: Bundle) -> None:
    sshd.known_hosts.write_text("")
    with pytest.raises(HostKeyError, match="a host key that is on record") as caught:
        sshd.profile(opened)
    assert "No ED25519 host key is known" in caught.value.got
    assert "compare before you say yes" in caught.value.hint
    assert home.is_clean()
    assert sshd.known_hosts.read_text() == ""  # nor was it put on record


def test_a_changed_host_key_is_refused(sshd: Sshd, home: Home, opened: Bundle) -> None:
    sshd.stop()
    sshd.new_host_key()
    sshd.start()
    with pytest.raises(HostKeyError, match="got another one") as caught:
        sshd.profile(opened)
    assert f"ssh-keygen -R '[127.0.0.1]:{sshd.port}' -f {sshd.known_hosts}" in caught.value.hint
    assert home.is_clean()


def test_the_users_configuration_does_not_switch_the_check_off(
    sshd: Sshd, opened: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = next(path for folder in os.get_exec_path() if (path := Path(folder, "ssh")).is_file())
    lax = tmp_path / "config"
    lax.write_text("Host *\n StrictHostKeyChecking no\n NoHostAuthenticationForLocalhost yes\n")
    script(tmp_path / "bin" / "ssh", f'exec {real} -F {lax} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    sshd.known_hosts.write_text("")
    with pytest.raises(HostKeyError):
        sshd.profile(opened)


def test_no_key_is_taken_from_elsewhere_than_the_file(
    sshd: Sshd, opened: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = next(path for folder in os.get_exec_path() if (path := Path(folder, "ssh")).is_file())
    shutil.copy(sshd.known_hosts, tmp_path / "elsewhere")
    config = tmp_path / "config"
    config.write_text(
        f"Host *\n KnownHostsCommand {shutil.which('cat')} {tmp_path}/elsewhere\n VerifyHostKeyDNS yes\n"
        " IgnoreUnknown OfAnotherSsh\n OfAnotherSsh yes\n"
    )
    script(tmp_path / "bin" / "ssh", f'exec {real} -F {config} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert sshd.profile(opened).digest == opened.digest
    sshd.known_hosts.write_text("")
    with pytest.raises(HostKeyError):
        sshd.profile(opened)


def test_a_refused_login(sshd: Sshd, opened: Bundle) -> None:
    (sshd.folder / "authorized_keys").write_text("")
    with pytest.raises(LoginError, match="expected a login without a password") as caught:
        sshd.profile(opened)
    assert "Permission denied" in caught.value.got
    assert "ssh-copy-id" in caught.value.hint


def test_an_unreachable_host(sshd: Sshd, opened: Bundle, said: list[str]) -> None:
    sshd.stop()
    with pytest.raises(UnreachableError, match="Connection refused") as caught:
        sshd.profile(opened, say=said.append)
    assert f"ssh -p {sshd.port} " in caught.value.hint
    assert said == []  # an address that never answered is not tried again
    with pytest.raises(UnreachableError, match="Could not resolve hostname"):
        remote.profile(opened, "ssh://no-such-board.invalid", known_hosts=sshd.known_hosts)


def test_no_ssh_on_this_machine(opened: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="sudo apt-get install openssh-client"):
        remote.profile(opened, "ssh://board")


def test_no_python_on_the_board(sshd: Sshd, home: Home, opened: Bundle) -> None:
    (home.bin / "python3").unlink()
    with pytest.raises(BoardError, match=r"expected Python 3\.10 or newer") as caught:
        sshd.profile(opened)
    assert "--board-python" in caught.value.hint
    assert home.is_clean()


def test_a_login_that_runs_no_commands(sshd: Sshd, opened: Bundle) -> None:
    key = (sshd.folder / "user_key.pub").read_text()
    (sshd.folder / "authorized_keys").write_text(f'command="echo no shell here >&2; exit 1" {key}')
    with pytest.raises(BoardError, match="expected a shell that runs Python, got no shell here"):
        sshd.profile(opened)


def test_hostile_names_are_words_to_every_shell_and_the_folder_is_for_its_user_alone(
    sshd: Sshd, home: Home, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    name = "-x $(touch pwned);'`touch pwned`\"& |#"
    python = script(home.root / name / "python3", f'exec {sys.executable} "$@"')
    folder = home.tmp / name
    folder.mkdir()
    modes = []

    def look(label: str, done: int, total: int) -> None:
        if label == "memory":  # all has been copied and verified
            modes.extend(stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir())
            raise KeyboardInterrupt

    with Bundle.open(bundle_path.rename(bundle_path.with_name(name))) as opened, pytest.raises(KeyboardInterrupt):
        sshd.profile(opened, python=str(python), folder=str(folder), progress=look)
    assert modes == [0o700]
    assert list(folder.iterdir()) == []
    folder.rmdir()
    assert home.is_clean()
    assert set(tmp_path.iterdir()) == before
    assert not [path for path in Path.home().iterdir() if path.name == "pwned"]


@pytest.mark.parametrize("option", ["python", "folder"])
def test_names_with_line_breaks_are_refused(opened: Bundle, option: str) -> None:
    with pytest.raises(ConfigError):
        remote.profile(opened, "ssh://board", **{option: "/opt/a\nb"})
