"""A profile that is taken on a board: copy, verify, run, bring back, and leave nothing behind.

Every step can be taken again: a file that lies there is known by its digest, a run that goes on is followed from where
it was left, one that was lost begins anew. So a dropped line is mended by doing everything once more on a new one.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..device.bundle import Bundle
from ..device.digests import sha256_bytes
from ..device.profile import Profile
from ..device.session import Progress
from ..device.system import another_machine
from ..errors import BoardError, BundleError, ConfigError, IntegrityError, LoginError, RowcolError, UnreachableError
from . import outcome
from .addresses import parse
from .cargo import BUNDLE, Cargo, File
from .connection import Connection, remote_command
from .keeper import PROFILE
from .transport import Transport, printable

Say = Callable[[str], None]

RECONNECT_SECONDS = 300.0
"""How long a line that dropped is tried again: a reboot takes a minute or two."""
OUTAGES = 10
"""How often a line may drop in one run."""
STARTS = 3
"""How often a run may begin: more, and it is the run that takes the board down."""
LEASE_SECONDS = 900.0
"""After that time without contact the board removes everything itself."""
STEP_SECONDS = 4 * 3600.0
"""What a step on the board may take beyond the time that was asked for: a bound on hanging, not on being slow."""
CLEAN_SECONDS = 30.0

_OPTIONS = ("arms", "baseline", "blocks", "seconds", "threads")
_SWITCHES = ("memory", "energy", "ops")
_DOCTOR_SECONDS = 180.0
_LONGEST_DELAY_SECONDS = 15.0
_PROFILE_LIMIT_BYTES = 256 << 20
_PROGRESS = re.compile(r"(\w+) (\d+)/(\d+)(?:, \d+ s left)?")


def on_stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def profile(
    bundle: Bundle,
    on: str,
    *,
    known_hosts: Path | None = None,
    python: str = "python3",
    folder: str | None = None,
    run: str = "",
    progress: Progress | None = None,
    say: Say = on_stderr,
    **options: Any,
) -> Profile:
    """Measure a bundle on the board at the address ``on``.

    ``known_hosts``: keys of hosts instead of the user's own file. ``python`` and ``folder``: the board's Python, and
    where its temporary folder is made. ``run``: letters and digits that stand for exactly this measurement; what a
    process that was killed has left under them on the board, where it may still go on, is followed instead of begun
    again. ``options``: as for :func:`rowcol_edge.device.measure.profile`. ``say`` gets a line for each thing worth
    knowing.

    Errors: see `rowcol_edge.errors`; nothing stays on the board after one of them, or after Ctrl-C.
    """
    transport = parse(on, known_hosts)
    remote_command(python)
    if folder is not None and not folder.isprintable():
        raise ConfigError("the board's folder", expected="a path", got=repr(folder))
    for name in filter(None, (*(options.get("arms") or ()), options.get("baseline"))):
        bundle.arm(name)  # before anything is copied
    with tempfile.TemporaryDirectory(prefix="rowcol-edge-") as made:
        cargo = Cargo.pack(bundle, Path(made))
        whole = _Run(
            transport, python, [folder] if folder else [], bundle.manifest.target, cargo, options, progress, say, run
        )
        try:
            data = whole.result()
        finally:
            whole.clean()
    measured = Profile.from_json(data, f"profile from {transport.name}")
    if measured.digest != bundle.digest:
        raise IntegrityError(
            f"profile from {transport.name}", expected=f"bundle {bundle.digest}", got=measured.digest,
            hint="the board's files were exchanged meanwhile: who else works there?",
        )  # fmt: skip
    return measured


def arguments(options: dict[str, Any]) -> list[str]:
    """Options of the profiler as the device program takes them. ConfigError: one that only this side has."""
    known = (*_OPTIONS, *_SWITCHES)
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError("options of a profile on a board", expected=", ".join(known), got=", ".join(unknown))
    given = {key: value for key, value in options.items() if value is not None and key in _OPTIONS}
    texts = {key: ",".join(value) if key == "arms" else str(value) for key, value in given.items()}
    return [f"--{key}={text}" for key, text in texts.items()] + [f"--{key}" for key in _SWITCHES if options.get(key)]


class _Run:
    """One run on one board, over as many lines as it takes."""

    def __init__(
        self, transport: Transport, python: str, places: list[str], target: Mapping[str, Any], cargo: Cargo,
        options: dict[str, Any], progress: Progress | None, say: Say, name: str = "",
    ) -> None:  # fmt: skip
        self._name = name
        self._who = f"process {os.getpid()} on {platform.node()}\n{uuid.uuid4().hex}"
        self._transport, self._python, self._places, self._cargo = transport, python, places, cargo
        self._target = target
        limit_seconds = STEP_SECONDS + 2 * (options.get("seconds") or 0.0)
        self._steps = [
            ["verify", [BUNDLE, *arguments({"threads": options.get("threads")})], STEP_SECONDS],
            ["profile", [BUNDLE, f"--out={PROFILE}", *arguments(options)], limit_seconds],
        ]
        self._progress = progress or (lambda *_: None)
        self._say = say
        self._folder = ""
        self._told = 0  # bytes of the run's log that were passed on
        self._starts = 0

    def result(self) -> bytes:
        """The profile's JSON."""
        connection = Connection(self._transport, self._python)  # at first an address may be wrong: no second try
        for outage in range(OUTAGES + 1):
            try:
                with connection:
                    return self._pass(connection)
            except UnreachableError as e:
                if outage == OUTAGES:
                    raise
                self._say(f"{e.what} ({e.got}); trying again for {RECONNECT_SECONDS:.0f} s")
            connection = self._connect_again(RECONNECT_SECONDS)
            self._say(f"connected to {self._transport.name} again")
        raise AssertionError  # the last pass returns or raises

    def clean(self) -> None:
        """Remove what lies on the board; if it is out of reach, say that it does so by itself."""
        if not self._folder:
            return
        end = time.monotonic() + CLEAN_SECONDS
        try:
            while not self._removed(end):
                pass
        except RowcolError as e:
            self._say(
                f"{self._transport.name} could not be cleaned ({e.got or e.what}): it removes {self._folder} by "
                f"itself, {LEASE_SECONDS / 60:.0f} minutes after the last contact"
            )

    def _removed(self, end: float) -> bool:
        """Whether the folder is gone; False where the line has dropped and there is time until ``end`` to try again."""
        with self._connect_again(end - time.monotonic()) as connection:
            try:
                connection.ask("remove", folder=self._folder, who=self._who)
            except UnreachableError:
                if time.monotonic() > end:
                    raise
                return False
        return True

    def _pass(self, connection: Connection) -> bytes:
        """Everything over one line, without what an earlier one has done."""
        opened = connection.ask(
            "open", folder=self._folder, places=self._places, need_bytes=self._cargo.need_bytes,
            lease_seconds=LEASE_SECONDS, run=self._name, who=self._who,
        )  # fmt: skip
        if self._folder and opened["fresh"]:
            self._say(f"{self._folder} is gone from the board: copying again")
            self._told = 0
        self._folder, board = str(opened["folder"]), self._transport.name
        if not opened["begun"]:
            if self._starts == STARTS:
                raise BoardError(
                    f"the run on {board}", expected="one that goes on when the line drops",
                    got=f"{STARTS} that were lost", hint="does the board reboot under load? look at its power supply",
                )  # fmt: skip
            if self._starts:
                self._say(f"{board} lost the run: it begins again")
            self._wait(connection)
            self._prepare(connection, str(opened["machine"]))
            self._starts += 1
        outcome.check_step(board, self._follow(connection))
        return self._fetch(connection)

    def _wait(self, connection: Connection) -> None:
        """Until no other run is on the board; the lock is the board's, so it holds whoever measures from wherever."""
        told = False
        while holder := printable(str(connection.ask("alone", folder=self._folder, places=self._places)["holder"])):
            if not told:
                self._say(f"{self._transport.name} is in use by {holder}: waiting")
            told = True

    def _prepare(self, connection: Connection, machine: str) -> None:
        """Check the board and copy; what needs little comes before what takes long."""
        board, cargo = self._transport.name, self._cargo
        if wanted := another_machine(self._target, machine):
            raise BundleError(
                f"bundle for {self._target.get('name')}", expected=f"a machine of kind {wanted}",
                got=f"{printable(machine)} ({board})", hint="build it for this board: rowcol-edge targets lists them",
            )  # fmt: skip
        for file in (cargo.program, cargo.manifest):
            self._copy(connection, file)
        done = connection.ask(
            "call", folder=self._folder, arguments=["doctor", ".", "--json"], timeout_seconds=_DOCTOR_SECONDS
        )
        outcome.check_doctor(board, done)
        self._copy(connection, cargo.bundle)

    def _copy(self, connection: Connection, file: File) -> None:
        file.copy(connection, self._folder, lambda done, total: self._progress("copy", done >> 10, total >> 10))

    def _follow(self, connection: Connection) -> dict[str, Any]:
        """How the run ended; what it tells meanwhile goes to where a run here tells it."""
        for answer in connection.follow(folder=self._folder, steps=self._steps, at=self._told):
            self._told = int(answer["at"])
            if "line" in answer:
                self._tell(printable(str(answer["line"])))
            if "end" in answer:
                if not answer["end"]:
                    raise outcome.keeper_gone(self._transport.name, str(answer.get("note", "")))
                return dict(answer["end"])
        raise AssertionError  # a connection raises or ends with an end

    def _tell(self, line: str) -> None:
        if found := _PROGRESS.fullmatch(line):
            self._progress(found[1], int(found[2]), int(found[3]))
        elif line and not line.startswith(("error: ", "written to ")):  # errors are raised, and that file is not kept
            self._say(f"{self._transport.name}: {line}")

    def _fetch(self, connection: Connection) -> bytes:
        told = connection.ask("fetch", folder=self._folder)
        if not 0 < (size := int(told["size"])) < _PROFILE_LIMIT_BYTES:
            raise BoardError(
                f"profile on {self._transport.name}", expected="a file of a few MB", got=f"{size} bytes",
                hint="is its disk full?",
            )  # fmt: skip
        data = connection.receive(size)
        if (got := sha256_bytes(data)) != told["sha256"]:
            raise IntegrityError(
                f"profile from {self._transport.name}", expected=str(told["sha256"]), got=got,
                hint="its disk or memory loses data: check it before you measure anything",
            )  # fmt: skip
        return data

    def _connect_again(self, seconds: float) -> Connection:
        """A new line, tried for so long with growing pauses; the error of the last try.

        A board that has just started refuses logins for a while.
        """
        end, delay = time.monotonic() + seconds, 0.5
        while True:
            try:
                return Connection(self._transport, self._python)
            except (UnreachableError, LoginError):
                if time.monotonic() + delay > end:
                    raise
            time.sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY_SECONDS)
