"""A fleet of 500 boards: how long a campaign takes, what is repeated, and what the scheduler itself costs.

    python tools/simulate_fleet.py --out tools/results/fleet-simulation.json

Two parts. *Simulated*: the rules of `rowcol_edge.fleet.queueing` and the loop that drives them, with a clock that
jumps; jobs are as long as those of a real campaign (drawn with replacement; those that the published result states, or
of ``--fleet``), boards are lost at stated rates, and some are dead. *Measured*: the real engine on a real Dask
scheduler with as many workers, all in this one process, where a job sleeps instead of measuring: what is left is the
cost of placing, holding a board's lease, telling and gathering.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import resource
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark_machine import machine
from rowcol_edge.fleet.boards import Board
from rowcol_edge.fleet.engine import Event, drive
from rowcol_edge.fleet.queueing import DONE, FAILED, LOST, REST_SECONDS, RETRIES, Ended, Job, Outcome, Queue

RESULT = Path(__file__).parent / "results" / "fleet-simulation.json"
BUNDLES = 10
RECONNECT_SECONDS = 300.0
"""What a lost board costs before the job gives up on the line, see `rowcol_edge.fleet.remote`."""
SLEEP_SECONDS = 5.0


@dataclass
class Simulated:
    """An engine whose clock jumps from event to event."""

    queue: Queue
    lengths: Sequence[float]
    lost: float
    dead: frozenset[str]
    chance: random.Random
    now: float = 0.0
    busy_seconds: float = 0.0
    coming: list[tuple[float, int, str, Outcome]] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    starts: int = 0

    def start(self, job: Job, place: str) -> None:
        if place in self.running:
            raise AssertionError(f"two jobs on {place}")
        self.running.add(place)
        self.starts += 1
        seconds, outcome = self.chance.choice(self.lengths), Outcome(DONE)
        if place in self.dead:
            seconds, outcome = 15.0, Outcome(LOST, reason="no line")  # ssh's own time to connect
        elif self.chance.random() < self.lost:
            seconds, outcome = self.chance.random() * seconds + RECONNECT_SECONDS, Outcome(LOST, reason="dropped")
        self.busy_seconds += seconds
        heapq.heappush(self.coming, (self.now + seconds, self.starts, f"{place} {job.id}", outcome))

    def events(self, seconds: float) -> list[Event]:
        wake = self.queue.wake(self.now)
        if wake is not None and (not self.coming or self.now + wake < self.coming[0][0]):
            self.now += wake
            return []
        self.now, _, key, outcome = heapq.heappop(self.coming)
        place, job = key.split(" ")
        self.running.remove(place)
        return [Event(job, outcome)]

    def close(self) -> None:
        self.coming.clear()


def simulate(boards: int, bundles: int, lengths: Sequence[float], lost: float, dead: int, once: bool) -> dict[str, Any]:
    """One campaign. ``lost``: the chance that a job loses its board for good; ``dead``: boards that never answer."""
    names = [f"board-{i}" for i in range(boards)]
    groups = [tuple(names)] * (boards * bundles) if once else [(name,) for name in names for _ in range(bundles)]
    queue = Queue([Job(str(i), "", {}, group) for i, group in enumerate(groups)])
    engine = Simulated(queue, lengths, lost, frozenset(names[:dead]), random.Random(1))
    over: list[Ended] = []
    began = time.process_time()
    drive(queue, engine, over=over.append, tell=lambda *_: None, clock=lambda: engine.now)
    states = Counter(ended.outcome.state for ended in over)
    mean = sum(lengths) / len(lengths)
    return {
        "once": once,
        "boards": boards,
        "dead_boards": dead,
        "jobs": len(over),
        "chance_of_a_lost_board": lost,
        "hours": round(engine.now / 3600, 2),
        "hours_without_losses": round(mean * bundles / 3600, 2),
        "measured": states[DONE],
        "not_measured": states[FAILED],
        "begun_again": engine.starts - sum(ended.attempts > 0 for ended in over),
        "boards_at_work": round(engine.busy_seconds / (engine.now * boards), 3),
        "cpu_seconds_of_the_rules": round(time.process_time() - began, 2),
    }


def measure(workers: int, bundles: int) -> dict[str, Any]:
    """The real engine on that many tagged workers in this process, whose jobs sleep."""
    import dask
    from distributed import LocalCluster

    from rowcol_edge.fleet import cluster, on_worker

    def sleep(job: dict[str, Any], *, tell: Any, **_: Any) -> Outcome:
        for step in range(3):
            tell({"progress": ["latency", step, 3]})
            time.sleep(SLEEP_SECONDS / 3)
        return Outcome(DONE, "")

    on_worker.work.run = sleep
    boards = {f"b{i}": Board(f"b{i}", "generic-arm64", f"ssh://b{i}", "generic-arm64") for i in range(workers)}
    # all share one interpreter, which is busy: no reason to give up
    dask.config.set({"distributed.comm.timeouts.connect": "600s"})
    cluster.CONNECT_SECONDS = cluster.ANSWER_SECONDS = 600.0
    began = time.monotonic()
    with LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=False, dashboard_address=":0", memory_limit=0,
        resources={"generic-arm64": 1},
    ) as dask:  # fmt: skip
        started = time.monotonic() - began
        engine = cluster.Cluster(dask.scheduler_address, boards, 600.0, print)
        jobs = [Job(f"{name}-{n}", name, {"kind": "sleep"}, (name,)) for name in boards for n in range(bundles)]
        over: list[Ended] = []
        began, cpu = time.monotonic(), time.process_time()
        drive(Queue(jobs), engine, over=over.append, tell=lambda *_: None)
        seconds, used = time.monotonic() - began, time.process_time() - cpu
        engine.close()
    if any(ended.outcome.state != DONE for ended in over):
        raise SystemExit(f"a job failed: {next(e.outcome.reason for e in over if e.outcome.state != DONE)}")
    return {
        "workers": workers,
        "jobs": len(over),
        "seconds_a_job_sleeps": SLEEP_SECONDS,
        "seconds_to_start_workers": round(started, 1),
        "seconds": round(seconds, 1),
        "seconds_without_scheduler": SLEEP_SECONDS * bundles,
        "cpu_ms_a_job": round(1000 * used / len(over), 1),
        "load_average": round(os.getloadavg()[0], 1),
        "peak_mib_of_all": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def seconds_of_jobs(path: Path) -> list[float]:
    """Of a campaign's ``fleet.json``, what was measured; of a result of this tool, those that it was made with."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if "seconds_of_real_jobs" in found:
        return list(found["seconds_of_real_jobs"])
    lengths = [entry["seconds"] for entry in found["entries"] if entry["state"] == "measured"]
    if not lengths:
        raise SystemExit(f"{path} has no job that was measured")
    return lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--fleet", type=Path, default=RESULT, help="how long jobs take: a fleet.json, or an earlier result of this"
    )
    parser.add_argument("--boards", type=int, default=500)
    parser.add_argument("--bundles", type=int, default=BUNDLES)
    parser.add_argument("--workers", type=int, default=100, help="of the measured part; 0 leaves it out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lengths = seconds_of_jobs(options.fleet)
    rates = ((0.0, 0), (0.01, 5), (0.05, 25))
    found: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "seconds_of_real_jobs": lengths,
        "retries": RETRIES,
        "rest_seconds": REST_SECONDS,
        "simulated": [
            simulate(options.boards, options.bundles, lengths, lost, dead * options.boards // 500, once)
            for once in (False, True)
            for lost, dead in rates
        ],
    }
    write(found, options.out)
    if options.workers:
        write(found | {"measured": measure(options.workers, 4)}, options.out)


def write(found: dict[str, Any], path: Path | None) -> None:
    text = json.dumps(found, indent=1)
    print(text, flush=True)
    if path:
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
