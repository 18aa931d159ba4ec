"""One measurement in a fresh process: the profiler starts it, sends a request on stdin and reads the result from
stdout.

What the times hold (all by ``perf_counter_ns``, all in a process that has run nothing before):

- ``import_ns``: numpy, the runtime, and this package's thin layer over it; the start of the interpreter is not in it;
- ``load_ns``: opening the artifact, with the runtime's own optimisation of it. The file lies in the page cache;
- ``first_ns``: the first inference, which allocates what later ones reuse;
- ``warmups_ns``: inferences until their median is stable; ``samples_ns``: the measurement.

Memory and energy are asked for in processes of their own: what is read for them takes time.

The feed is the first golden input at the model's batch.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, IntegrityError, MeasurementError
from . import memory, power
from .digests import Stamp, stamp

if TYPE_CHECKING:
    import numpy as np

    from .layer_times import OperatorsRun
    from .roofline import Peaks
    from .runtimes import Session
    from .runtimes.base import OperatorProfiler

TIME = "time"
MEMORY = "memory"
ENERGY = "energy"
FOOTPRINT = "footprint"
OPERATORS = "operators"
PEAKS = "peaks"

WINDOW_SAMPLES = 5
WINDOW_NS = 10_000_000
"""A warm-up window holds and lasts at least so much: five runs of 20 µs say nothing about the clock's ramp."""
TOLERANCE = 0.03
"""Two windows in a row whose medians differ by no more than this are a stable median."""
MAX_WARMUPS = 2000

MEMORY_RUNS = 10
MEMORY_SECONDS = 1.0
"""Inferences of a memory run: so many, or as many as fit in this time."""

PROFILED_INFERENCES, PROFILED_WARMUPS = 100, 50
"""The most that a runtime's own profiler records, which keeps every operator of every inference."""

SETTLE_SECONDS = 1.0
"""Between the warm-up and the idle power: the runtime's threads stop spinning, the processor's clock comes down."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a process is to do. ``batch`` gives the rows a feed takes of each golden input, 0: the whole array.

    ``inference_seconds`` is what one inference is known to take, 0 before one was measured: it gives the process more
    time, and changes nothing that it does. ``stamps`` are of the files whose digests were checked, by path: the process
    opens none that was changed since.
    """

    mode: str
    arm: str
    runtime: str
    artifact: str
    golden_inputs: str
    batch: dict[str, int]
    threads: int
    providers: tuple[str, ...] = ()
    properties: dict[str, str] = field(default_factory=dict)
    run_seconds: float = 1.0
    warmup_seconds: float = 0.3
    min_samples: int = 5
    max_samples: int = 500
    inference_seconds: float = 0.0
    stamps: dict[str, Stamp] = field(default_factory=dict)

    @property
    def expected_seconds(self) -> float:
        """For its inferences: the time it runs for, and the first, one to warm up and the fewest samples if slow."""
        return self.run_seconds + (2 + self.min_samples) * self.inference_seconds

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        try:
            values = json.loads(text)
            values["providers"] = tuple(values["providers"])
            values["stamps"] = {path: tuple(seen) for path, seen in values["stamps"].items()}
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise BundleError("worker request", expected="the JSON the profiler sends", got=str(e)) from e


@dataclass(frozen=True, slots=True)
class TimedRun:
    """``settled`` is False where a bound ended the warm-up before the median was stable."""

    runtime_version: str
    import_ns: int
    load_ns: int
    first_ns: int
    warmups_ns: tuple[int, ...]
    settled: bool
    samples_ns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MemoryRun:
    """Bytes of one process, None where the system does not tell.

    ``baseline_bytes``: interpreter, numpy, runtime and feed, nothing loaded; ``after_load_bytes``: with the artifact
    open; ``peak_bytes``: the most at any time from the baseline to the last inference, so what loading needs for a
    moment counts. ``peak_reset`` is False where the peak could not be set back and may stem from the imports.
    """

    runtime_version: str
    baseline_bytes: int | None
    after_load_bytes: int | None
    peak_bytes: int | None
    peak_reset: bool
    inference_ns: int


@dataclass(frozen=True, slots=True)
class FootprintRun:
    """Memory of one process as it goes along, and its times.

    ``imported``: interpreter, numpy, runtime and feed, nothing loaded; ``loaded``: with the artifact open; ``first``:
    after the first inference; ``steady``: after all ``inferences``. ``load_peak_bytes`` is the most while loading,
    ``run_peak_bytes`` the most from then on; None where the system does not tell or they cannot be told apart.
    ``marks_ns`` are the times of the four stages by ``time.monotonic_ns``, which all processes of a system share;
    ``curve`` is what the process that started this one read of it meanwhile.
    """

    runtime_version: str
    imported: memory.Usage
    loaded: memory.Usage
    first: memory.Usage
    steady: memory.Usage
    load_peak_bytes: int | None
    run_peak_bytes: int | None
    inferences: int
    samples_ns: tuple[int, ...]
    marks_ns: tuple[int, ...]
    curve: memory.Curve | None = None


@dataclass(frozen=True, slots=True)
class EnergyRun:
    """One process that was at rest with the artifact open, and then ran ``inferences`` one after the other for
    ``seconds``; the power of each rail in both times, which are equally long."""

    runtime_version: str
    inferences: int
    seconds: float
    rails: tuple[power.RailRun, ...]


def main(arguments: Sequence[str]) -> int:
    """``_worker``: a request on stdin, the result on stdout. What libraries print on stdout goes to stderr."""
    if arguments:
        raise BundleError("_worker", expected="no arguments (the request comes on stdin)", got=" ".join(arguments))
    request = Request.from_json(sys.stdin.read())
    sys.stdout.flush()
    out = os.dup(1)
    os.dup2(2, 1)
    result = run(request)
    with os.fdopen(out, "w", encoding="utf-8") as stream:
        json.dump(asdict(result), stream)
    return 0


def run(request: Request) -> TimedRun | MemoryRun | EnergyRun | FootprintRun | OperatorsRun | Peaks:
    """Do what a request asks for, in this process."""
    if request.mode == PEAKS:
        from . import roofline

        roofline.one_thread_a_product()
        return roofline.peaks(request.threads)
    clock = time.perf_counter_ns
    begin = clock()
    import numpy as np  # noqa: F401  the import is what is timed

    from .runtimes import RuntimeOptions, load_runtime

    runtime = load_runtime(request.runtime)
    import_ns = clock() - begin
    version = runtime.version()
    options = RuntimeOptions(request.threads, request.providers, request.properties)
    _check_unchanged(request)
    feed = _feed(request)

    def load() -> Session:
        return runtime.open(Path(request.artifact), options)

    if request.mode == ENERGY:
        return _energy(request, load, feed, version)
    if request.mode == OPERATORS:
        return _operators(request, lambda: runtime.open_profiled(Path(request.artifact), options), feed, version)
    if request.mode == FOOTPRINT:
        return _footprint(request, load, feed, version)
    measure = _memory if request.mode == MEMORY else _time
    return measure(request, load, feed, version, import_ns)


def warm_up(
    infer: Callable[[], object], limit_ns: int, clock: Callable[[], int], max_count: int = MAX_WARMUPS
) -> tuple[list[int], bool]:
    """Run ``infer`` until the medians of two windows in a row agree or a bound is met: (times in ns, settled?)."""
    times: list[int] = []
    previous: float | None = None
    start = 0
    window_ns = spent_ns = 0
    while spent_ns < limit_ns and len(times) < max_count:
        begin = clock()
        infer()
        taken = clock() - begin
        times.append(taken)
        window_ns += taken
        spent_ns += taken
        if len(times) - start < WINDOW_SAMPLES or window_ns < WINDOW_NS:
            continue
        window = sorted(times[start:])
        current = float(window[len(window) // 2])
        if previous is not None and abs(current - previous) <= TOLERANCE * previous:
            return times, True
        previous, start, window_ns = current, len(times), 0
    return times, False


def sample(
    infer: Callable[[Mapping[str, np.ndarray]], object],
    feed: Mapping[str, np.ndarray],
    limit_ns: int,
    bounds: tuple[int, int],
    clock: Callable[[], int],
) -> list[int]:
    """Times of single runs in ns, for ``limit_ns`` in all, at least and at most so many as ``bounds`` say.

    Nothing but the run lies between two readings of the clock; the garbage collector is off.
    """
    fewest, most = bounds
    times = [0] * most
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        count = 0
        end = clock() + limit_ns
        while count < most:
            begin = clock()
            infer(feed)
            now = clock()
            times[count] = now - begin
            count += 1
            if now >= end and count >= fewest:
                break
    finally:
        if collecting:
            gc.enable()
    return times[:count]


def _time(
    request: Request, load: Callable[[], Session], feed: dict[str, np.ndarray], version: str, import_ns: int
) -> TimedRun:
    clock = time.perf_counter_ns
    begin = clock()
    session = load()
    load_ns = clock() - begin
    with session:
        begin = clock()
        session.run(feed)
        first_ns = clock() - begin
        warmups, settled = warm_up(lambda: session.run(feed), int(request.warmup_seconds * 1e9), clock)
        limit_ns = max(0, int(request.run_seconds * 1e9) - sum(warmups))
        samples = sample(session.run, feed, limit_ns, (request.min_samples, request.max_samples), clock)
    return TimedRun(version, import_ns, load_ns, first_ns, tuple(warmups), settled, tuple(samples))


def _memory(
    request: Request, load: Callable[[], Session], feed: dict[str, np.ndarray], version: str, import_ns: int
) -> MemoryRun:
    gc.collect()
    baseline = memory.resident_bytes()
    reset = memory.reset_peak()
    with load() as session:
        after_load = memory.resident_bytes()
        session.run(feed)
        times = sample(session.run, feed, int(MEMORY_SECONDS * 1e9), (1, MEMORY_RUNS), time.perf_counter_ns)
        peak = memory.peak_bytes()
    return MemoryRun(version, baseline, after_load, peak, reset, sorted(times)[len(times) // 2])


def _footprint(
    request: Request, load: Callable[[], Session], feed: dict[str, np.ndarray], version: str
) -> FootprintRun:
    marks = [time.monotonic_ns()]
    imported = _usage()
    reset = memory.reset_peak()
    with load() as session:
        marks.append(time.monotonic_ns())
        loaded = _usage()
        load_peak = memory.peak_bytes() if reset else None
        reset = memory.reset_peak()
        session.run(feed)
        marks.append(time.monotonic_ns())
        first = _usage()
        warmups, _ = warm_up(lambda: session.run(feed), int(request.warmup_seconds * 1e9), time.perf_counter_ns)
        limit_ns = max(0, int(request.run_seconds * 1e9) - sum(warmups))
        bounds = (request.min_samples, request.max_samples)
        samples = sample(session.run, feed, limit_ns, bounds, time.perf_counter_ns)
        marks.append(time.monotonic_ns())
        steady = _usage()
        run_peak = memory.peak_bytes() if reset else None
    inferences = 1 + len(warmups) + len(samples)
    peaks = load_peak, run_peak
    return FootprintRun(
        version, imported, loaded, first, steady, *peaks, inferences, tuple(samples), tuple(marks)
    )  # fmt: skip


def _operators(
    request: Request, load: Callable[[], OperatorProfiler], feed: dict[str, np.ndarray], version: str
) -> OperatorsRun:
    from .layer_times import OperatorsRun

    clock = time.perf_counter_ns
    with load() as profiler:
        profiler.run(feed)
        warmups, _ = warm_up(lambda: profiler.run(feed), int(request.warmup_seconds * 1e9), clock, PROFILED_WARMUPS)
        bounds = (request.min_samples, PROFILED_INFERENCES)
        samples = sample(profiler.run, feed, int(request.run_seconds * 1e9), bounds, clock)
        found = profiler.operators()
    kept = tuple(replace(each, runs_ns=each.runs_ns[1 + len(warmups) :]) for each in found)
    if any(len(each.runs_ns) != len(samples) for each in kept):
        got = f"{len(kept[0].runs_ns)} of {kept[0].name}"
        raise MeasurementError("operators", expected=f"times of {len(samples)} inferences", got=got)
    return OperatorsRun(version, tuple(samples), kept)


def _usage() -> memory.Usage:
    gc.collect()
    return memory.usage()


def _energy(request: Request, load: Callable[[], Session], feed: dict[str, np.ndarray], version: str) -> EnergyRun:
    rails = power.rails().found
    with load() as session:
        warm_up(lambda: session.run(feed), int(request.warmup_seconds * 1e9), time.perf_counter_ns)
        time.sleep(SETTLE_SECONDS)
        with power.Recorder(rails) as idle:
            time.sleep(request.run_seconds)
        with power.Recorder(rails) as busy:
            inferences, seconds = stream(session.run, feed, request.run_seconds, time.perf_counter)
    return EnergyRun(version, inferences, seconds, power.set_against(rails, idle.samples, busy.samples))


def stream(
    infer: Callable[[Mapping[str, np.ndarray]], object],
    feed: Mapping[str, np.ndarray],
    limit_seconds: float,
    clock: Callable[[], float],
) -> tuple[int, float]:
    """Run one inference after the other for ``limit_seconds``, at least one: (how many, in how many seconds)."""
    count, begin = 0, clock()
    while True:
        infer(feed)
        count += 1
        taken = clock() - begin
        if taken >= limit_seconds:
            return count, taken


def _check_unchanged(request: Request) -> None:
    # not another digest: on a slow board it would eat up the time that is there to measure
    for path, seen in request.stamps.items():
        if stamp(Path(path)) != seen:
            hint = "leave the bundle alone while it is measured, then start again"
            raise IntegrityError(path, expected="the file whose digest was checked", got="another one", hint=hint)


def _feed(request: Request) -> dict[str, np.ndarray]:
    """The first golden input at the model's batch (rows repeat if there are fewer than that)."""
    import numpy as np

    with np.load(request.golden_inputs, allow_pickle=False) as arrays:
        missing = sorted(set(request.batch) - set(arrays.files))
        if missing:
            raise BundleError(request.golden_inputs, expected=f"an array {missing[0]!r}", got=", ".join(arrays.files))
        return {name: _rows(arrays[name], size) for name, size in request.batch.items()}


def _rows(array: Any, size: int) -> Any:
    import numpy as np

    if size == 0 or len(array) == size:
        return np.ascontiguousarray(array)
    return np.ascontiguousarray(array[np.arange(size) % len(array)])
