"""The process on a board that outlives the line: runs the steps, and removes everything once nobody waits any more.

Run as a file of its own by the board's Python, so it imports nothing of the package. The state of a run lies in one
temporary folder:

    lock         held by the keeper as long as it lives, and by nothing after a reboot
    line         held by each line to the board that works on this run
    who          whose run it is: a line for people, and one that nobody else has
    alone        made once the keeper has the board to itself
    lease        holds the seconds after which nobody is waiting any more; its mtime is the last contact
    job.json     the steps that are to run: [name, arguments of the device program, seconds it may take] each
    NAME.done    a step that ended well and is not repeated
    log          what the steps wrote to stderr
    result.json  how the job ended

Once nobody has been in touch for the lease, the keeper ends what runs and removes the folder: nothing stays behind even
if the other side lost its power.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

MARK = "ROWCOL_EDGE_BOARD"
"""Set to the folder in the environment of the keeper and so of all it starts: what has it is ended with the folder."""
SOURCE: str = globals().get("SOURCE", "")
"""This file's text, where it was sent over a line: a keeper is started from it."""
PROGRAM = "device.pyz"
PROFILE = "profile.json"

_TAIL_BYTES = 4000


def keep(folder: str) -> None:
    """The keeper: wait for the board and for the job, run its steps, and stay until the folder is removed."""
    path = Path(folder)
    threading.Thread(target=_watch, args=(path,), daemon=True).start()
    board = _hold_board()
    (path / "alone").touch()
    while not (path / "job.json").exists():
        time.sleep(0.1)
    # where a keeper before this one had done them all
    result: dict[str, Any] = {"step": "", "code": 0, "told": "", "limit_seconds": 0.0}
    for name, arguments, limit_seconds in read(path / "job.json"):
        if (path / f"{name}.done").exists():
            continue
        (path / PROFILE).unlink(missing_ok=True)  # of a step that was lost and is repeated
        result = {"step": name, **_step(path, name, arguments, limit_seconds)}
        if result["code"] != 0:
            break
        (path / f"{name}.done").touch()
    result["profile"] = (path / PROFILE).exists()
    if result["profile"]:
        with (path / PROFILE).open("rb") as file:
            os.fsync(file)  # a result that is on the disk stands for a profile that is
    write(path / "result.json", result)
    os.close(board)
    while True:
        time.sleep(60)  # the other thread ends this process


def _hold_board() -> int:
    """Wait until no other run is measured on this board, and hold it: until the descriptor is closed, at the latest by
    the end of this process.

    What is locked is the folder for temporary files: every board has one, it is the same whoever logs in, and nothing
    has to be left there.
    """
    places = os.environ.get("TMPDIR", ""), "/tmp"  # noqa: S108 – nothing is written there
    board = os.open(next((place for place in places if os.access(place, os.R_OK)), "/"), os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(board, fcntl.LOCK_EX)
    return board


def _step(path: Path, name: str, arguments: list[str], limit_seconds: float) -> dict[str, Any]:
    """Run the device program: its exit code (minus the signal that ended it), and the end of what it told.

    The code is None where it took longer than ``limit_seconds`` and was ended, with all that it had started.
    """
    with (path / "log").open("ab") as log:
        log.write(f"{name} 0/1\n".encode())
        log.flush()
        begin = log.tell()
        command = [sys.executable, str(path / PROGRAM), name, *arguments]
        process = subprocess.Popen(
            command, cwd=path, env=environment(str(path)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=log,
        )  # fmt: skip
        code: int | None = None
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(TimeoutError):  # one that the kernel holds: nothing could be done about it
                end(str(path), keep=os.getpid())
    return {"code": code, "told": tail(path / "log", begin), "limit_seconds": limit_seconds}


def environment(folder: str) -> dict[str, str]:
    """All that a run writes goes into the folder."""
    temporary = Path(folder, "tmp")
    temporary.mkdir(exist_ok=True)
    return {
        "ROWCOL_ENGINE_CACHE": str(Path(folder, "engines")),  # unless the board has its own
        **os.environ,
        "TMPDIR": str(temporary),
        "PYTHONIOENCODING": "utf-8",
    }


def _watch(path: Path) -> NoReturn:
    """Wait until nobody has been in touch for the lease. By the monotonic clock: a board's other one may jump."""
    try:
        lease_seconds, contact, since = float((path / "lease").read_text()), 0, time.monotonic()
        while time.monotonic() - since < lease_seconds:
            time.sleep(min(5.0, lease_seconds / 4))
            if (seen := (path / "lease").stat().st_mtime_ns) != contact:
                contact, since = seen, time.monotonic()
    except OSError:
        pass  # the folder is gone
    end(str(path), keep=os.getpid())
    shutil.rmtree(path, ignore_errors=True)
    os._exit(0)


def end(folder: str, keep: int = 0) -> None:
    """End every process that was started for the folder, but ``keep``; TimeoutError: one does not go."""
    mark = f"{MARK}={folder}".encode()
    found: list[int] = []
    for _ in range(100):
        found = [pid for pid in _processes(mark) if pid != keep]
        if not found:
            return
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    raise TimeoutError(0, f"process {found[0]} does not end")


def _processes(mark: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # another user's, or gone
            if mark in variables:
                found.append(int(entry.name))
    return found


def tail(path: Path, begin: int) -> str:
    with path.open("rb") as file:
        file.seek(max(begin, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")


def write(path: Path, value: Any) -> None:
    """In one step, and on the disk: a power cut leaves the whole file or none."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    keep(sys.argv[1])
