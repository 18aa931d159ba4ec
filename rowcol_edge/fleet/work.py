"""Doing one job with a time limit: a process of its own, so that one which hangs or runs out of memory costs itself."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

from ..device.processes import child_environment
from .queueing import DONE, FAILED, LOST, Outcome
from .transport import last_line

Tell = Callable[[dict[str, Any]], None]

GRACE_SECONDS = 45.0
"""What a job that is ended early has to clean its board."""
_END_SECONDS = 10.0
_POLL_SECONDS = 0.5
_OUT_OF_MEMORY = "out of memory? dmesg says who was ended, and why"


def run(
    job: dict[str, Any],
    *,
    limit_seconds: float,
    tell: Tell,
    wanted: Callable[[], bool],
    unset: Collection[str] = (),
) -> Outcome:
    """Do a job; ``tell`` gets what it says meanwhile. Ended early where it is not ``wanted`` any more.

    ``unset``: variables of this process's environment that the job's has not.

    FAILED: it raised, it took longer than ``limit_seconds``, or its process died. LOST: its board is out of reach.
    """
    child = _Child(job, unset)
    try:
        end = time.monotonic() + limit_seconds
        while True:
            message = child.next(_POLL_SECONDS)
            if (outcome := _outcome(message)) is not None:
                return outcome
            if message:
                tell(message)
            if time.monotonic() > end:
                return Outcome(FAILED, reason=f"not done within {limit_seconds:.0f} s, the time limit of a job")
            if not wanted():
                return Outcome(FAILED, reason="interrupted")
    finally:
        child.close()


def _outcome(message: dict[str, Any]) -> Outcome | None:
    if "done" in message:
        return Outcome(DONE, message["done"])
    if "failed" in message:
        return Outcome(LOST if message["lost"] else FAILED, reason=message["failed"])
    return Outcome(FAILED, reason=message["died"]) if "died" in message else None


class _Child:
    """The process, and what it has said: messages, the last of them ``{"died": why}`` if it gave no answer."""

    def __init__(self, job: dict[str, Any], unset: Collection[str]) -> None:
        package = Path(__file__).resolve().parents[1]
        environment = child_environment(str(package.parent))
        with contextlib.ExitStack() as made:
            self._told: IO[bytes] = made.enter_context(tempfile.TemporaryFile())
            # made here, so that it goes with a process that is killed
            folder = tempfile.TemporaryDirectory(prefix="rowcol-edge-job-", ignore_cleanup_errors=True)
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{package.name}.fleet.child", made.enter_context(folder)],
                env={key: value for key, value in environment.items() if key not in unset},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._told, start_new_session=True,
            )  # fmt: skip
            self._made = made.pop_all()  # as long as the process
        self._answered = threading.Event()
        self._messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        with contextlib.suppress(BrokenPipeError):  # why is told by how it died
            self._stdin.write(json.dumps(job).encode() + b"\n")
            self._stdin.flush()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def next(self, seconds: float) -> dict[str, Any]:
        """The next message; an empty one if there is none for so long."""
        try:
            return self._messages.get(timeout=seconds)
        except queue.Empty:
            return {}

    def close(self) -> None:
        """End it if it has not answered: in an orderly way, and after the grace in the other. Then what it has left."""
        if not self._answered.is_set():
            self._process.send_signal(signal.SIGINT)
            self._answered.wait(GRACE_SECONDS)
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()  # by which it ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._reader.join()
        self._made.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # it was killed while it wrote
                message = json.loads(line)
                if _outcome(message) is not None:
                    self._answered.set()
                self._messages.put(message)
        code = self._process.wait()
        self._answered.set()
        self._told.seek(0)
        told = last_line(self._told.read().decode(errors="replace"))
        why = f"killed by {signal.Signals(-code).name}: {_OUT_OF_MEMORY}" if code < 0 else told or f"exit code {code}"
        self._messages.put({"died": f"the process of the job died: {why}"})
