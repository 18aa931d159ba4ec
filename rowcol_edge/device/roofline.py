"""What this machine's memory and arithmetic give at most, by numpy, and what that lets a layer reach.

A roofline (Williams, Waterman & Patterson, "Roofline: an insightful visual performance model", CACM 52, 2009): a layer
takes at least the time of its multiply-accumulates at the peak, and at least that of its bytes at the bandwidth. The
longer of the two is what binds it. Both peaks are measured, not those of a data sheet:

- bandwidth: arrays of 64 MiB, more where the caches are large and less where memory is short, copied, one a thread,
  bytes read and written counted; what the processor reads besides, to write, is not. A layer whose data lie in a cache
  can be faster than that.
- arithmetic: products of float32 matrices by numpy's BLAS, one in each thread, and the shortest of each: threads that
  share a product wait for one another, which beside other work takes many times as long. Kernels in int8 can be faster
  than that: then the fraction reached is over 100 %.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import memory, sysfs

SECONDS = 1.0
"""For each of the two; the best run counts."""
_COPY_BYTES = 64 << 20
"""All of them together take half of what is available at most."""
_CACHES = 4
"""How many times the last-level caches the arrays that are read should take together (McCalpin, STREAM's run rules)."""
_CPUS = Path("/sys/devices/system/cpu")
_SIZE = 512
"""Rows and columns of the matrices: large for a cache of the first level, small for a board's memory."""
_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")
MEMORY, COMPUTE = "memory", "compute"


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of ``threads`` together: bytes read and written, and float32 multiply-accumulates, a second."""

    bytes_per_second: float
    macs_per_second: float
    threads: int
    method: str


def higher(one: Peaks, other: Peaks) -> Peaks:
    """The best of two measurements: what else a machine does can only lower them."""
    return replace(
        one,
        bytes_per_second=max(one.bytes_per_second, other.bytes_per_second),
        macs_per_second=max(one.macs_per_second, other.macs_per_second),
    )


@dataclass(frozen=True, slots=True)
class Bound:
    """The least time that the peaks allow, and which of them: MEMORY or COMPUTE. ``intensity``: MACs a byte."""

    least_ns: float
    kind: str
    intensity: float


def bound(macs: int, traffic_bytes: int | None, peaks: Peaks) -> Bound | None:
    """Of a layer; None where its bytes are not known, or there is nothing to do."""
    if not traffic_bytes:
        return None
    reading, working = traffic_bytes / peaks.bytes_per_second, macs / peaks.macs_per_second
    return Bound(1e9 * max(reading, working), MEMORY if reading > working else COMPUTE, macs / traffic_bytes)


def one_thread_a_product() -> None:
    """Before numpy is imported: its BLAS reads how many threads to start when it is loaded."""
    os.environ.update(dict.fromkeys(_VARIABLES, "1"))


def peaks(threads: int, seconds: float = SECONDS, clock: Callable[[], float] = time.perf_counter) -> Peaks:
    """Measure both in this process, see `one_thread_a_product`. MemoryError: not enough for the arrays."""
    cache = cache_bytes(threads)
    size = copy_bytes(threads, memory.available_bytes(), cache)
    copying = _copying(size, threads, seconds, clock)
    working = _multiplying(threads, seconds, clock)
    # too little memory for more: what is copied may never leave the cache
    within = f", which caches of {cache >> 20} MiB may hold: not the memory's" if threads * size <= cache else ""
    method = f"numpy: {size >> 20} MiB copied a thread{within}; float32 products of {_SIZE}×{_SIZE} matrices"
    return Peaks(2 * threads * size / copying, sum(_SIZE**3 / each for each in working), threads, method)


def copy_bytes(threads: int, available_bytes: int, cache: int) -> int:
    """For each of two arrays a thread, whole MiB."""
    wanted = max(_COPY_BYTES, _CACHES * cache // threads)
    return max(1 << 20, min(wanted, available_bytes // (4 * threads)) >> 20 << 20)


def cache_bytes(threads: int, cpus: Path = _CPUS) -> int:
    """What the last-level caches hold that so many threads can reach; 0 where the system does not tell."""
    found: dict[tuple[int, str], int] = {}
    for index in cpus.glob("cpu[0-9]*/cache/index*"):
        level, size = sysfs.number(index / "level"), re.fullmatch(r"(\d+)K", sysfs.text(index / "size").strip())
        if level and size and sysfs.text(index / "type").strip() != "Instruction":
            found[level, sysfs.text(index / "shared_cpu_list").strip()] = int(size[1]) << 10
    last = max((level for level, _ in found), default=0)
    return sum(sorted((size for (level, _), size in found.items() if level == last), reverse=True)[:threads])


def _copying(size: int, threads: int, seconds: float, clock: Callable[[], float]) -> float:
    """Seconds for a copy in each thread at the same time."""
    import numpy as np

    sources = [np.ones(size, np.uint8) for _ in range(threads)]
    targets = [np.zeros_like(source) for source in sources]
    with ThreadPoolExecutor(threads) as pool:
        return _best(lambda: list(pool.map(np.copyto, targets, sources)), seconds, clock)


def _multiplying(threads: int, seconds: float, clock: Callable[[], float]) -> list[float]:
    """Seconds for a product in each thread, all at work at the same time."""
    import numpy as np

    factor = np.random.default_rng(0).standard_normal((_SIZE, _SIZE)).astype(np.float32)

    def multiply(out: np.ndarray[Any, np.dtype[np.float32]]) -> float:
        return _best(lambda: np.matmul(factor, factor, out=out), seconds, clock)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(multiply, [np.empty_like(factor) for _ in range(threads)]))


def _best(do: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    """The shortest run of those that fit, at least three."""
    best, count, end = float("inf"), 0, clock() + seconds
    while count < 3 or clock() < end:
        begin = clock()
        do()
        best, count = min(best, clock() - begin), count + 1
    return best
