"""Jobs on the workers of a Dask scheduler.

Dask places a job on a worker that has its tag as a resource, one at a time, and gives it to another one if that worker
dies, up to three times. What a job's own process does is no business of Dask's: time limits and lost boards come back
as outcomes. Everything here trusts the scheduler and its workers, which exchange Python objects: see `tls`.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..device.bundle import Bundle
from ..errors import MissingDependencyError, SchedulerError
from ..package import zip_bundle
from . import parcels
from .boards import BUILD, Board, worker_line
from .engine import Event, request
from .queueing import FAILED, Job, Outcome

try:
    from distributed import Client, Future, Security
    from distributed.comm.addressing import get_address_host_port, parse_address
except ImportError as e:
    raise MissingDependencyError("--scheduler needs Dask", package="rowcol-edge[fleet]") from e

from . import on_worker

CONNECT_SECONDS = 15.0
ANSWER_SECONDS = 60.0
NO_WORKER_SECONDS = 300.0
"""How long a tag may be without a worker: one that was killed is started again by its nanny in a few seconds."""
_LOOK_SECONDS = 5.0
_SENDS = 5
"""How often a bundle is sent for one job, to workers that die or lose it."""
_GREETING_BYTES = 1 << 20
"""More than any greeting of Dask's has."""
_SLACK_SECONDS = 600.0
"""What a job that has its board may take beyond its limit, to clean it and to bring back what was measured."""


def tls(ca: Path | None, cert: Path | None, key: Path | None) -> Security | None:
    """The keys by which client, scheduler and workers know each other; None without any."""
    if ca is None and cert is None and key is None:
        return None
    given = {"tls_ca_file": ca, "tls_client_cert": cert, "tls_client_key": key}
    return Security(require_encryption=True, **{name: str(path) for name, path in given.items() if path is not None})


@dataclass(slots=True)
class _Placed:
    job: Job
    place: str
    tag: str
    future: Future[Any]
    begun: float | None = None
    sent: int = 0


class Cluster:
    """An engine of jobs, see `rowcol_edge.fleet.engine.Engine`. SchedulerError: nobody answers at ``address``."""

    def __init__(
        self, address: str, boards: Mapping[str, Board], limit_seconds: float, say: Callable[[str], None],
        security: Security | None = None,
    ) -> None:  # fmt: skip
        self._address, self._boards, self._limit_seconds, self._say = address, boards, limit_seconds, say
        self._loud = _silenced()
        try:
            self._client = _connected(address, security)
        except BaseException:
            _heard_again(self._loud)
            raise
        self._placed: dict[str, _Placed] = {}
        self._topic = f"rowcol-edge-{uuid.uuid4().hex}"
        self._events: queue.Queue[Event] = queue.Queue()
        self._client.subscribe_topic(self._topic, self._heard)
        self._missing: dict[str, float] = {}
        self._looked = 0.0

    def start(self, job: Job, place: str) -> None:
        self._check_connected()
        tag = self._boards[place].tag if place else BUILD
        future = self._client.submit(
            on_worker.do, job.id, request(job, place, self._boards), self._topic, self._limit_seconds,
            key=f"{job.label}-{uuid.uuid4().hex}", resources={tag: 1}, pure=False,
        )  # fmt: skip
        self._placed[job.id] = _Placed(job, place, tag, future)
        future.add_done_callback(partial(self._ended, job.id))

    def events(self, seconds: float) -> list[Event]:
        happened = self._happened(seconds)
        if any("cancelled" in event.message and event.job in self._placed for event in happened):
            raise _gone(self._address, "a new one: the old one's jobs are lost")
        found = [event for event in happened for event in self._taken(event)]
        return [*found, *self._overdue(time.monotonic())]

    def _check_connected(self) -> None:
        if self._client.status != "running":
            raise _gone(self._address, f"one that is {self._client.status}")

    def _happened(self, seconds: float) -> list[Event]:
        """All that has come in; results are fetched together, for each way to the scheduler and back takes its time."""
        happened: list[Event] = []
        with contextlib.suppress(queue.Empty):
            happened.append(self._events.get(timeout=seconds))
            while True:
                happened.append(self._events.get_nowait())
        self._check_connected()
        done = {e.job for e in happened if "finished" in e.message} & set(self._placed)
        futures = {job: self._placed[job].future for job in done}
        try:
            results = self._client.gather(futures, errors="skip") if futures else {}
        except (OSError, RuntimeError, CancelledError) as e:
            raise _gone(self._address, _first_line(e) or type(e).__name__) from e
        return [self._result(e.job, results[e.job]) if e.job in results else e for e in happened]

    def _result(self, job: str, returned: dict[str, Any] | None) -> Event:
        """What a job returned; None where that was lost with its worker and could not be had again."""
        if returned is None:
            return Event(job, Outcome(FAILED, reason="its result was lost with its worker"))
        return Event(job, None, {"returned": returned})

    def close(self) -> None:
        for placed in self._placed.values():
            with contextlib.suppress(Exception):  # a scheduler that is gone holds nothing any more
                placed.future.cancel()
        with contextlib.suppress(Exception):
            self._client.close(timeout=2)
        _heard_again(self._loud)

    def _heard(self, event: tuple[float, dict[str, Any]]) -> None:
        """In the client's own thread."""
        message = dict(event[1])
        self._events.put(Event(message.pop("job"), None, message))

    def _ended(self, job: str, future: Future[Any]) -> None:
        """In a thread of the client's."""
        if future.status == "finished":
            self._events.put(Event(job, None, {"finished": True}))
        elif future.status == "error":
            self._events.put(Event(job, Outcome(FAILED, reason=_why(future.exception()))))
        else:
            self._events.put(Event(job, None, {"cancelled": True}))  # by nobody here, for those are not waited for

    def _taken(self, event: Event) -> list[Event]:
        """An event, seen to: what belongs to jobs that were given up is dropped, a bundle that lacks is sent."""
        placed = self._placed.get(event.job)
        if placed is None:
            return []
        if "begun" in event.message:
            placed.begun = time.monotonic()
            return []
        if (returned := event.message.get("returned")) is not None:
            if "lacks" in returned:
                return self._sent(placed, returned["lacks"], returned["worker"])
            event = Event(event.job, Outcome(**returned))
        if event.outcome is not None:
            del self._placed[event.job]
        return [event]

    def _sent(self, placed: _Placed, digest: str, worker: str) -> list[Event]:
        """Send a bundle to the machine of a worker, and begin the job again, on whichever worker is free then.

        The worker's loop takes the pieces, so no job waits for them or is waited for. One bundle is sent at a time, so
        the name of this client is one for its deliveries: a second try takes the place of the first.
        """
        path = placed.job.work["bundle"]
        try:
            if self._client.run(parcels.find, path, digest, workers=[worker])[worker] is None:
                self._say(f"sending {path} to {worker}")
                for offset, piece, last in _pieces(Path(path)):
                    self._client.run(parcels.receive, digest, self._topic, offset, piece, last, workers=[worker])
        except Exception as e:  # noqa: BLE001 – the worker may have died: another one is asked
            if placed.sent == _SENDS:
                del self._placed[placed.job.id]
                return [Event(placed.job.id, Outcome(FAILED, reason=f"sending {path} to {worker}: {_first_line(e)}"))]
        self.start(placed.job, placed.place)
        self._placed[placed.job.id].sent = placed.sent + 1
        return []

    def _overdue(self, now: float) -> Iterator[Event]:
        """Jobs that nobody will do: no worker has their tag, or the one that has them does not come back."""
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        there = set(_tags(self._client, self._address))
        for tag, count in Counter(placed.tag for placed in self._placed.values()).items():
            if tag in there:
                self._missing.pop(tag, None)
            elif tag not in self._missing:
                self._missing[tag] = now
                line = worker_line(self._address, tag)
                self._say(f"{count} job(s) wait for a worker with the tag {tag}; start one with: {line}")
        for placed in list(self._placed.values()):
            since = self._missing.get(placed.tag)
            if since is not None and now - since > NO_WORKER_SECONDS:
                yield self._given_up(placed, f"no worker has had the tag {placed.tag} for {NO_WORKER_SECONDS:.0f} s")
            elif placed.begun is not None and now - placed.begun > self._limit_seconds + _SLACK_SECONDS:
                yield self._given_up(placed, f"its worker has said nothing {_SLACK_SECONDS:.0f} s after the time limit")

    def _given_up(self, placed: _Placed, reason: str) -> Event:
        placed.future.cancel()
        del self._placed[placed.job.id]
        return Event(placed.job.id, Outcome(FAILED, reason=reason))


def _connected(address: str, security: Security | None) -> Client:
    """A client of a scheduler that has this package: Dask's scheduler opens what is sent to its workers."""
    if greeting := _no_greeting(address):
        raise SchedulerError(
            f"scheduler {address}", expected="a Dask scheduler", got=greeting,
            hint="`dask scheduler` prints its address; it is not that of its dashboard",
        )  # fmt: skip
    try:
        client = Client(
            address, timeout=CONNECT_SECONDS, set_as_default=False, security=security, name="rowcol-edge-fleet"
        )
    except (OSError, ValueError, TypeError, RuntimeError) as e:
        raise SchedulerError(
            f"scheduler {address}", expected="a Dask scheduler", got=_first_line(e),
            hint="start one with: dask scheduler",
        ) from e  # fmt: skip
    try:
        _tags(client, address)
    except BaseException:
        client.close(timeout=2)
        raise
    return client


def _no_greeting(address: str) -> str:
    """What is not as Dask begins; empty where all is well, and where the client itself will tell.

    Whoever is connected to is the first to speak, and says how long its greeting is (distributed.comm.tcp). Dask's
    client takes the first bytes of anything else for that length, or waits for them without end.
    """
    try:
        if parse_address(address)[0] != "tcp":  # what speaks no TLS is told by that
            return ""
        with socket.create_connection(get_address_host_port(address), timeout=CONNECT_SECONDS) as line:
            try:
                first = line.recv(8, socket.MSG_WAITALL)
            except TimeoutError:
                return f"something that says nothing for {CONNECT_SECONDS:.0f} s"
    except (OSError, ValueError):
        return ""
    greeted = len(first) == 8 and int.from_bytes(first, sys.byteorder) < _GREETING_BYTES
    return "" if greeted else f"something that says {first!r}" if first else "something that hangs up"


def _silenced() -> list[logging.Logger]:
    """Dask's loggers, quiet from here on: what is lost is told once, by the error."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "distributed"]
    loud = [logger for logger in map(logging.getLogger, names) if not logger.disabled]
    for logger in loud:
        logger.disabled = True
    return loud


def _heard_again(loud: list[logging.Logger]) -> None:
    for logger in loud:
        logger.disabled = False


def _tags(client: Client, address: str) -> list[str]:
    """The tags of all workers."""
    try:
        found: list[str] = client.run_on_scheduler(on_worker.tags, callback_timeout=ANSWER_SECONDS)
    except ImportError as e:
        raise SchedulerError(
            f"scheduler {address}", expected="the installation of this machine, on the scheduler and its workers too",
            got=_first_line(e), hint="install rowcol-edge[fleet] there, in the same version",
        ) from e  # fmt: skip
    except (OSError, TimeoutError) as e:
        raise _gone(address, _first_line(e) or f"no answer for {ANSWER_SECONDS:.0f} s") from e
    return found


def _gone(address: str, got: str) -> SchedulerError:
    hint = "what was done is written: start it again and repeat the command, which does the rest"
    return SchedulerError(f"scheduler {address} is gone", expected="a connection that holds", got=got, hint=hint)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _why(error: BaseException | None) -> str:
    """An error of Dask's: jobs answer with outcomes."""
    if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("rowcol_edge"):
        return "its worker lacks rowcol_edge; install there what is installed here"
    if type(error).__name__ == "KilledWorker":
        return "each of the workers that were given it died; out of memory? their logs and dmesg say more"
    return f"{type(error).__name__}: {_first_line(error)}" if error else "no result"


def _pieces(bundle: Path) -> Iterator[tuple[int, bytes, bool]]:
    """The .zip of a bundle: offset, bytes, and whether they are the last."""
    with tempfile.TemporaryDirectory(prefix="rowcol-edge-") as made, Bundle.open(bundle) as opened:
        packed = bundle if bundle.is_file() else zip_bundle(opened.root, Path(made, "bundle.zip"), "bundle")
        size, offset = packed.stat().st_size, 0
        with packed.open("rb") as file:
            while piece := file.read(parcels.PIECE_BYTES):
                yield offset, piece, offset + len(piece) == size
                offset += len(piece)
