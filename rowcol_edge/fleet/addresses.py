"""What ``--on`` takes."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from .adb import Adb
from .ssh import Ssh
from .transport import Transport

_SSH_PORT = 22


def parse(address: str, known_hosts: Path | None = None) -> Transport:
    """``ssh://[user@]host[:port]`` or ``adb:SERIAL``. ConfigError: another kind, or a part that is not a name."""
    if address.startswith("ssh://"):
        return Ssh.parse(address.removeprefix("ssh://"), known_hosts)
    if known_hosts is not None:
        raise ConfigError("known hosts", expected="an address ssh://…", got=repr(address))
    if address.startswith("adb:"):
        return Adb.parse(address.removeprefix("adb:"))
    raise ConfigError("the address of a board", expected="ssh://[user@]host[:port] or adb:SERIAL", got=repr(address))


def machine(address: str) -> str:
    """What the spellings of one board's address have in common: without a user, and with the port. Errors as `parse`.

    Names that ``~/.ssh/config`` gives to one host stay several.
    """
    line = parse(address)
    return f"ssh://{line.host.lower()}:{line.port or _SSH_PORT}" if isinstance(line, Ssh) else address
