"""Progress on stderr, with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def silent(what: str, done: int, total: int) -> None:
    """The progress of someone who does not watch."""


def on_stderr(interactive: bool) -> Callable[[str, int, int], None]:
    """Takes a label, the steps done and the steps in all: a line rewritten at a terminal, every tenth step in a log."""
    begun: dict[str, tuple[int, float]] = {}

    def show(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        first, start = begun.setdefault(what, (done, now))
        left = f", {(now - start) / (done - first) * (total - done):.0f} s left" if first < done < total else ""
        if interactive:
            sys.stderr.write(f"\r\x1b[K{what} {done}/{total}{left}" if done < total else "\r\x1b[K")
        elif done >= total or done % max(1, total // 10) == 0:
            sys.stderr.write(f"{what} {done}/{total}{left}\n")
        sys.stderr.flush()

    return show
