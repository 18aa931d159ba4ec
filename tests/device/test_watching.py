"""Memory of another process over time."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from rowcol_edge.device.watching import MemoryWatch

MIB = 1 << 20
GROWS = """
import time
print("up", flush=True)
time.sleep(0.15)
kept = bytearray(b"x") * (48 << 20)
time.sleep(0.3)
"""


def test_a_process_that_grows_is_seen_growing() -> None:
    begin = time.monotonic_ns()
    with subprocess.Popen([sys.executable, "-c", GROWS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        with MemoryWatch().of(process.pid) as watch:
            process.wait()
    assert len(watch.times_ns) == len(watch.resident_bytes) >= 3
    assert begin < watch.times_ns[0]
    assert watch.times_ns == sorted(set(watch.times_ns))
    assert max(watch.resident_bytes) - watch.resident_bytes[0] > 40 * MIB
    # what stayed the same is kept at its begin and at its end only
    sizes = watch.resident_bytes
    assert not any(sizes[i] == sizes[i + 1] == sizes[i + 2] for i in range(len(sizes) - 2))
    assert watch.times_ns[-1] - watch.times_ns[0] > 200_000_000


def test_a_process_that_is_none_leaves_nothing() -> None:
    with MemoryWatch().of(2**22 + 1) as watch:
        pass
    assert (watch.times_ns, watch.resident_bytes) == ([], [])


def test_it_ends_with_its_block_though_the_process_goes_on() -> None:
    with MemoryWatch(period_seconds=60.0).of(os.getpid()) as watch:
        began = time.monotonic()
    assert time.monotonic() - began < 30
    assert watch.resident_bytes[0] > MIB
