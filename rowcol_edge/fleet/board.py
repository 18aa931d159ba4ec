"""What answers on the board: sent there as this source (see ``connection``), never installed.

Standard library of Python 3.10, Linux; of the package only what is sent with it.

It reads requests from stdin, one JSON object a line with the operation's name as ``op`` and its arguments; bytes of a
file follow the request for ``put`` and the answer to ``fetch``. It answers each with one JSON object a line (``follow``
with several), or with ``{"error": {what, expected, got, hint}}``, after which it ends. Every few seconds it says
``{"beat": true}``, so that the other side can tell slow work from a dead line.

The work itself is done by a keeper, see :mod:`.keeper`, which this starts and asks about through the run's folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import keeper
from .keeper import MARK, PROFILE, PROGRAM, end, environment, read, tail, write

if TYPE_CHECKING:
    from io import BufferedReader

PREFIX = "rowcol-edge-board-"

_OUT = threading.Lock()
_BEAT_SECONDS = 2.0
_PIECE_BYTES = 1 << 18
_POLL_SECONDS = 1.0
_GONE_SECONDS = 3 * _BEAT_SECONDS
"""After which the program of a line whose other side has ended has noticed it, and ended too."""
_WAIT_SECONDS = 2.0


class RefusalError(Exception):
    """Why something cannot be done here: the keys of an error's four texts."""

    def __init__(self, what: str, expected: str, got: str, hint: str = "") -> None:
        super().__init__({"what": what, "expected": expected, "got": got, "hint": hint})


def answer(data: bytes = b"", **fields: Any) -> None:
    with _OUT:
        sys.stdout.buffer.write(json.dumps(fields).encode() + b"\n" + data)
        sys.stdout.buffer.flush()


class Beat(threading.Thread):
    """Says that this is alive, to the other side and, by the lease, to the keeper of ``folder``."""

    folder = ""

    def run(self) -> None:
        while True:
            time.sleep(_BEAT_SECONDS)
            try:
                answer(beat=True)
                if self.folder:
                    os.utime(Path(self.folder, "lease"))
            except BrokenPipeError:
                os._exit(0)  # nobody is there any more; what has arrived is kept
            except OSError:
                continue  # the folder is being removed, or its disk is full


def open_folder(
    folder: str, places: list[str], need_bytes: int, lease_seconds: float, run: str = "", who: str = ""
) -> None:
    """The folder of an earlier connection, or a new one where it is gone; ``begun``: its job runs or has ended.

    ``run`` is a name that is the same wherever the same job is begun, or empty: what a process that ended has left
    under it is gone on with. ``who`` asks, in two lines: the first is told to those who wait for the board, the second
    is nobody else's.
    """
    folder = folder or _left(places, run, who)
    fresh = not folder or not _ours(Path(folder))
    path = _new_folder(places, need_bytes, run) if fresh else Path(folder)
    try:
        begun = _prepare(path, lease_seconds, who)
    except OSError:
        if fresh:
            shutil.rmtree(path, ignore_errors=True)
        raise
    answer(folder=str(path), fresh=fresh, begun=begun, machine=platform.machine())


def _prepare(path: Path, lease_seconds: float, who: str) -> bool:
    """Make contact, and start a keeper unless one is at work or done, which is what is given back."""
    fcntl.flock(_line(path), fcntl.LOCK_SH)
    (path / "who").write_text(who)
    (path / "lease").write_text(str(lease_seconds))
    begun = (path / "result.json").exists() or (_alive(path) and (path / "job.json").exists())
    if not begun:
        (path / "job.json").unlink(missing_ok=True)  # files may have been lost in a reboot: they are looked at first
        _keeper(path)
    return begun


def _line(path: Path) -> int:
    """What a line locks while it works on a run, until this process ends."""
    return os.open(path / "line", os.O_RDWR | os.O_CREAT, 0o600)


def alone(folder: str, places: list[str]) -> None:
    """Wait for a while until the run has the board to itself; ``holder``: whose run has it instead, or empty."""
    path, end_time = Path(folder), time.monotonic() + _WAIT_SECONDS
    while waits := _alive(path) and not (path / "alone").exists():
        if time.monotonic() > end_time:
            break
        time.sleep(0.2)
    answer(holder=_holder(places) if waits else "")


def _holder(places: list[str]) -> str:
    """Whose run has the board, and for how long. It may be another user's, or lie where nobody looks here."""
    for path in _folders([*places, *_places([])], ""):
        try:
            if not (path / "result.json").exists() and _alive(path):
                who = _owner(path).partition("\n")[0]
                minutes = (time.time() - (path / "alone").stat().st_mtime) / 60
                return f"the run of {who}, {minutes:.0f} min old"
        except OSError:
            continue  # it waits, too, or is being removed
    return "another run"


def _places(named: list[str]) -> list[str]:
    places = named or [os.environ.get("TMPDIR", ""), "/tmp", "/var/tmp"]  # noqa: S108 – mkdtemp makes a folder ours
    return [str(Path.cwd() / place) for place in places if place]


def _folders(places: list[str], run: str) -> list[Path]:
    """The folders of runs of this user, of all or of one name."""
    pattern = f"{PREFIX}{run}-*" if run else f"{PREFIX}*"
    return [path for place in places for path in Path(place).glob(pattern) if _ours(path)]


def _left(places: list[str], run: str, who: str) -> str:
    """The folder of a run that a process elsewhere began and did not end; empty if there is none.

    One that a line works on is not left: the same measurement may have been asked for twice.
    """
    found = _folders(_places(places), run) if run else []
    return next((str(path) for path in found if (path / "lease").exists() and _take(path, who)), "")


def _take(path: Path, who: str) -> bool:
    """Make a run's folder one's own, unless a line works on it."""
    line, end_time = _line(path), time.monotonic() + _GONE_SECONDS
    while not _lock(line):
        if time.monotonic() > end_time:
            os.close(line)
            return False
        time.sleep(0.1)
    with contextlib.suppress(FileNotFoundError):  # it was just removed, and a new one is made
        (path / "who").write_text(who)
    fcntl.flock(line, fcntl.LOCK_SH)
    return True


def _lock(file: int) -> bool:
    """Lock it unless somebody else has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _new_folder(places: list[str], need_bytes: int, run: str) -> Path:
    told = []
    for place in _places(places):
        try:
            _sweep(Path(place))
            if (free := shutil.disk_usage(place).free) < need_bytes:
                told.append(f"{place}: {free >> 20} MiB free")
                continue
            return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{run}-" if run else PREFIX, dir=place))
        except OSError as e:
            told.append(f"{place}: {e.strerror}")
    raise RefusalError(
        "no place for the bundle",
        expected=f"a folder that can be written, with {(need_bytes >> 20) + 1} MiB free",
        got="; ".join(told),
        hint="make room, or name another folder of the board with --board-folder",
    )


def _ours(path: Path) -> bool:
    """Is it a folder of this user? Where everybody may write, another could have put one in the place of a lost one."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _sweep(place: Path) -> None:
    """Remove folders that nobody holds or waits for: their keeper went down with the board."""
    for path in _folders([str(place)], ""):
        try:
            contact = path / "lease"
            if _alive(path):
                continue
            if time.time() - contact.stat().st_mtime > float(contact.read_text()):
                shutil.rmtree(path, ignore_errors=True)
        except (OSError, ValueError):
            continue  # being made or removed by another connection


def held(folder: str, name: str) -> None:
    """Bytes and digest of a file, of the part that has arrived; none: 0 bytes."""
    path = Path(folder, name)
    digest = _digest(path) if path.is_file() else ""
    answer(size=path.stat().st_size if digest else 0, sha256=digest)


def put(folder: str, name: str, offset: int, size: int) -> None:
    """Take the bytes of a file of ``size`` behind the ``offset`` that are here; the digest of all as it lies there."""
    path = Path(folder, name)
    path.touch()
    line = cast("BufferedReader", sys.stdin.buffer)
    with path.open("r+b") as file:
        file.truncate(offset)
        file.seek(offset)
        left = size - offset
        while left:
            piece = line.read1(min(left, _PIECE_BYTES))
            if not piece:
                sys.exit(0)  # the line dropped: what has arrived is kept
            file.write(piece)
            file.flush()
            left -= len(piece)
        os.fsync(file.fileno())
    answer(sha256=_digest(path))


def call(folder: str, arguments: list[str], timeout_seconds: float) -> None:
    """Run the device program here and now."""
    command = [sys.executable, PROGRAM, *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment(folder), stdin=subprocess.DEVNULL, capture_output=True,
            timeout=timeout_seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RefusalError(arguments[0], expected=f"an answer within {timeout_seconds:.0f} s", got="none") from None
    answer(
        code=done.returncode, stdout=done.stdout.decode(errors="replace"), stderr=done.stderr.decode(errors="replace")
    )


def follow(folder: str, steps: list[list[Any]], at: int) -> None:
    """Begin the job unless it has begun, and tell what it writes behind the first ``at`` bytes, until it ends.

    Every answer has ``at``; ``end`` holds the result, and is None where the keeper is gone without one.
    """
    path = Path(folder)
    if not (path / "job.json").exists():
        write(path / "job.json", steps)
    while True:
        over = (path / "result.json").exists() or not _alive(path)  # before the log, which is complete by then
        while lines := _lines(path / "log", at):
            for line in lines:
                at += len(line) + 1
                answer(at=at, line=line.decode(errors="replace"))
        if over:
            result = read(path / "result.json")
            answer(at=at, end=result, note="" if result else tail(path / "keeper.log", 0))
            return
        time.sleep(_POLL_SECONDS)


def fetch(folder: str) -> None:
    """The profile: its size and digest, then the bytes."""
    path = Path(folder, PROFILE)
    answer(path.read_bytes(), size=path.stat().st_size, sha256=_digest(path))


def remove(folder: str, who: str = "") -> None:
    """End what runs and remove the folder, unless somebody else has made it theirs: they will."""
    path = Path(folder)
    if path.exists() and not _lock(_line(path)):
        time.sleep(0.5)  # a line that went silent may still hold it; one that takes it will have said so by then
    if _owner(path) in (who, ""):
        end(folder)
        if path.exists():
            shutil.rmtree(path)
    answer()


def _owner(path: Path) -> str:
    """Who has said last that the run is theirs; empty if that was lost in a power cut."""
    try:
        return (path / "who").read_text()
    except FileNotFoundError:
        return ""


def _keeper(path: Path) -> None:
    """Start the keeper unless it lives. The lock is taken here and handed on, so there is no moment without it."""
    with (path / "lock").open("w") as lock:
        while not _lock(lock.fileno()):
            if _alive(path):  # else somebody has just asked the same, which takes no time
                return
        end(str(path))  # what a keeper that was killed alone has left running
        (path / "alone").unlink(missing_ok=True)
        (path / "keeper.py").write_text(keeper.SOURCE, encoding="utf-8")
        with (path / "keeper.log").open("wb") as log:
            subprocess.Popen(
                [sys.executable, "-I", str(path / "keeper.py"), str(path)],
                cwd=path, env={**os.environ, MARK: str(path)}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, pass_fds=[lock.fileno()],
            )  # fmt: skip


def _alive(path: Path) -> bool:
    """Does the keeper hold its lock?"""
    try:
        with (path / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _lines(path: Path, at: int) -> list[bytes]:
    """Whole lines behind the first ``at`` bytes, without their ends."""
    try:
        with path.open("rb") as file:
            file.seek(at)
            return file.read(_PIECE_BYTES).split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


OPERATIONS: dict[str, Callable[..., None]] = {
    "open": open_folder, "alone": alone, "held": held, "put": put, "call": call, "follow": follow, "fetch": fetch,
    "remove": remove,
}  # fmt: skip


def serve() -> None:
    """Answer requests until the line ends or one fails."""
    beat = Beat(daemon=True)
    beat.start()
    try:
        while raw := sys.stdin.buffer.readline():
            request = json.loads(raw)
            beat.folder = request["folder"]
            OPERATIONS[request.pop("op")](**request)
    except RefusalError as e:
        answer(error=e.args[0])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads what Python flushes at its end
    except OSError as e:
        got = f"{e.filename}: {e.strerror}" if e.filename else str(e.strerror or e)
        expected, hint = "a disk that can be written and read", "df -h and dmesg on the board say more"
        answer(error={"what": "the work on the board failed", "expected": expected, "got": got, "hint": hint})
