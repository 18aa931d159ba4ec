from __future__ import annotations

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
    ("threads", "free_mib", "mib"), [(2, 4096, 64), (4, 200, 12), (4, 1, 1), (1, 0, 1)], ids=["much", "some", "no", "0"]
)
def test_a_small_board_copies_less(threads: int, free_mib: int, mib: int) -> None:
    assert roofline.copy_bytes(threads, free_mib << 20) == mib << 20


def test_a_process_of_its_own_measures_with_as_many_threads() -> None:
    request = Request(PEAKS, "dense@fp32", "onnxruntime", "", "", {}, 1)
    found = Processes({}, 120.0).peaks(request, "peaks")
    assert found.threads == 1
    # from a Raspberry Pi Zero to a server, one core
    assert 1e8 < found.bytes_per_second < 1e12
    assert 1e7 < found.macs_per_second < 1e12
