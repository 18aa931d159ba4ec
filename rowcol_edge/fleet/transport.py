"""A line to a board: bytes to and from a command that runs there."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
from typing import IO, Protocol

from ..errors import BoardError, MissingDependencyError, RowcolError, UnreachableError

_PIECE_BYTES = 1 << 16
_LINE_BYTES = 1 << 22
_END_SECONDS = 5.0
_NO_PROGRAM = (126, 127)
"""What a shell says of a program that it does not find or may not run."""
_TO_ALL = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""What is sent to all processes of a run here at once; a line's program is one of them until it has started."""


class Transport(Protocol):
    """How a board is reached: the program that is started here, and what its failures mean.

    ``name`` stands for the board in messages; ``package`` is what installs the program.
    """

    @property
    def name(self) -> str: ...

    @property
    def package(self) -> str: ...

    def command(self, remote: str) -> list[str]:
        """What is started here to run ``remote``, text for the board's shell; stdin and stdout stay binary."""
        ...

    def failure(self, code: int, told: str) -> RowcolError:
        """What it means that the program ended by ``code`` with ``told`` on stderr before the board answered.

        UnreachableError where the same may go well a little later.
        """
        ...


class Channel:
    """A running command on a board. UnreachableError: it ended, or did not take or give anything for so long.

    The program is out of reach of the terminal's Ctrl-C, which is for this process to handle: it has to clean up.
    """

    def __init__(self, transport: Transport, remote: str) -> None:
        self._transport = transport
        command = transport.command(remote)
        self._told: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 – open as long as the program
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._told, start_new_session=True,
                bufsize=0,
            )  # fmt: skip
        except FileNotFoundError as e:
            self._told.close()
            raise MissingDependencyError(
                f"boards such as {transport.name} are reached by the system's {command[0]}",
                package=transport.package,
                install=f"sudo apt-get install {transport.package}",
            ) from e
        self._stdin, self._stdout = _descriptor(self._process.stdin), _descriptor(self._process.stdout)
        os.set_blocking(self._stdin, False)
        self._read = bytearray()
        self._answered = False

    def send(self, data: bytes, seconds: float) -> None:
        """Write all of it; each piece has to be taken within ``seconds``."""
        left = memoryview(data)
        while left:
            if not select.select([], [self._stdin], [], seconds)[1]:
                raise self._silent(seconds)
            try:
                left = left[os.write(self._stdin, left[:_PIECE_BYTES]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                return  # why is told where the answer is read

    def line(self, seconds: float) -> bytes:
        """The next line, without its end."""
        while (end := self._read.find(b"\n")) < 0:
            if len(self._read) > _LINE_BYTES:
                raise self._lost("it sends lines without an end")
            self._more(seconds)
        line = bytes(self._read[:end])
        del self._read[: end + 1]
        return line

    def exactly(self, count: int, seconds: float) -> bytes:
        """The next ``count`` bytes."""
        while len(self._read) < count:
            self._more(seconds)
        data = bytes(self._read[:count])
        del self._read[:count]
        return data

    def answered(self) -> None:
        """The board has answered: from here on an end is a dropped line, whatever the program's exit code."""
        self._answered = True

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.kill()
        self._process.wait()
        self._told.close()

    def _more(self, seconds: float) -> None:
        if not select.select([self._stdout], [], [], seconds)[0]:
            raise self._silent(seconds)
        data = os.read(self._stdout, _PIECE_BYTES)
        if not data:
            raise self._ended()
        self._read += data

    def _silent(self, seconds: float) -> UnreachableError:
        return self._lost(f"nothing for {seconds:.0f} s")

    def _ended(self) -> RowcolError:
        """The program has closed its stdout: why."""
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return self._lost("the line was closed")
        self._told.seek(0)
        told = self._told.read().decode(errors="replace")
        if -code in _TO_ALL:
            said = " ".join(filter(None, (signal.Signals(-code).name, last_line(told))))
            return self._lost(said, "its program here got a signal, the board is as it was")
        if not self._answered and code in _NO_PROGRAM:
            return BoardError(
                self._transport.name,
                expected="Python 3.10 or newer",
                got=last_line(told) or "none",
                hint="install it, or say where it is: --board-python PATH",
            )
        if not self._answered:
            return self._transport.failure(code, told)
        return self._lost(last_line(told) or f"exit code {code}")

    def _lost(self, got: str, hint: str = "look at its power and its network") -> UnreachableError:
        return UnreachableError(f"the line to {self._transport.name} dropped", got=got, hint=hint)


def last_line(text: str) -> str:
    """The last line that is not empty, without characters that would steer a terminal."""
    return next((printable(line) for line in reversed(text.splitlines()) if line.strip()), "")


def printable(text: str) -> str:
    """Text from a board, made harmless for a terminal."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _descriptor(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    return pipe.fileno()
