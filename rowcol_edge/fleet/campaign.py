"""What people ask of a fleet: profile these bundles on those boards, build this sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..device.schedule import time_budget
from ..device.session import Progress
from ..device.table import NONE
from ..errors import ConfigError
from . import jobs as making
from . import sweep as sweeping
from .boards import Board
from .engine import Engine, Here, drive
from .gather import Entry, Folder, Gathered, unmeasured
from .queueing import REST_SECONDS, RETRIES, Ended, Queue
from .remote import Say, on_stderr
from .sweep import Sweep

PROFILE_SECONDS = 3600.0
BUILD_SECONDS = 6 * 3600.0
"""Time limits of a job."""
WIDTH_HERE = 8
"""Boards that are measured at once from this machine."""


@dataclass(frozen=True, slots=True)
class Scheduler:
    """A Dask scheduler: its address, and the files for TLS by which it knows this client."""

    address: str
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @classmethod
    def asked(cls, address: str | None, ca: Path | None, cert: Path | None, key: Path | None) -> Scheduler | None:
        """From what was said on a command line. ConfigError: an address of TLS without its files, or the reverse."""
        files = [path for path in (ca, cert, key) if path is not None]
        if files or (address or "").startswith("tls://"):
            expected = "--scheduler tls://host:8786 with --tls-ca, --tls-cert and --tls-key"
            if not (address or "").startswith("tls://"):
                raise ConfigError("TLS", expected=expected, got=address or "no scheduler")
            if len(files) < 3 or not all(path.is_file() for path in files):
                got = ", ".join(f"{path}{'' if path.is_file() else ', which is no file'}" for path in files)
                raise ConfigError("TLS", expected=expected, got=got or "none of them")
        return None if address is None else cls(address, ca, cert, key)


def profile(
    bundles: Sequence[Path],
    boards: Sequence[Board],
    *,
    out: Path = Path("fleet"),
    scheduler: Scheduler | None = None,
    once: bool = False,
    again: bool = False,
    limit_seconds: float = PROFILE_SECONDS,
    retries: int = RETRIES,
    progress: Progress | None = None,
    say: Say = on_stderr,
    **options: Any,
) -> Gathered:
    """Measure every bundle on every board of its target, one at a time on each.

    Args:
        boards: see `rowcol_edge.fleet.boards.read`.
        out: receives ``profiles/`` as they come, and ``fleet.json``. A profile that lies there, of the same bundle,
            board and options, is kept unless ``again``.
        scheduler: the workers that do it; without one it is done from here.
        once: each bundle on one board of its target, whichever is free first.
        limit_seconds: a job that takes longer is ended, and not tried again.
        retries: how often a board that was lost is tried again.
        options: as for `rowcol_edge.fleet.remote.profile`.

    Raises:
        RowcolError: bad input, before anything is measured. SchedulerError: it is gone; what was measured is written,
        and of the rest why it was not.
        What a board did not measure is no error here: `Gathered.raise_if_incomplete` makes it one.
    """
    time_budget(options.get("seconds"))
    _check_limit(limit_seconds)
    wanted = making.profiles(bundles, boards, options, once=once)
    folder = Folder(out)
    entries: dict[str, Entry] = {}
    for job in wanted:
        if not again and (entry := folder.kept(job)) is not None:
            entries[job.id] = entry
    by_name = {board.name: board for board in boards}
    here = scheduler is None
    queue = Queue(
        [job for job in wanted if job.id not in entries], retries=retries, rest_seconds=REST_SECONDS,
        width=WIDTH_HERE if here else None, alone=frozenset(board.name for board in boards if board.local and here),
    )  # fmt: skip

    def over(ended: Ended) -> str:
        entry = entries[ended.job.id] = folder.keep(ended)
        return f"{entry.bundle} on {entry.board}: {entry.reason or f'{entry.ratio or NONE} ({entry.evidence})'}"

    def gathered(why_not: str = "") -> Gathered:
        return folder.write([entries.get(job.id) or unmeasured(job, why_not) for job in wanted])

    try:
        with _engine(scheduler, by_name, limit_seconds, say) as engine:
            _run(queue, engine, over, progress or _silent, say)
    except BaseException as e:
        with suppress(ConfigError):  # it would hide why it ended
            gathered(str(e) or "interrupted")
        raise
    return gathered()


def sweep(
    asked: Sweep,
    *,
    scheduler: Scheduler | None = None,
    limit_seconds: float = BUILD_SECONDS,
    progress: Progress | None = None,
    say: Say = on_stderr,
) -> Sweep:
    """Build the cells of a sweep: here one after another, or on workers with the tag ``build``.

    The workers need the same installation and, at the same paths, the same files; bundles are written by them.
    ConfigError: no time limit. SchedulerError: it is gone. A build that fails is no error here:
    `Sweep.raise_if_incomplete` makes it one.
    """
    _check_limit(limit_seconds)
    cells = list(asked.cells)
    index = {job.id: position for position, job in asked.jobs.items()}

    def over(ended: Ended) -> str:
        position = index[ended.job.id]
        cell = cells[position] = sweeping.became(cells[position], ended)
        return f"{cell.name}: {cell.state}{f': {cell.reason}' if cell.reason else ''}"

    queue = Queue([*asked.jobs.values()], width=1 if scheduler is None else None)
    try:
        with _engine(scheduler, {}, limit_seconds, say) as engine:
            _run(queue, engine, over, progress or _silent, say)
    except BaseException:
        with suppress(OSError):  # it would hide why it ended
            asked.write(cells)
        raise
    return asked.write(cells)


def _check_limit(seconds: float) -> None:
    """ConfigError: a time limit of a job that is not above 0, or without an end."""
    if not 0 < seconds < math.inf:
        raise ConfigError("--limit", expected="a time > 0 that ends", got=str(seconds))


@contextmanager
def _engine(
    scheduler: Scheduler | None, boards: Mapping[str, Board], limit_seconds: float, say: Say
) -> Iterator[Engine]:
    engine: Engine
    if scheduler is None:
        engine = Here(boards, limit_seconds)
    else:
        from . import cluster

        security = cluster.tls(scheduler.ca, scheduler.cert, scheduler.key)
        engine = cluster.Cluster(scheduler.address, boards, limit_seconds, say, security)
    try:
        yield engine
    finally:
        engine.close()


def _run(queue: Queue, engine: Engine, over: Callable[[Ended], str], progress: Progress, say: Say) -> None:
    """Drive the queue, telling what ends, what the jobs say, and the steps of a job that runs alone."""
    progress("fleet", 0, queue.total)

    def ended(found: Ended) -> None:
        text = over(found)
        eta = queue.eta_seconds()
        left = f"; about {eta / 60:.0f} min left" if eta and not queue.over else ""
        say(f"{len(queue.ended)}/{queue.total} {text}{left}")
        progress("fleet", len(queue.ended), queue.total)

    def tell(_: str, message: dict[str, Any]) -> None:
        if "say" in message:
            say(str(message["say"]))
        elif "progress" in message and len(queue.running) == 1:
            step, done, total = message["progress"]
            progress(step, done, total)

    drive(queue, engine, over=ended, tell=tell)


def _silent(label: str, done: int, total: int) -> None:
    """The progress of someone who does not watch."""
