"""What ``--on`` takes, and what is made of it for a program's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rowcol_edge.errors import ConfigError
from rowcol_edge.fleet.adb import Adb
from rowcol_edge.fleet.addresses import machine, parse
from rowcol_edge.fleet.connection import remote_command
from rowcol_edge.fleet.ssh import Ssh


@pytest.mark.parametrize(
    ("address", "made"),
    [
        ("ssh://board", Ssh("board")),
        ("ssh://pi@raspberrypi.local", Ssh("raspberrypi.local", "pi")),
        ("ssh://pi@10.0.0.7:2222", Ssh("10.0.0.7", "pi", 2222)),
        ("ssh://pi@[fe80::1%eth0]:22", Ssh("fe80::1%eth0", "pi", 22)),
        ("ssh://me@corp.example@board", Ssh("board", "me@corp.example")),
        ("adb:0123456789ABCDEF", Adb("0123456789ABCDEF")),
        ("adb:10.0.0.7:5555", Adb("10.0.0.7:5555")),
    ],
)
def test_addresses(address: str, made: object) -> None:
    assert parse(address) == made


@pytest.mark.parametrize(
    "address",
    [
        "", "board", "http://board", "ssh:board", "ssh://", "ssh://pi@", "ssh://@board", "adb:", "adb://x",
        "ssh://-oProxyCommand=touch pwned", "ssh://-oProxyCommand=x@board", "ssh://-l@board", "ssh://pi@-G",
        "ssh://board;touch pwned", "ssh://$(touch pwned)@board", "ssh://`id`", "ssh://board/../x", "ssh://pi@board/tmp",
        "ssh://board name", "ssh://board\nHost x", "ssh://böard", "ssh://pi:secret@board", "ssh://%h", "ssh://*",
        "ssh://board:", "ssh://board:0", "ssh://board:65536", "ssh://board:-1", "ssh://board:22x", "ssh://board:٢",
        "ssh://[-oProxyCommand=x]", "ssh://[::1", "adb:-s", "adb:x;id", "adb:$(id)", "adb:x y", "adb:\n",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(address)
    assert caught.value.expected
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "same"),
    [
        ("ssh://pi@10.0.0.7", "ssh://10.0.0.7:22"),
        ("ssh://Board.local", "ssh://me@board.local"),
        ("ssh://[FE80::1]", "ssh://[fe80::1]:22"),
        ("adb:0123", "adb:0123"),
    ],
)
def test_the_spellings_of_an_address_are_one_board(address: str, same: str) -> None:
    assert machine(address) == machine(same)


def test_other_ports_hosts_and_serials_are_other_boards() -> None:
    others = ["ssh://board", "ssh://board:2222", "ssh://board-2", "adb:ab", "adb:AB"]
    assert len({machine(address) for address in others}) == 5


def test_known_hosts_are_a_file_and_for_ssh(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a file"):
        parse("ssh://board", tmp_path / "none")
    (tmp_path / "known").touch()
    with pytest.raises(ConfigError, match="expected an address ssh://"):
        parse("adb:x", tmp_path / "known")


def test_host_and_user_can_be_no_option_and_the_check_stands_before_the_users_configuration(tmp_path: Path) -> None:
    known = tmp_path / "known %h hosts"
    known.touch()
    command = Ssh("board", "pi", 2222, known).command("true")
    assert command[-3:] == ["--", "board", "true"]
    assert command[command.index("-l") + 1] == "pi"
    assert command[command.index("-p") + 1] == "2222"
    assert command.index("StrictHostKeyChecking=yes") < command.index("--")
    assert f'UserKnownHostsFile="{tmp_path}/known %%h hosts"' in command
    (tmp_path / "a$b").touch()
    with pytest.raises(ConfigError, match="a path without quotes"):
        Ssh("board", known_hosts=tmp_path / "a$b").command("true")


@pytest.mark.parametrize("python", ["", "-c", "python3\nid", "a\0b"])
def test_a_python_that_is_no_path_is_refused(python: str) -> None:
    with pytest.raises(ConfigError):
        remote_command(python)


def test_a_python_with_a_strange_name_stays_one_word() -> None:
    assert remote_command("/opt/my $(id)'s/python3").startswith("'/opt/my $(id)'\"'\"'s/python3' -I -c '")
    assert not set("'$!`") & set(remote_command("python3").partition(" -c ")[2][1:-1])
