"""``ssh://[user@]host[:port]`` by the system's OpenSSH client.

Why not a library such as asyncssh: OpenSSH is there on every machine that can reach a board today, and it brings what
people have set up for their boards – names and jump hosts in ``~/.ssh/config``, keys in ssh-agent or in hardware,
``known_hosts`` with hashed names and certificates. A library reads a part of that, is one dependency more to keep safe,
and its answer to "does it connect?" is another than that of ``ssh`` in a terminal. One connection carries everything,
so nothing would be gained by ``ControlMaster``, and a shared connection could have been opened without a check of the
host's key. How the keys of jump hosts are checked is for the user's configuration to say.

No argument that comes from outside is part of a shell command: the remote one is made of the path of Python, quoted,
and a constant. Host and user are held to the characters of names and stand behind ``--`` or ``-l``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import BoardError, ConfigError, HostKeyError, LoginError, RowcolError, UnreachableError
from .transport import last_line

_CONNECT_SECONDS = 15
#: on top of the user's configuration; what stands on the command line wins over it
_OPTIONS = (
    "BatchMode=yes",  # there is nobody to ask
    "StrictHostKeyChecking=yes",
    "NoHostAuthenticationForLocalhost=no",
    "UpdateHostKeys=no",
    "ControlMaster=no",
    "ControlPath=none",
    "RemoteCommand=none",
    "RequestTTY=no",
    "PermitLocalCommand=no",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "LogLevel=ERROR",
    f"ConnectTimeout={_CONNECT_SECONDS}",
    "ServerAliveInterval=10",
    "ServerAliveCountMax=3",
)
#: with a file of host keys: no key is taken from elsewhere. OpenSSH before 8.5 does not know the first, and skips it;
#: the list of what may be skipped stands in the place of the user's own, so all that is in that has to be on it.
_ONLY_FROM_FILE = ("IgnoreUnknown=*", "KnownHostsCommand=none", "VerifyHostKeyDNS=no", "GlobalKnownHostsFile=/dev/null")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*|\[(?P<v6>[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?)\]")
_ADDRESS = re.compile(r"(?:(?P<user>.*)@)?(?P<host>\[[^\]]*\]|[^:]*)(?::(?P<port>.*))?")


@dataclass(frozen=True, slots=True)
class Ssh:
    """A board by ssh; without ``user`` and ``port`` those of ``~/.ssh/config`` hold."""

    host: str
    user: str = ""
    port: int | None = None
    known_hosts: Path | None = None

    package = "openssh-client"

    @classmethod
    def parse(cls, text: str, known_hosts: Path | None = None) -> Ssh:
        """From what stands behind ``ssh://``. ConfigError: not a name, or one that could be taken for an option."""
        found = _ADDRESS.fullmatch(text)
        user, host, port = found.group("user", "host", "port") if found else (None, "", None)
        if user is not None and ":" in user:
            hint = "log in with a key: ssh-copy-id, once"
            raise ConfigError("the address of a board", expected="no password in it", got="one", hint=hint)
        if user is not None and not _USER.fullmatch(user):
            raise _malformed("user name", user)
        named = _HOST.fullmatch(host)
        if named is None:
            raise _malformed("host name", host)
        if port is not None and not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
            raise ConfigError("the port of a board", expected="a number from 1 to 65535", got=repr(port))
        if known_hosts is not None and not known_hosts.is_file():
            raise ConfigError("known hosts", expected="a file", got=str(known_hosts))
        return cls(named["v6"] or host, user or "", None if port is None else int(port), known_hosts)

    @property
    def name(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host

    def command(self, remote: str) -> list[str]:
        settings = [*_OPTIONS]
        if self.known_hosts is not None:
            settings += [*_ONLY_FROM_FILE, f"UserKnownHostsFile={_quoted(self.known_hosts)}"]
        options = [part for setting in settings for part in ("-o", setting)]
        if self.user:
            options += ["-l", self.user]
        if self.port is not None:
            options += ["-p", str(self.port)]
        return ["ssh", "-T", *options, "--", self.host, remote]

    def failure(self, code: int, told: str) -> RowcolError:
        got = last_line(told) or f"exit code {code} of ssh"
        if "REMOTE HOST IDENTIFICATION HAS CHANGED" in told:
            return HostKeyError(
                self.name,
                expected="the host key that is on record",
                got="another one",
                hint="somebody may be in between. If the board was set up anew, compare its key and forget the old "
                f"one: ssh-keygen -R {self._recorded}{self._in_file}",
            )
        if "Host key verification failed" in told:
            return HostKeyError(
                self.name,
                expected="a host key that is on record",
                got=next((last_line(line) for line in told.splitlines() if "host key" in line), got),
                hint="see it on the board (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub), then connect once with "
                f"ssh and compare before you say yes: {self._by_hand}",
            )
        if "Permission denied" in told or "Too many authentication failures" in told:
            return LoginError(
                self.name,
                expected="a login without a password",
                got=got,
                hint=f"give it a key (ssh-copy-id), name the user (ssh://USER@{self.host}), and try {self._by_hand}",
            )
        if code != 255:  # ssh itself has only that one: this is the shell's
            return BoardError(self.name, expected="a shell that runs Python", got=got, hint=f"try {self._by_hand}")
        return UnreachableError(self.name, expected="an ssh server", got=got, hint=f"try {self._by_hand}")

    @property
    def _recorded(self) -> str:
        """The name under which a host's key is on record."""
        return self.host if self.port is None else f"'[{self.host}]:{self.port}'"

    @property
    def _in_file(self) -> str:
        return "" if self.known_hosts is None else f" -f {self.known_hosts}"

    @property
    def _by_hand(self) -> str:
        return f"ssh {'' if self.port is None else f'-p {self.port} '}{self.name}"


def _malformed(what: str, got: str) -> ConfigError:
    return ConfigError(
        f"the {what} of a board",
        expected="letters, digits, '.', '_' and '-', the first one a letter or digit",
        got=repr(got),
        hint="ssh://[user@]host[:port]; what has another name goes into ~/.ssh/config",
    )


def _quoted(path: Path) -> str:
    """A file for UserKnownHostsFile, which is a list of names with tokens and variables. ConfigError: it cannot be."""
    text = str(path.absolute())
    if any(c in text for c in '"$\\\n'):
        hint = "copy it to another place"
        raise ConfigError("known hosts", expected="a path without quotes, $ and \\", got=repr(text), hint=hint)
    return '"' + text.replace("%", "%%") + '"'
