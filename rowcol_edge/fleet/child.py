"""One job in a process of its own, started by :mod:`.work`: JSON in, JSON lines out, nothing pickled.

Its argument is a folder for temporary files, which whoever asked removes, or this process if nobody is left who would.
The first line of stdin is the job. Answers are one JSON object a line: ``{"progress": [label, done, total]}`` and
``{"say": text}`` meanwhile, and at last ``{"done": result}``, or ``{"failed": reason, "lost": whether the same may go
well a little later}``. When stdin ends, whoever asked is gone, and so is this process, at once, with the group of
processes that it leads: what goes on on a board is left to whoever takes the job up again. SIGINT ends it in an orderly
way, the board is cleaned first; to SIGTERM, which a service manager sends to all at once, whoever asked reacts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ..device.bundle import Bundle
from ..errors import IntegrityError, RowcolError, UnreachableError

_EVERY_SECONDS = 0.5


class _Line:
    """To whoever asked; a step of progress at most every half second, but for the last of its kind."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._next = 0.0

    def send(self, **message: Any) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def say(self, text: str) -> None:
        self.send(say=text)

    def progress(self, label: str, done: int, total: int) -> None:
        if done == total or time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY_SECONDS
            self.send(progress=[label, done, total])


def profile(job: dict[str, Any], line: _Line) -> str:
    """The profile's JSON: of a bundle, on a board or on this machine."""
    board: dict[str, Any] = job["board"]
    with Bundle.open(job["bundle"]) as bundle:
        if bundle.digest != job["digest"]:
            raise IntegrityError(job["bundle"], expected=f"bundle {job['digest']}", got=bundle.digest)
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in job["options"].items()}
        if board["on"] == "local":
            from ..device.measure import profile as measure

            return measure(bundle, progress=line.progress, **options).to_json()
        from . import remote

        with tempfile.TemporaryDirectory(prefix="rowcol-edge-") as made:
            known_hosts = None
            if board["known_hosts"] is not None:
                known_hosts = Path(made, "known_hosts")
                known_hosts.write_text(board["known_hosts"], encoding="utf-8")
            return remote.profile(
                bundle, board["on"], known_hosts=known_hosts, python=board["python"], folder=board["folder"],
                run=job["run"], progress=line.progress, say=line.say, **options,
            ).to_json()  # fmt: skip


def build(job: dict[str, Any], line: _Line) -> dict[str, Any]:
    """The bundle that was built, as `rowcol_edge.pipeline.Built` tells it."""
    from .. import config, pipeline
    from ..cache import Cache

    os.chdir(job["folder"])  # where whoever asked stands, whose paths these are
    options = config.make(job["options"])
    (built,) = pipeline.build(options, cache=Cache.of_user(), progress=line.progress)
    return built.to_dict()


KINDS: dict[str, Callable[[dict[str, Any], _Line], Any]] = {"profile": profile, "build": build}


def main() -> None:
    line = _Line(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # what models and libraries print is none of the answers
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been inherited as ignored
    signal.signal(signal.SIGTERM, lambda *_: None)
    tempfile.tempdir = os.environ["TMPDIR"] = folder = sys.argv[1]
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_until_alone, args=(folder,), daemon=True).start()
    _answer(job, line)


def _answer(job: dict[str, Any], line: _Line) -> None:
    try:
        line.send(done=KINDS[job["kind"]](job, line))
    except RowcolError as e:
        line.send(failed=str(e), lost=isinstance(e, UnreachableError))
    except KeyboardInterrupt:
        line.send(failed="interrupted", lost=False)
    except Exception as e:  # noqa: BLE001 – a fault in a user's model, or in this program, ends its job and no other
        line.send(failed=f"{type(e).__name__}: {e}", lost=False)


def _until_alone(folder: str) -> None:
    while os.read(0, 1024):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
