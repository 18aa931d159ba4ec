"""What does the jobs of a queue: here, on threads of this process, or on the workers of a Dask scheduler."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from . import work
from .boards import Board
from .queueing import FAILED, Ended, Job, Outcome, Queue

POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Event:
    """Of a job that runs: it ended (``outcome``), or it says something (``message``, see :mod:`.child`)."""

    job: str
    outcome: Outcome | None = None
    message: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    def start(self, job: Job, place: str) -> None:
        """Begin a job at a place; the end is one of the events."""
        ...

    def events(self, seconds: float) -> list[Event]:
        """What happened, waiting for it at most so long. SchedulerError: the engine itself is gone."""
        ...

    def close(self) -> None:
        """End what runs."""
        ...


def drive(
    jobs: Queue,
    engine: Engine,
    *,
    over: Callable[[Ended], None],
    tell: Callable[[str, dict[str, Any]], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run a queue to its end. ``over`` gets each job that is over, ``tell`` what a job says meanwhile, by its id."""
    while not jobs.over:
        for job, place in jobs.start(clock()):
            engine.start(job, place)
        wake = jobs.wake(clock())
        for event in engine.events(POLL_SECONDS if wake is None else min(wake, POLL_SECONDS)):
            if event.outcome is None:
                tell(event.job, event.message)
                continue
            for ended in jobs.end(event.job, event.outcome, clock()):
                over(ended)


def request(job: Job, place: str, boards: Mapping[str, Board]) -> dict[str, Any]:
    """What the process that does a job is told: JSON values."""
    if not place:
        return job.work
    board = boards[place]
    reach = {"on": board.on, "python": board.python, "folder": board.folder, "known_hosts": board.known_hosts}
    return {**job.work, "board": reach, "run": job.id}


class Here:
    """A thread for each job, which waits for the process that does it."""

    def __init__(self, boards: Mapping[str, Board], limit_seconds: float) -> None:
        self._boards, self._limit_seconds = boards, limit_seconds
        self._events: queue.Queue[Event] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._wanted = True

    def start(self, job: Job, place: str) -> None:
        thread = threading.Thread(target=self._do, args=(job.id, request(job, place, self._boards)))
        self._threads.append(thread)
        thread.start()

    def events(self, seconds: float) -> list[Event]:
        try:
            return [self._events.get(timeout=seconds)]
        except queue.Empty:
            return []

    def close(self) -> None:
        self._wanted = False
        for thread in self._threads:
            thread.join()

    def _do(self, job: str, told: dict[str, Any]) -> None:
        try:
            outcome = work.run(
                told, limit_seconds=self._limit_seconds,
                tell=lambda message: self._events.put(Event(job, None, message)), wanted=lambda: self._wanted,
            )  # fmt: skip
        except Exception as e:  # noqa: BLE001 – a job without an end would be waited for for ever
            outcome = Outcome(FAILED, reason=f"its process could not be started or followed: {type(e).__name__}: {e}")
        self._events.put(Event(job, outcome))
