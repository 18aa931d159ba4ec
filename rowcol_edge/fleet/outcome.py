"""What the end of a program on a board means here: the same typed errors as if it had run on this machine."""

from __future__ import annotations

import json
import re
import signal
from typing import Any

from ..device.doctor import STOP
from ..errors import BoardError, BudgetError, MissingDependencyError, NotComparableError, RowcolError, VerifyError
from .transport import last_line, printable

#: how an error is written, see RowcolError.__str__
_ERROR = re.compile(
    r"error: (?P<what>.+?)(?:: expected (?P<expected>.+?))?(?:(?:, |: )got (?P<got>.+?))?(?: – (?P<hint>.+))?"
)
#: the line by which a recipe enters the environment that it makes in the home of the board's user
_ENVIRONMENT = re.compile(r"\. ~/(\S+)/bin/activate")
_BY_HAND = "try it there: copy the bundle and run its rowcol-edge-device.pyz"
_HANGS = f"does its runtime or a driver hang? {_BY_HAND}"
_KILLED = "out of memory? dmesg on the board says who was ended, and why"
_BY_CODE: dict[int, type[RowcolError]] = {1: VerifyError, 3: NotComparableError}


def check_step(board: str, result: dict[str, Any]) -> None:
    """The error of a step that did not end well, in the board's own words.

    A profile whose arms take too much memory ends by 1 and says so itself; a crash ends by 1 too and leaves no profile.
    """
    code, told = result["code"], str(result["told"])
    if code == 0 or (code == BudgetError.exit_code and result["step"] == "profile" and result["profile"]):
        return
    what = f"{result['step']} on {board}"
    if code is None:
        expected = f"an end within {result['limit_seconds']:g} s"
        raise BoardError(what, expected=expected, got=last_line(told) or "nothing", hint=_HANGS)
    if code < 0:
        raise BoardError(
            what, expected="a process that ends well", got=f"killed by {_signal(-code)}",
            hint=_KILLED,
        )  # fmt: skip
    line = last_line(told)
    found = _ERROR.fullmatch(line)
    if found is None:
        raise BoardError(what, expected="a process that ends well", got=line or f"exit code {code}", hint=_BY_HAND)
    texts = {key: text or "" for key, text in found.groupdict().items()}
    raise _BY_CODE.get(code, BoardError)(f"{board}: {texts.pop('what')}", **texts)


def check_doctor(board: str, done: dict[str, Any]) -> None:
    """The error for the first thing that ``doctor`` finds in the way of a run."""
    try:
        findings = [finding for finding in json.loads(done["stdout"])["findings"] if finding["level"] == STOP]
        texts = [
            (printable(str(one["what"])), printable(str(one["found"])), _typed(str(one["do"]))) for one in findings
        ]
    except (ValueError, KeyError, TypeError) as e:
        got = last_line(str(done["stderr"])) or f"exit code {done['code']}"
        raise BoardError(f"doctor on {board}", expected="its findings", got=got, hint=_BY_HAND) from e
    for what, found, do in texts:
        if found.startswith("not installed"):
            raise MissingDependencyError(f"{board} lacks {what}", package=what, install=do, hint="typed on the board")
        raise BoardError(f"{board}: {what}", expected="one that runs the bundle", got=found, hint=do)


def _typed(do: str) -> str:
    """What to type on the board, in one line for its shell: the commands, how the next run finds the Python of the
    environment that they make, and as a comment what else the lines say."""
    lines = [printable(line) for line in do.splitlines()]
    commands = [line for line in lines if not line.startswith("#")]
    made = next((found[1] for line in commands if (found := _ENVIRONMENT.fullmatch(line))), "")
    notes = [f"then here --board-python {made}/bin/python3, or python in boards.toml"] if made else []
    notes += [line.lstrip("# ") for line in lines if line.startswith("#")]
    text = " && ".join(commands).replace(": && ", ": ")  # behind a colon the commands begin
    return f"{text}  # {'; '.join(notes)}" if notes else text


def keeper_gone(board: str, note: str) -> BoardError:
    """The error for a run whose own process is gone, though the line held."""
    got = last_line(note) or "it was killed"
    return BoardError(f"the run on {board}", expected="one that ends by itself", got=got, hint=_KILLED)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
