"""Which job runs where and when, without a board, a process or a clock."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from rowcol_edge.fleet.engine import Event, drive
from rowcol_edge.fleet.queueing import DONE, FAILED, LOST, Ended, Job, Outcome, Queue

GOOD, DROPPED, BAD = Outcome(DONE, "profile"), Outcome(LOST, reason="no line"), Outcome(FAILED, reason="no runtime")


def job(name: str, *places: str) -> Job:
    return Job(name, name, {}, places)


def begun(queue: Queue, now: float = 0.0) -> list[tuple[str, str]]:
    return [(job.id, place) for job, place in queue.start(now)]


def test_a_place_runs_one_job_at_a_time() -> None:
    queue = Queue([job("1", "a"), job("2", "a"), job("3", "b")])
    assert begun(queue) == [("1", "a"), ("3", "b")]
    assert begun(queue) == []
    [ended] = queue.end("1", GOOD, 5.0)
    assert (ended.place, ended.outcome, ended.attempts, ended.seconds) == ("a", GOOD, 1, 5.0)
    assert begun(queue, 5.0) == [("2", "a")]


def test_a_job_takes_whichever_of_its_places_is_free() -> None:
    queue = Queue([job("1", "a", "b"), job("2", "a", "b"), job("3", "a", "b")])
    assert begun(queue) == [("1", "a"), ("2", "b")]
    queue.end("2", GOOD, 1.0)
    assert begun(queue, 1.0) == [("3", "b")]


def test_a_lost_place_rests_longer_each_time_and_its_job_goes_first() -> None:
    queue = Queue([job("1", "a"), job("2", "a")], retries=2, rest_seconds=60)
    begun(queue)
    assert queue.end("1", DROPPED, 100.0) == []
    assert begun(queue, 159.0) == []
    assert queue.wake(159.0) == 1.0
    assert begun(queue, 160.0) == [("1", "a")]
    assert queue.wake(160.0) is None  # nothing rests any more
    queue.end("1", DROPPED, 200.0)
    assert queue.wake(200.0) == 120.0
    assert begun(queue, 320.0) == [("1", "a")]
    assert [e.attempts for e in queue.end("1", GOOD, 330.0)] == [3]
    assert begun(queue, 330.0) == [("2", "a")]  # and what went well makes it a place as any other


def test_a_place_that_stays_away_is_given_up_with_all_that_only_it_could_do() -> None:
    queue = Queue([job("1", "a"), job("2", "a"), job("3", "b")], retries=1, rest_seconds=1)
    begun(queue)
    queue.end("1", DROPPED, 0.0)
    begun(queue, 1.0)
    over = queue.end("1", DROPPED, 1.0)
    assert [(e.job.id, e.outcome.state, e.attempts) for e in over] == [("1", FAILED, 2), ("2", FAILED, 0)]
    assert over[0].outcome.reason == "no line"
    assert over[1].outcome.reason == "a given up: no line"
    assert not queue.over
    queue.end("3", GOOD, 2.0)
    assert queue.over


def test_a_job_of_a_lost_place_goes_to_another_that_would_do() -> None:
    queue = Queue([job("1", "a", "b")], retries=1, rest_seconds=60)
    assert begun(queue) == [("1", "a")]
    queue.end("1", DROPPED, 10.0)
    assert begun(queue, 10.0) == [("1", "b")]


def test_a_job_that_takes_every_place_down_is_not_tried_on_all_of_them() -> None:
    queue = Queue([job("1", *"abcdef")], retries=2)
    tried = []
    for now in range(3):
        tried += begun(queue, now)
        queue.end("1", DROPPED, now)
    assert tried == [("1", "a"), ("1", "b"), ("1", "c")]
    assert queue.over


def test_what_failed_for_another_reason_is_not_repeated() -> None:
    queue = Queue([job("1", "a")], retries=5)
    begun(queue)
    [ended] = queue.end("1", BAD, 1.0)
    assert (ended.outcome, ended.attempts, queue.over) == (BAD, 1, True)


def test_a_place_that_must_be_alone_is() -> None:
    queue = Queue([job("1", "a"), job("2", "here"), job("3", "b")], alone=frozenset({"here"}))
    assert begun(queue) == [("1", "a"), ("3", "b")]
    queue.end("1", GOOD, 1.0)
    assert begun(queue, 1.0) == []
    queue.end("3", GOOD, 2.0)
    assert begun(queue, 2.0) == [("2", "here")]
    first = Queue([job("2", "here"), job("1", "a")], alone=frozenset({"here"}))
    assert begun(first) == [("2", "here")]


def test_jobs_without_places_are_bounded_by_the_width() -> None:
    queue = Queue([job(str(i)) for i in range(5)], width=2)
    assert begun(queue) == [("0", ""), ("1", "")]
    queue.end("0", GOOD, 1.0)
    assert begun(queue) == [("2", "")]


def test_the_time_that_is_left_is_that_of_the_longest_line() -> None:
    queue = Queue([job(str(i), "a") for i in range(4)] + [job("x", "b")])
    begun(queue)
    assert queue.eta_seconds() is None
    queue.end("0", GOOD, 100.0)
    assert queue.eta_seconds() == pytest.approx(300.0)  # three on a, one on b
    wide = Queue([job(str(i)) for i in range(4)], width=2)
    begun(wide)
    wide.end("0", GOOD, 10.0)
    assert wide.eta_seconds() == pytest.approx(15.0)


@dataclass
class Simulation:
    """An engine whose clock jumps from event to event."""

    queue: Queue
    length: Callable[[], float]
    lost: Callable[[str], bool]
    now: float = 0.0
    busy: set[str] = field(default_factory=set)
    coming: list[tuple[float, int, str, str, Outcome]] = field(default_factory=list)
    starts: Counter[str] = field(default_factory=Counter)

    def start(self, job: Job, place: str) -> None:
        assert place in job.places
        assert place not in self.busy, "two jobs on one board"
        self.busy.add(place)
        self.starts[job.id] += 1
        outcome = DROPPED if self.lost(place) else GOOD
        seconds = self.length() * (0.5 if outcome is DROPPED else 1.0)
        heapq.heappush(self.coming, (self.now + seconds, sum(self.starts.values()), job.id, place, outcome))

    def events(self, seconds: float) -> list[Event]:
        wake = self.queue.wake(self.now)
        if wake is not None and (not self.coming or self.now + wake < self.coming[0][0]):
            self.now += wake
            return []
        self.now, _, job, place, outcome = heapq.heappop(self.coming)
        self.busy.remove(place)
        return [Event(job, outcome)]

    def close(self) -> None:
        assert not self.busy

    def run(self) -> list[Ended]:
        over: list[Ended] = []
        drive(self.queue, self, over=over.append, tell=lambda *_: None, clock=lambda: self.now)
        self.close()
        return over


@pytest.mark.parametrize("once", [False, True])
def test_500_boards(once: bool) -> None:
    """Ten bundles, boards that are lost now and then, and ten that are dead."""
    chance = random.Random(7)
    boards = [f"board-{i}" for i in range(500)]
    dead = set(boards[::50])
    groups = [tuple(boards)] * 5000 if once else [(board,) for board in boards for _ in range(10)]
    jobs = [job(str(i), *group) for i, group in enumerate(groups)]
    queue = Queue(jobs, retries=2, rest_seconds=60)
    simulation = Simulation(
        queue, lambda: chance.uniform(90, 150), lambda board: board in dead or chance.random() < 0.02
    )
    over = simulation.run()
    assert sorted(e.job.id for e in over) == sorted(j.id for j in jobs)  # each ends once
    assert max(simulation.starts.values()) <= 3
    failed = [e for e in over if e.outcome.state == FAILED]
    if once:
        assert len(failed) < 10  # a dead board is no reason to fail where another would do
        assert simulation.now < 5000 * 120 / 490 * 1.3  # and costs little: near to all living boards at work
    else:
        of_dead = [e for e in failed if e.job.places[0] in dead]
        assert len(of_dead) == 10 * len(dead)
        assert sum(e.attempts for e in of_dead) == 3 * len(dead)  # the other nine of each were not waited for
        assert len(failed) - len(of_dead) <= 10
        assert simulation.now < 10 * 150 * 1.5 + 3 * 240
