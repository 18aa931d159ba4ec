from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rowcol_edge.device import roofline
from rowcol_edge.device.processes import Processes
from rowcol_edge.device.roofline import COMPUTE, MEMORY, Peaks, bound
from rowcol_edge.device.worker import PEAKS, Request

MACHINE = Peaks(2e9, 10e9, 1, "made up")


def test_a_layer_is_bound_by_what_takes_longer() -> None:
    few = bound(1_000, 1_000, MACHINE)  # 0.1 µs of work, 0.5 µs of bytes
    assert few is not None
    assert (few.kind, few.least_ns, few.intensity) == (MEMORY, pytest.approx(500), 1.0)
    many = bound(20_000, 1_000, MACHINE)
    assert many is not None
    assert (many.kind, many.least_ns, many.intensity) == (COMPUTE, pytest.approx(2_000), 20.0)


def test_of_two_measurements_the_best_counts() -> None:
    found = roofline.higher(MACHINE, Peaks(1e9, 12e9, 1, "made up"))
    assert (found.bytes_per_second, found.macs_per_second, found.threads) == (2e9, 12e9, 1)


@pytest.mark.parametrize("traffic", [None, 0])
def test_without_bytes_there_is_no_bound(traffic: int | None) -> None:
    assert bound(1_000, traffic, MACHINE) is None


def test_the_best_run_counts_and_there_are_at_least_three() -> None:
    times = iter([0.0, 0.0, 5.0, 5.0, 7.0, 7.0, 10.0, 11.0])
    assert roofline._best(lambda: None, 0.0, lambda: next(times)) == 2.0


@pytest.mark.parametrize(
    ("threads", "available_mib", "mib"),
    [(2, 4096, 64), (4, 200, 12), (4, 1, 1), (1, 0, 1)],
    ids=["much", "some", "no", "0"],
)
def test_a_small_board_copies_less(threads: int, available_mib: int, mib: int) -> None:
    assert roofline.copy_bytes(threads, available_mib << 20, 0) == mib << 20


@pytest.mark.parametrize(("threads", "cache_mib", "mib"), [(1, 32, 128), (2, 32, 64), (2, 256, 512), (4, 4096, 1024)])
def test_large_caches_make_it_copy_more(threads: int, cache_mib: int, mib: int) -> None:
    assert roofline.copy_bytes(threads, 16 << 30, cache_mib << 20) == mib << 20


def cpu(root: Path, number: int, *caches: tuple[int, str, str, str]) -> None:
    """With its caches: level, type, size and the processors that share it."""
    for i, values in enumerate(caches):
        index = root / f"cpu{number}/cache/index{i}"
        index.mkdir(parents=True)
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
            (index / name).write_text(f"{value}\n")


def test_the_last_level_caches_that_threads_can_reach_add_up(tmp_path: Path) -> None:
    for number, shared in ((0, "0-1"), (1, "0-1"), (2, "2")):
        own = [(1, "Data", "32K", str(number)), (1, "Instruction", "64K", str(number))]
        cpu(tmp_path, number, *own, (2, "Unified", "1024K", shared))
    assert roofline.cache_bytes(1, tmp_path) == 1 << 20
    assert roofline.cache_bytes(2, tmp_path) == roofline.cache_bytes(3, tmp_path) == 2 << 20
    assert roofline.cache_bytes(1, tmp_path / "none") == 0


@pytest.mark.parametrize(("cache_mib", "said"), [(4, False), (8, True), (64, True)])
def test_arrays_that_a_cache_may_hold_are_told(monkeypatch: pytest.MonkeyPatch, cache_mib: int, said: bool) -> None:
    """Memory for arrays of 8 MiB, one thread."""
    monkeypatch.setattr(roofline.memory, "available_bytes", lambda: 32 << 20)
    monkeypatch.setattr(roofline, "cache_bytes", lambda threads: cache_mib << 20)
    method = roofline.peaks(1, 0.0).method
    assert method.startswith("numpy: 8 MiB copied a thread")
    assert (f"which caches of {cache_mib} MiB may hold: not the memory's" in method) == said


def test_each_thread_multiplies_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one of them is held up by is not the other's."""
    held_up = {}

    def best(do: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
        do()
        everyone.wait(10.0)
        return held_up.setdefault(threading.get_ident(), 2e-3 * (len(held_up) + 1))

    everyone = threading.Barrier(3)
    monkeypatch.setattr(roofline, "_best", best)
    found = roofline._multiplying(3, 0.0, time.perf_counter)
    assert sorted(found) == [2e-3, 4e-3, 6e-3]


def test_a_process_of_its_own_measures_with_as_many_threads() -> None:
    request = Request(PEAKS, "dense@fp32", "onnxruntime", "", "", {}, 1)
    found = Processes({}, 120.0).peaks(request, "peaks")
    assert found.threads == 1
    # from a Raspberry Pi Zero to a server, one core
    assert 1e8 < found.bytes_per_second < 1e12
    assert 1e7 < found.macs_per_second < 1e12
