"""A table in a terminal that can be read where it does not fit: names and texts are folded, and numbers stay whole as
long as there is room."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_SHORT = 10  # characters: a column that needs no more is not folded
_LEAST = 5  # of each column, before others get more
_NARROW = 2  # characters a column, as wide ones take two: with less there is no table
# Where a cell is folded, the best place first: between words, though not inside an interval; behind a part of a name or
# path, though not inside a number; behind a part of a word; anywhere. Nothing is cut off, because two layers may differ
# in any part of their names.
_FOLDS = (r"(?<= )(?![^[]*])", r"(?<=[./@])(?:(?<!\d.)|(?!\d))", r"(?<=\w[_-])|(?<= )", r"")


class Sheet:
    """Rows under headings; beside each heading ``l`` for names and texts, set on the left, or ``r`` for numbers.

    The first column names the row.
    """

    def __init__(self, title: str, columns: Sequence[tuple[str, str]]) -> None:
        self._title = title
        self._columns = columns
        self._rows: list[tuple[str | Text, ...]] = []

    def add_row(self, *cells: str | Text) -> None:
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        gaps = 3 * len(self._columns) - 1  # three between two columns in this box, one at each edge
        room = options.max_width - gaps
        if room < _NARROW * len(self._columns):
            yield from self._records()
            return
        table = Table(title=self._title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
        widths = self._widths(room)
        for (heading, side), width in zip(self._columns, widths, strict=True):
            table.add_column(
                _folded(heading, width), justify="right" if side == "r" else "left", width=width, overflow="fold"
            )
        for cells in self._rows:
            table.add_row(*(_folded(cell, width) for cell, width in zip(cells, widths, strict=True)))
        yield table

    def _records(self) -> Iterator[Text]:
        """A line a cell, where not even a few letters of each column fit beside each other."""
        yield Text(self._title, "bold")
        for cells in self._rows:
            yield Text()
            for (heading, _), cell in zip(self._columns, cells, strict=True):
                yield Text(f"{' '.join(heading.split())}: " if heading else "", overflow="fold").append(cell)

    def _widths(self, room: int) -> list[int]:
        """How wide each column is, all together ``room`` at most."""
        columns = list(zip([heading for heading, _ in self._columns], *self._rows, strict=True))
        whole = [_longest(column, "\n") for column in columns]
        parts = [
            each if each <= _SHORT else _longest(column, f"\n|{_FOLDS[0]}|{_FOLDS[1]}")
            for each, column in zip(whole, columns, strict=True)
        ]
        least, *more = ([min(each, size) for each in parts] for size in range(_LEAST, _SHORT + 1))
        numbers = [
            max(each, _longest(column[1:], "\n")) if side == "r" else each
            for each, column, (_, side) in zip(least, columns, self._columns, strict=True)
        ]
        widths = [1] * len(columns)
        # What matters most comes first, and what there is no room for is left out: some letters of all columns, whole
        # numbers, more letters, words and parts of names in the first column, then in all.
        for need in least, numbers, *more, [parts[0], *least[1:]], parts:
            met = [max(pair) for pair in zip(widths, need, strict=True)]
            widths = met if sum(met) <= room else widths
        # What is left goes by the root of the length: equal widths would leave a long text narrow, and widths by the
        # length itself would fold all names for one long text.
        while sum(widths) < room and (lacking := [i for i, width in enumerate(widths) if width < whole[i]]):
            widths[max(lacking, key=lambda i: whole[i] / widths[i] ** 2)] += 1
        return widths


def _longest(cells: Sequence[str | Text], folds: str) -> int:
    return max((_width(piece) for cell in cells for piece in re.split(folds, str(cell))), default=0)


def _folded(cell: str | Text, width: int) -> str | Text:
    if isinstance(cell, Text):
        return cell
    return "\n".join(line.rstrip() for given in cell.split("\n") for line in _lines(given, width, _FOLDS))


def _lines(text: str, width: int, folds: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for piece in re.split(folds[0], text):
        if lines and _width(lines[-1] + piece) <= width:
            lines[-1] += piece
        elif _width(piece) <= width or len(folds) == 1:
            lines.append(piece)
        else:
            lines += _lines(piece, width, folds[1:])
    return lines


def _width(text: str) -> int:
    return cell_len(text.rstrip())
