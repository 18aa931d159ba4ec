"""``adb:SERIAL`` for Linux boards whose adbd has the shell protocol, which keeps stdin binary and tells exit codes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import BoardError, ConfigError, LoginError, RowcolError, UnreachableError
from .transport import last_line

_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]*")


@dataclass(frozen=True, slots=True)
class Adb:
    """A board by adb; ``serial`` as ``adb devices`` lists it, which may be ``host:port``."""

    serial: str

    package = "adb"

    @classmethod
    def parse(cls, text: str) -> Adb:
        """From what stands behind ``adb:``. ConfigError: not a serial number."""
        if not _SERIAL.fullmatch(text):
            hint = "adb devices lists them"
            raise ConfigError("the serial number of a board", expected="letters and digits", got=repr(text), hint=hint)
        return cls(text)

    @property
    def name(self) -> str:
        return f"adb:{self.serial}"

    def command(self, remote: str) -> list[str]:
        return ["adb", "-s", self.serial, "shell", "-T", remote]

    def failure(self, code: int, told: str) -> RowcolError:
        got = last_line(told) or f"exit code {code} of adb"
        if "unauthorized" in told:
            hint = "allow it on the board, whose adb_keys holds ~/.android/adbkey.pub of those it lets in"
            return LoginError(self.name, expected="a board that lets this machine in", got=got, hint=hint)
        if "no permissions" in told:
            hint = "a udev rule gives them: on Debian and Ubuntu apt-get install android-sdk-platform-tools-common"
            return LoginError(self.name, expected="rights to its USB device", got=got, hint=hint)
        if "PTY args" in told or "shell protocol" in told:
            hint = "install a newer adbd on it, or reach it by ssh"
            return BoardError(self.name, expected="an adbd with the shell protocol (since 2016)", got=got, hint=hint)
        if re.search(r"\b(not found|offline|closed|no devices)", told) and code in (1, 255):
            hint = "look at its cable or its network, and try adb devices"
            return UnreachableError(self.name, expected="a board that adb devices lists", got=got, hint=hint)
        return BoardError(
            self.name, expected="a shell that runs Python", got=got, hint=f"try adb -s {self.serial} shell"
        )
