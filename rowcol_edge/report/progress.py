"""Progress of long work, on stderr so that stdout stays clean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from ..job import Progress as Callback


@contextmanager
def reporter() -> Iterator[Callback]:
    """A callback ``(label, done, total)``: a bar with an ETA on a terminal, one line per label elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield _bar(bars)


def _bar(bars: Progress) -> Callback:
    tasks: dict[str, TaskID] = {}

    def report(label: str, done: int, total: int) -> None:
        if label not in tasks:
            for earlier in tasks.values():
                bars.update(earlier, visible=False)
            tasks[label] = bars.add_task(label, total=total)
        if done == 0:
            bars.reset(tasks[label], total=total, visible=True)
        bars.update(tasks[label], completed=done, total=total, visible=True)

    return report


def _plain(console: Console) -> Callback:
    seen: set[str] = set()

    def report(label: str, done: int, total: int) -> None:
        if label not in seen:
            seen.add(label)
            console.print(f"… {label}", highlight=False, markup=False)

    return report
