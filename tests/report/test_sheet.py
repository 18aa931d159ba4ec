from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.text import Text

from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.inspection import Inspection, LayerUse
from rowcol_edge.pipeline import Factored
from rowcol_edge.report import terminal
from rowcol_edge.report.sheet import Sheet

NAMES = tuple(
    f"encoder.layers.encoder_layer_{layer}.self_attention.{part}.linear_projection"
    for layer in (0, 1, 11)
    for part in ("query", "key", "out")
)
REASON = "its output is constant on the calibration data"


def factored() -> None:
    layers = [
        LayerPlan(name, "project", 64, 0.98383, 2_359_296, 1_179_648, split="both", taken=1280)
        if i % 2
        else LayerPlan(name, parameters_before=2_359_296, parameters_after=2_359_296, reason=REASON)
        for i, name in enumerate(NAMES)
    ]
    plan = FactorPlan(tuple(layers))
    terminal.factored(Factored("net", torch.nn.Identity(), plan, (), 1, 1, Path("out")))


def inspected() -> None:
    shares = tuple((i + 1) / 16 for i in range(16))
    layers = [
        LayerUse(
            name, "Linear", "768×768", 589_824, 589_824, 768, 100, 700, 768, 100, 700, shares, shares, (), (), 9_999,
            384, 123_456, "",
        )
        for name in NAMES
    ]  # fmt: skip
    terminal.inspection(Inspection("net", 16, 1, 1, 1, 0, tuple(layers)))


def rows(lines: Sequence[str], second: str) -> list[tuple[str, list[str]]]:
    """The name in front of each row, put together again, and the lines of what stands beside it."""
    head = next(i for i, line in enumerate(lines) if set(line.strip()) == {"─"})
    at = lines[head - 1].index(second)
    found: list[tuple[str, list[str]]] = []
    for line in lines[head + 1 :]:
        name, beside = line[:at].strip(), line[at:].strip()
        if not name and not beside:
            break
        if name.startswith("encoder."):
            found.append((name, [beside]))
        else:
            found[-1] = found[-1][0] + name, [*found[-1][1], beside]
    return found


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize(
    ("show", "second", "numbers"),
    [
        (factored, "form", r"dense +– +– +2,359,296 +2,359,296|project.* 1280 → 64 +98\.383% +2,359,296 +1,179,648"),
        (inspected, "out×in", r"768×768 +100, 700/768 +100, 700/768 +\S{4} \S{4} +123,456"),
    ],
)
def test_long_names_fold_and_numbers_stay_whole(
    show: Callable[[], None],
    second: str,
    numbers: str,
    width: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert min(map(len, NAMES)) >= 60
    monkeypatch.setenv("COLUMNS", str(width))
    show()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    found = rows(lines, second)
    assert tuple(name for name, _ in found) == NAMES
    for _, (first, *others) in found:
        assert re.match(numbers, first)
        assert not re.search(r"\d", "".join(others))
    if width == 200:
        assert all(len(beside) == 1 for _, beside in found)


def printed(sheet: Sheet, width: int) -> list[str]:
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as said:
        console.print(sheet)
    return [line.rstrip() for line in said.get().splitlines()]


def test_what_has_room_is_left_as_it_is() -> None:
    sheet = Sheet("two", [("name", "l"), ("share", "r"), ("", "l")])
    sheet.add_row("block.0.conv", "12.5 %", "a [red] text, as it was given")
    sheet.add_row(Text("norm", "red"), "–", "")
    assert printed(sheet, 80) == [
        "two",
        "",
        " name            share",
        " " + "─" * 53,
        " block.0.conv   12.5 %   a [red] text, as it was given",
        " norm                –",
        "",
    ]


@pytest.mark.parametrize(
    ("cell", "width", "lines"),
    [
        ("the budget does not need it", 10, ["the budget", "does not", "need it"]),
        ("0.612 [0.604, 0.619] faster", 16, ["0.612", "[0.604, 0.619]", "faster"]),
        ("encoder.layer_0.query", 16, ["encoder.layer_0.", "query"]),
        ("layer1.0.conv1.weight", 10, ["layer1.0.", "conv1.", "weight"]),
        ("factored@int8-dynamic", 14, ["factored@", "int8-dynamic"]),
        ("encoder_layer_11", 9, ["encoder_", "layer_11"]),
        ("abcdefghijklmno", 11, ["abcdefghijk", "lmno"]),
        ("層の名前は長い", 7, ["層の名", "前は長", "い"]),
    ],
)
def test_where_a_cell_is_folded(cell: str, width: int, lines: list[str]) -> None:
    sheet = Sheet("", [("", "l")])
    sheet.add_row(cell)
    assert [line.strip() for line in printed(sheet, width + 2)[3:-1]] == lines


@pytest.mark.parametrize("width", range(32, 120))
def test_nothing_is_lost_at_any_width(width: int) -> None:
    cells = ("encoder.layers.encoder_layer_0.query", "0.61 [0.58, 0.66]", "2,359,296", f"in float: {NAMES[0]}, a-b")
    sheet = Sheet("", [("layer", "l"), ("ratio", "r"), ("params", "r"), ("why", "l")])
    sheet.add_row(*cells)
    lines = printed(sheet, width)
    assert max(map(len, lines)) <= width
    rule = next(i for i, line in enumerate(lines) if "─" in line)
    shown, given = (Counter("".join(texts).replace(" ", "")) for texts in (lines[rule + 1 :], cells))
    assert shown == given


@pytest.mark.parametrize(("columns", "width"), [(26, 80), (13, 30), (3, 9)])
def test_more_columns_than_fit_are_lines(columns: int, width: int) -> None:
    sheet = Sheet("many", [("", "l"), *((f"arm\n{i}", "r") for i in range(1, columns))])
    sheet.add_row("drop", *(f"0.{i:02d} pp" for i in range(1, columns)))
    sheet.add_row(Text("層", "red"), *("–" for _ in range(1, columns)))
    lines = printed(sheet, width)
    assert max(map(len, lines)) <= width
    said = "".join(line.strip() for line in lines)
    for i in range(1, columns):
        assert f"arm {i}: 0.{i:02d} pp".replace(" ", "") in said.replace(" ", "")
    assert "層" in said


def test_a_marked_cell_is_not_cut() -> None:
    sheet = Sheet("", [("", "l"), ("what", "l")])
    sheet.add_row(Text("encoder_layer_0", "red"), "a text that takes the room that there is")
    assert "".join(printed(sheet, 24)).replace(" ", "").count("…") == 0
