"""Memory of another process over time, read from outside so that it is left alone.

Resident pages by ``/proc/PID/statm``, which the kernel has counted already (proc(5)): some ten microseconds a reading.
It may lag behind by some tens of pages for each core. ``smaps_rollup``, which also knows PSS, walks the page tables and
holds the lock that the process needs to map memory, so it is left to the stages that a process reads of itself.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import TracebackType

PERIOD_SECONDS = 0.004


class MemoryWatch:
    """Reads a process every few ms from the begin of the ``with`` block, in a thread, until its end or the process'.

    ``times_ns`` are of ``time.monotonic_ns``, which all processes of a system share; ``resident_bytes`` belong to
    them. Only changes are kept, each with the last reading before it. Both are empty where the system does not tell.
    """

    def __init__(self, period_seconds: float = PERIOD_SECONDS) -> None:
        self.times_ns: list[int] = []
        self.resident_bytes: list[int] = []
        self._file = Path()
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._period_seconds = period_seconds
        self._last: tuple[int, int] | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="memory", daemon=True)

    def of(self, pid: int) -> MemoryWatch:
        """This watch, on that process."""
        self._file = Path(f"/proc/{pid}/statm")
        return self

    def _take(self) -> bool:
        """One reading; False where the process has ended (a zombie has no pages) or nothing can be read."""
        try:
            resident = int(self._file.read_bytes().split()[1]) * self._page_bytes
        except (OSError, IndexError, ValueError):
            return False
        if resident == 0:
            return False
        now = time.monotonic_ns()
        if not self.resident_bytes or resident != self.resident_bytes[-1]:
            if self._last is not None and self._last[0] != self.times_ns[-1]:
                self._keep(*self._last)
            self._keep(now, resident)
        self._last = now, resident
        return True

    def _keep(self, now: int, resident: int) -> None:
        self.times_ns.append(now)
        self.resident_bytes.append(resident)

    def _go_on(self) -> None:
        while self._take() and not self._end.wait(self._period_seconds):
            pass

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._last is not None and self._last[0] != self.times_ns[-1]:
            self._keep(*self._last)
