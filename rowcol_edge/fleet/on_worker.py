"""What runs on Dask's side. On a worker: one job, in a process of its own, with its board to itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import dask
from distributed import Scheduler, Semaphore, get_worker

from . import parcels, work
from .addresses import machine
from .boards import LOCAL
from .queueing import Outcome

_TRY_SECONDS = 5.0


def tags(dask_scheduler: Scheduler | None = None) -> list[str]:
    """On a scheduler: the tags that its workers have."""
    assert dask_scheduler is not None
    return sorted({tag for worker in dask_scheduler.workers.values() for tag in worker.resources})


def do(job_id: str, job: dict[str, Any], topic: str, limit_seconds: float) -> dict[str, Any]:
    """How the job ended, as the fields of an `Outcome`; or ``{"lacks": digest, "worker": address}``."""
    worker = get_worker()
    key = worker.get_current_task()

    def tell(message: dict[str, Any]) -> None:
        worker.log_event(topic, {"job": job_id, **message})

    def wanted() -> bool:
        task = worker.state.tasks.get(key)
        return task is not None and task.state != "cancelled"

    if "bundle" in job:
        path = parcels.find(job["bundle"], job["digest"])
        if path is None:
            return {"lacks": job["digest"], "worker": worker.address}
        job = {**job, "bundle": path}
    place = _machine(job, worker.address)
    with contextlib.ExitStack() as held:
        if place and not held.enter_context(_alone(place, str(job["board"]["on"]), tell, wanted)):
            return _told(Outcome("failed", reason="interrupted"))
        tell({"begun": True})  # not before: another run may hold the board for as long as it likes
        return _told(work.run(job, limit_seconds=limit_seconds, tell=tell, wanted=wanted, unset=_of_dask()))


def _of_dask() -> list[str]:
    """What Dask sets for its workers, such as OMP_NUM_THREADS=1: a measurement or build is to be as one by hand."""
    given: dict[str, Any] = dask.config.get("distributed.nanny.pre-spawn-environ")
    return [name for name, value in given.items() if os.environ.get(name) == str(value)]


def _machine(job: dict[str, Any], worker: str) -> str:
    """What is measured, by one job at a time; a worker's machine may still build, or reach boards elsewhere."""
    if "board" not in job:
        return ""
    on = str(job["board"]["on"])
    return worker.rpartition(":")[0] if on == LOCAL else machine(on)


@contextlib.contextmanager
def _alone(place: str, on: str, tell: work.Tell, wanted: Callable[[], bool]) -> Iterator[bool]:
    """Hold a board, reached at ``on``, among all clients of this scheduler, so that two of them cannot measure on it at
    once; False: not wanted any more.

    Its lease ends by itself half a minute after its worker has died.
    """
    lease = Semaphore(max_leases=1, name=f"rowcol-edge {place}")
    told = False
    while not lease.acquire(timeout=_TRY_SECONDS):
        if not wanted():
            yield False
            return
        if not told:
            board = f"the worker's machine ({place})" if on == LOCAL else on
            tell({"say": f"{board} is in use by another run, or its worker has just died: waiting"})
            told = True
    try:
        yield True
    finally:
        with contextlib.suppress(Exception):  # the scheduler may be gone, and the lease with it
            lease.release()


def _told(outcome: Outcome) -> dict[str, Any]:
    return {"state": outcome.state, "result": outcome.result, "reason": outcome.reason}
