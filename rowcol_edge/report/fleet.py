"""What a fleet measured or built, as a table in a terminal and as one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..device.files import write_whole
from ..device.table import NONE, size
from ..errors import MissingDependencyError
from ..fleet.sweep import LEFT_OUT
from .sheet import Sheet
from .terminal import _console

if TYPE_CHECKING:
    from ..fleet.gather import Gathered
    from ..fleet.sweep import Cell, Sweep


def write_page(found: Gathered, bundles: Sequence[Path]) -> str:
    """Write ``report.html`` of all profiles, if there is one; a line that says where it is, or which extra makes it."""
    if not found.profiles:
        return ""
    from ..device.bundle import Bundle
    from . import page, reading

    try:
        page.check()
    except MissingDependencyError as e:
        return f"no page: {e}"
    measured = {entry.digest for entry in found.entries if entry.file}
    shown = []
    for path in bundles:
        with Bundle.open(path, check=False) as bundle:
            shown += [path] if bundle.digest in measured else []
    written = found.folder / "report.html"
    write_whole(written, page.page(reading.load(found.profiles, shown)))
    return f"page written to {written}"


def profiles(found: Gathered) -> None:
    """A row for each board and bundle; below it why what is missing was not measured."""
    console = _console()
    columns = {
        "board": [e.board for e in found.entries],
        "target": [e.target for e in found.entries],
        "bundle": [e.bundle for e in found.entries],
        "arm": [e.arm or NONE for e in found.entries],
        "latency": [e.latency or NONE for e in found.entries],
        "ratio [95 %]": [e.ratio or NONE for e in found.entries],
        "peak memory": [e.memory or NONE for e in found.entries],
        "evidence": [e.evidence or NONE for e in found.entries],
        "": [e.state for e in found.entries],
    }
    _rows(console, str(found.folder), columns, ("target", "bundle", "arm", "evidence"))
    for entry in found.entries:
        if entry.reason:
            tries = "1 try" if entry.attempts == 1 else f"{entry.attempts} tries"
            console.print(f"{entry.bundle} on {entry.board}, {tries}: {entry.reason}", soft_wrap=True)
    console.print(f"written to {found.folder}", soft_wrap=True)


def sweep(found: Sweep) -> None:
    """A row for each build; below it why what is missing was not built."""
    console = _console()
    shown = [cell for cell in found.cells if cell.state != LEFT_OUT]
    columns = {
        "model": [cell.model for cell in shown],
        "target": [cell.target for cell in shown],
        "runtime": [cell.runtime for cell in shown],
        "precision": [cell.precision for cell in shown],
        "budget": [cell.budget or "default" for cell in shown],
        "file": [size(cell.size_bytes) for cell in shown],
        "dense": [size(cell.dense_bytes) for cell in shown],
        "drop, pp [95 %]": [_drop(cell) for cell in shown],
        "": [cell.state or "not begun" for cell in shown],
    }
    _rows(console, str(found.out), columns, ("model", "target", "runtime", "precision", "budget"))
    for cell in found.cells:
        if cell.reason:
            console.print(f"{cell.name}: {cell.state}: {cell.reason}", soft_wrap=True)
    console.print(f"written to {found.out / 'sweep.json'}", soft_wrap=True)


def _rows(console: Console, title: str, columns: Mapping[str, Sequence[str]], same: Sequence[str]) -> None:
    """A table; columns of ``same`` with one value throughout stand above it, for terminals are narrow."""
    once = {name: columns[name][0] for name in same if len(set(columns[name])) == 1}
    left = {name: cells for name, cells in columns.items() if name not in once}
    console.print(" · ".join([title, *once.values()]), style="bold", soft_wrap=True)
    table = Sheet("", [(name, "l") for name in left])
    for cells in zip(*left.values(), strict=True):
        table.add_row(*cells)
    console.print(table)


def _drop(cell: Cell) -> str:
    if cell.drop_pp is None or cell.drop_low_pp is None or cell.drop_high_pp is None:
        return NONE
    return f"{cell.drop_pp:+.2f} [{cell.drop_low_pp:+.2f}, {cell.drop_high_pp:+.2f}]"
