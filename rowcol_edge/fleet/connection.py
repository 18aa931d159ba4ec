"""One connection to the program on a board: requests, answers, and the bytes of files."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import BoardError, ConfigError, RowcolError
from .transport import Channel, Transport, printable

ANSWER_SECONDS = 60.0
"""How long nothing may come or go. A login takes its time; later the board says every few seconds that it lives."""

_HELLO = b"rowcol-edge-board "
_VERSION = re.compile(rb"(\d{1,4}) (\d{1,4})\s*")
_NOISE_LINES = 100
"""What a login may print before the program answers."""
_OLDEST = (3, 10)
#: Without single quotes, dollars and exclamation marks it is the same text in every shell. The program comes by stdin.
_START = (
    'import sys;o=sys.stdout;o.write(chr(10)+"rowcol-edge-board %d %d"%sys.version_info[:2]+chr(10));o.flush();'
    'i=sys.stdin.buffer;s=i.read(int(i.readline() or 0));exec(compile(s,"board","exec"),{})'
)
_MODULES = ("keeper", "board")
_Fields = dict[str, type | tuple[type, ...]]
_ANSWERS: dict[str, _Fields] = {
    "open": {"folder": str, "fresh": bool, "begun": bool, "machine": str},
    "alone": {"holder": str},
    "held": {"size": int, "sha256": str},
    "put": {"sha256": str},
    "call": {"code": int, "stdout": str, "stderr": str},
    "follow": {"at": int},
    "fetch": {"size": int, "sha256": str},
    "remove": {},
}
"""What the answer to each request holds at least."""
_END: _Fields = {"step": str, "code": (int, type(None)), "told": str, "limit_seconds": (int, float), "profile": bool}
"""And what the end of a run holds, unless its keeper was lost."""
_LOAD = """
import sys, types
sys.modules["fleet"] = types.ModuleType("fleet")
for name, text in MODULES.items():
    module = sys.modules["fleet." + name] = types.ModuleType("fleet." + name)
    module.__package__, module.SOURCE = "fleet", text
    setattr(sys.modules["fleet"], name, module)
    exec(compile(text, name, "exec"), module.__dict__)
sys.modules["fleet.board"].serve()
"""


class Connection:
    """Use it as a context manager.

    UnreachableError: the line dropped; what was asked may or may not have been done. BoardError: what came over it is
    none of the answers of the program.
    """

    def __init__(self, transport: Transport, python: str) -> None:
        self._name, self._asked = transport.name, ""
        self._channel = Channel(transport, remote_command(python))
        try:
            self._greet()
        except BaseException:
            self._channel.close()
            raise

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._channel.close()

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request. BoardError: the board refuses it."""
        self._request(op, arguments)
        return self.answer()

    def follow(self, **arguments: Any) -> Iterator[dict[str, Any]]:
        """The answers to ``follow``, the one with ``end`` last."""
        self._request("follow", arguments)
        while True:
            answer = self.answer()
            yield answer
            if "end" in answer:
                return

    def request_put(self, **arguments: Any) -> None:
        """Ask to take a file; :meth:`send` its bytes, then take the :meth:`answer`."""
        self._request("put", arguments)

    def send(self, data: bytes) -> None:
        self._channel.send(data, ANSWER_SECONDS)

    def answer(self) -> dict[str, Any]:
        """The next answer that is one."""
        while True:
            line = self._channel.line(ANSWER_SECONDS)
            try:
                answer = json.loads(line)
            except (ValueError, RecursionError):
                answer = None
            if not isinstance(answer, dict):
                raise self._odd(line)
            if "beat" in answer:
                continue
            error, end = answer.get("error"), answer.get("end")
            if isinstance(error, dict):
                raise self._refusal(error)
            if error is not None or not _holds(answer, _ANSWERS[self._asked]) or (end and not _holds(end, _END)):
                raise self._odd(line)
            return answer

    def receive(self, count: int) -> bytes:
        return self._channel.exactly(count, ANSWER_SECONDS)

    def _greet(self) -> None:
        for _ in range(_NOISE_LINES):
            line = self._channel.line(ANSWER_SECONDS)
            if line.startswith(_HELLO):
                break
        else:
            raise BoardError(self._name, expected="a shell that runs a command", got="other text", hint="see ~/.bashrc")
        self._channel.answered()
        found = _VERSION.fullmatch(line.removeprefix(_HELLO))
        if found is None:
            raise self._odd(line)
        version = int(found[1]), int(found[2])
        if version < _OLDEST:
            raise BoardError(
                self._name,
                expected="Python 3.10 or newer",
                got=".".join(map(str, version)),
                hint="install a newer one beside it, and say where it is: --board-python PATH",
            )
        program = _program()
        self._channel.send(b"%d\n%b" % (len(program), program), ANSWER_SECONDS)

    def _request(self, op: str, arguments: dict[str, Any]) -> None:
        self._asked = op
        self._channel.send(json.dumps({"op": op, **arguments}).encode() + b"\n", ANSWER_SECONDS)

    def _odd(self, line: bytes) -> BoardError:
        got = printable(repr(line[:80]))
        hint = "what else prints there?"
        return BoardError(self._name, expected="an answer of the program sent to it", got=got, hint=hint)

    def _refusal(self, error: dict[str, Any]) -> RowcolError:
        texts = {key: printable(str(error.get(key, ""))) for key in ("what", "expected", "got", "hint")}
        return BoardError(f"{self._name}: {texts.pop('what')}", **texts)


def _holds(answer: object, fields: _Fields) -> bool:
    """Is it a JSON object with these fields, each of its kind?"""
    return isinstance(answer, dict) and all(isinstance(answer.get(key, ...), kind) for key, kind in fields.items())


def remote_command(python: str) -> str:
    """What the board's shell is given: the path of its Python, quoted, and a constant. ConfigError: not a path."""
    if not python or not python.isprintable() or python.startswith("-"):
        raise ConfigError("the board's Python", expected="a name or a path", got=repr(python))
    return shlex.join([python, "-I", "-c", _START])


@cache
def _program() -> bytes:
    """The board's side of this package as one text, which makes its modules there."""
    folder = Path(__file__).parent
    modules = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES}
    return f"MODULES = {modules!r}\n{_LOAD}".encode()
