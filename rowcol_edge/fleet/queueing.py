"""Which job runs where and when: state and rules only. Time comes in as a number, so a test needs no clock.

The rules:
- A place runs one job at a time. A job names the places that would do; one without places needs none.
- A place that was lost rests, longer each time, before it is tried again, and its job goes first – on whichever of the
  job's places is free then. What fails for another reason would fail again, and is not repeated.
- A place that was lost ``retries`` + 1 times in a row is given up, and with it the jobs that have no other place.
- A place that must be alone waits until nothing else runs, and nothing else is begun beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

DONE, FAILED, LOST = "done", "failed", "lost"

RETRIES = 2
REST_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Job:
    """``id`` stands for all that decides the result; ``work`` is what the process that does it is told."""

    id: str
    label: str
    work: dict[str, Any]
    places: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attempt ended: DONE with a ``result``, or FAILED or LOST with the ``reason``."""

    state: str
    result: Any = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that is over; ``seconds`` are those of its last attempt."""

    job: Job
    place: str
    outcome: Outcome
    attempts: int
    seconds: float


@dataclass(slots=True)
class _Place:
    running: str = ""
    losses: int = 0
    rests_until: float = 0.0
    gone: str = ""


@dataclass(slots=True)
class _Running:
    job: Job
    place: str
    since: float


@dataclass(slots=True)
class Queue:
    """The jobs of one campaign; ``width`` bounds how many run at once."""

    jobs: Sequence[Job]
    retries: int = RETRIES
    rest_seconds: float = REST_SECONDS
    width: int | None = None
    alone: frozenset[str] = frozenset()
    total: int = 0
    ended: list[Ended] = field(default_factory=list)
    _waiting: dict[tuple[str, ...], deque[Job]] = field(default_factory=dict)
    _places: dict[str, _Place] = field(default_factory=dict)
    _running: dict[str, _Running] = field(default_factory=dict)
    _attempts: dict[str, int] = field(default_factory=dict)
    _rested: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for job in self.jobs:
            self._waiting.setdefault(job.places, deque()).append(job)
            self.total += 1
        self._places = {name: _Place() for group in self._waiting for name in group}

    @property
    def over(self) -> bool:
        return len(self.ended) == self.total

    @property
    def running(self) -> list[tuple[Job, str]]:
        return [(run.job, run.place) for run in self._running.values()]

    def start(self, now: float) -> list[tuple[Job, str]]:
        """The jobs to begin now and the place of each, empty for those that need none."""
        begun: list[tuple[Job, str]] = []
        if any(run.place in self.alone for run in self._running.values()):
            return begun
        for group, waiting in self._waiting.items():
            while waiting and (place := self._free(group, now)) is not None:
                job = waiting.popleft()
                self._attempts[job.id] = self._attempts.get(job.id, 0) + 1
                self._running[job.id] = _Running(job, place, now)
                if place:
                    self._places[place].running = job.id
                begun.append((job, place))
                if place in self.alone:
                    return begun
        return begun

    def end(self, job_id: str, outcome: Outcome, now: float) -> list[Ended]:
        """Take in how an attempt ended; the jobs that are over by it, which may be none or several."""
        run = self._running.pop(job_id)
        place = self._places.get(run.place, _Place())
        place.running = ""
        if outcome.state != LOST:
            place.losses = 0
            return self._over(run.job, run.place, outcome, now - run.since)
        place.losses += 1
        place.rests_until = now + self.rest_seconds * 2 ** (place.losses - 1)
        self._rested += [run.place] if run.place else []
        over = []
        if self._attempts[job_id] > self.retries:
            over += self._over(run.job, run.place, Outcome(FAILED, reason=outcome.reason), now - run.since)
        else:
            self._waiting[run.job.places].appendleft(run.job)
        if place.losses > self.retries and run.place:
            place.gone = outcome.reason
            over += self._without_place()
        return over

    def wake(self, now: float) -> float | None:
        """Seconds until a place that rests is worth a look; None if none rests."""
        resting = [name for name in dict.fromkeys(self._rested) if self._places[name].rests_until > now]
        self._rested = resting
        return min((self._places[name].rests_until - now for name in resting), default=None)

    def eta_seconds(self) -> float | None:
        """About how long it still takes, by the mean of what is done; None before anything is."""
        times = [ended.seconds for ended in self.ended if ended.outcome.state == DONE]
        if not times:
            return None
        turns = 0.0
        for group, waiting in self._waiting.items():
            left = len(waiting) + sum(run.job.places == group for run in self._running.values())
            alive = sum(not self._places[name].gone for name in group) or 1
            turns = max(turns, left / alive if group else 0.0)
        if self.width is not None:
            turns = max(turns, (self.total - len(self.ended)) / self.width)
        return turns * sum(times) / len(times)

    def _free(self, group: tuple[str, ...], now: float) -> str | None:
        """A place of the group that may begin a job now."""
        if self.width is not None and len(self._running) >= self.width:
            return None
        for name in group:
            place = self._places[name]
            if place.running or place.gone or place.rests_until > now:
                continue
            if not (self._running and name in self.alone):
                return name
        return None if group else ""

    def _over(self, job: Job, place: str, outcome: Outcome, seconds: float) -> list[Ended]:
        found = Ended(job, place, outcome, self._attempts.get(job.id, 0), seconds)
        self.ended.append(found)
        return [found]

    def _without_place(self) -> list[Ended]:
        """End the jobs all of whose places were given up."""
        over = []
        for group, waiting in self._waiting.items():
            gone = [self._places[name].gone for name in group]
            if group and all(gone):
                while waiting:
                    reason = f"{', '.join(group)} given up: {gone[-1]}"
                    over += self._over(waiting.popleft(), group[-1], Outcome(FAILED, reason=reason), 0.0)
        return over
