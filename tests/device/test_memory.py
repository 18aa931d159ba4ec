from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from rowcol_edge.device import memory

STATUS = "Name:\tpython\nVmPeak:\t  900 kB\nVmHWM:\t  345 kB\nVmRSS:\t  123 kB\nThreads:\t1\n"


def test_reads_the_kernels_own_words(tmp_path: Path) -> None:
    (tmp_path / "status").write_text(STATUS)
    assert memory.resident_bytes(tmp_path) == 123 * 1024
    assert memory.peak_bytes(tmp_path) == 345 * 1024


@pytest.mark.parametrize("text", ["", "VmRSS:\t12 MB\n", "VmRSS:\tmany kB\n", "VmRSSX:\t1 kB\n"])
def test_what_is_not_told_is_none(tmp_path: Path, text: str) -> None:
    assert memory.resident_bytes(tmp_path) is None
    (tmp_path / "status").write_text(text)
    assert memory.resident_bytes(tmp_path) is None


def test_the_page_cache_is_available(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemFree:    100 kB\nMemAvailable:    700 kB\n")
    assert memory.available_bytes(tmp_path) == 700 * 1024
    assert memory.available_bytes(tmp_path / "none") >= 4096  # free pages instead


ROLLUP = """556e44825000-7ffcb1ae6000 ---p 00000000 00:00 0                          [rollup]
Rss:                1848 kB
Pss:                 248 kB
Pss_Dirty:           116 kB
Shared_Clean:       1688 kB
Private_Clean:        44 kB
Private_Dirty:       116 kB
Private_Hugetlb:       0 kB
"""


def test_the_rollup_tells_shared_pages_apart(tmp_path: Path) -> None:
    (tmp_path / "status").write_text(STATUS)
    (tmp_path / "smaps_rollup").write_text(ROLLUP)
    assert memory.usage(tmp_path) == memory.Usage(1848 * 1024, 248 * 1024, 160 * 1024)


@pytest.mark.parametrize("rollup", [None, "", "garbage", "Rss: many kB\nPss: 1 MB\nPrivate_Clean:\t² kB\n"])
def test_without_a_rollup_there_is_the_resident_size(tmp_path: Path, rollup: str | None) -> None:
    (tmp_path / "status").write_text(STATUS)
    if rollup is not None:
        (tmp_path / "smaps_rollup").write_text(rollup)
    assert memory.usage(tmp_path) == memory.Usage(123 * 1024, None, None)
    assert memory.usage(tmp_path / "missing") == memory.Usage(None, None, None)


def test_resetting_the_peak(tmp_path: Path) -> None:
    assert memory.reset_peak(tmp_path)
    assert (tmp_path / "clear_refs").read_text() == "5"
    assert not memory.reset_peak(tmp_path / "missing")


def test_this_process_sees_its_own_peak() -> None:
    assert sys.platform == "linux"
    before = memory.peak_bytes()
    assert before is not None
    block = np.ones(200 * (1 << 20) // 8)
    del block
    after, resident = memory.peak_bytes(), memory.resident_bytes()
    assert after is not None
    assert resident is not None
    assert after - resident > 150 * (1 << 20)
