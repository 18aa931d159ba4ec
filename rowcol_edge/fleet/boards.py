"""The boards of a fleet: ``boards.toml``, one ``[[boards]]`` table each, read as strictly as a target."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..tables import Table
from .addresses import machine, parse
from .connection import remote_command

SCHEMA = 1
"""History: 1 – first version."""
LOCAL = "local"
BUILD = "build"
"""The tag of workers that build."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_A_NAME = "letters, digits, '.', '_' and '-'"
_OPTIONAL = ("python", "folder", "known_hosts", "tag")


@dataclass(frozen=True, slots=True)
class Board:
    """One board.

    ``on`` is where it is: ``ssh://…`` or ``adb:…``, or ``local``, the machine that does the work. ``python`` and
    ``folder`` are the board's, see `rowcol_edge.fleet.remote.profile`. ``known_hosts`` is the text of such a file, so
    that it holds on another machine too. ``tag`` is the resource that a worker must have to be given this board: the
    target's name for ssh, which goes from anywhere, and else the board's own, for its cable ends at one machine.
    """

    name: str
    target: str
    on: str
    tag: str
    python: str = "python3"
    folder: str | None = None
    known_hosts: str | None = None

    @property
    def local(self) -> bool:
        return self.on == LOCAL


def read(path: Path) -> tuple[Board, ...]:
    """The boards of a file. ConfigError: unreadable, malformed, or a board that stands there twice."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        hint = "README: A fleet of boards shows one"
        raise ConfigError(str(path), expected="a file of boards", got=e.strerror or str(e), hint=hint) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(str(path), expected="valid TOML", got=str(e)) from e
    table = Table(values, str(path), ConfigError)
    table.keys({"schema": True, "boards": True})
    if (schema := table.whole("schema")) != SCHEMA:
        raise ConfigError(f"{path}: schema", expected=str(SCHEMA), got=str(schema))
    found = tuple(
        _board(Table(entry, f"{path}: boards[{position}]", ConfigError), path.parent)
        for position, entry in enumerate(table.tables("boards"))
    )
    _check_once(found, path)
    return found


def start_lines(boards: Sequence[Board], scheduler: str) -> list[str]:
    """What to type for a scheduler and its workers: one for each board, on machines that reach it."""
    tags = [board.tag for board in boards]
    lines = ["dask scheduler", *(worker_line(scheduler, tag, tags.count(tag)) for tag in dict.fromkeys(tags))]
    return [*lines, f"{worker_line(scheduler, BUILD)}  # for sweeps"]


def worker_line(scheduler: str, tag: str, count: int = 1) -> str:
    many = f" --nworkers {count}" if count > 1 else ""
    return f'dask worker {scheduler}{many} --nthreads 1 --resources "{tag}=1"'


def _board(table: Table, folder: Path) -> Board:
    table.keys({f.name: f.name not in _OPTIONAL for f in fields(Board)})
    has: Mapping[str, Any] = table.values
    name = table.text("name", _NAME, _A_NAME)
    target, on = table.text("target", _NAME, _A_NAME), table.text("on")
    python = table.text("python") if "python" in has else "python3"
    known_hosts = folder / table.text("known_hosts") if "known_hosts" in has else None
    if on != LOCAL:
        parse(on, known_hosts)
        remote_command(python)
    elif unused := [key for key in ("python", "folder", "known_hosts") if key in has]:
        raise ConfigError(f"{table.where}: {unused[0]}", expected="a board that is elsewhere", got=f"on = {LOCAL!r}")
    usual = target if on.startswith("ssh:") else name
    return Board(
        name=name,
        target=target,
        on=on,
        tag=table.text("tag", _NAME, _A_NAME) if "tag" in has else usual,
        python=python,
        folder=table.text("folder") if "folder" in has else None,
        known_hosts=_text(known_hosts) if known_hosts is not None else None,
    )


def _text(known_hosts: Path) -> str:
    """What a file of host keys holds. ConfigError: it cannot be read, or is no text."""
    try:
        return known_hosts.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError("known hosts", expected="a readable file", got=f"{known_hosts}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError("known hosts", expected="text in UTF-8", got=f"{known_hosts}: {e}") from e


def _check_once(boards: Sequence[Board], path: Path) -> None:
    """One address is one board, and may not be measured by two jobs at once; ``local`` is a machine for each tag."""
    places = [(board.on, board.tag) if board.local else machine(board.on) for board in boards]
    for key, values in (("name", [board.name for board in boards]), ("on", places)):
        twice = next((board for i, board in enumerate(boards) if values[i] in values[:i]), None)
        if twice is not None:
            hint = "host and port are the board's, whoever logs in" if key == "on" else ""
            raise ConfigError(
                f"{path}: {key}", expected="each board once", got=f"{getattr(twice, key)} twice", hint=hint
            )
