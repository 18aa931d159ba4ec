"""The picture of an inspection: what stands in it, and that it stands by itself."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from rowcol_edge.errors import ConfigError
from rowcol_edge.inspection import Inspection, LayerUse
from rowcol_edge.report import spectra

LAYER = LayerUse(
    name="body.conv",
    kind="conv1d",
    shape="8×4 3",
    parameters=104,
    macs=1000,
    row_size=4,
    row_rank_99=2,
    row_rank_999=3,
    column_size=8,
    column_rank_99=3,
    column_rank_999=5,
    row_spectrum=(),
    column_spectrum=(),
    row_curve=((1, 0.8), (2, 0.99), (3, 0.9995), (4, 1.0)),
    column_curve=((1, 0.5), (3, 0.993), (5, 0.9999), (8, 1.0)),
    rows=100,
    break_even=4,
    saves_parameters=10,
    note="",
)
SKIPPED = replace(
    LAYER, name="<head>", row_rank_99=None, row_rank_999=None, column_rank_99=None, column_rank_999=None,
    row_curve=(), column_curve=(), rows=None, note="too small & tied", break_even=0,
    fixed="too small & tied",
)  # fmt: skip
DEPTHWISE = replace(LAYER, name="deep", break_even=0, note="depthwise", fixed="depthwise")
CONSTANT = replace(LAYER, name="still", column_rank_99=0, column_rank_999=0, column_curve=())


def _page(*layers: LayerUse) -> str:
    return spectra.page(Inspection("net.py:<build>", 12, 5000, 2_000_000, 10, 1, layers))


def test_two_curves_and_their_utilised_ranks() -> None:
    page = _page(LAYER)
    assert "conv1d 8×4 3" in page
    assert "row 2, 3 of 4, column 3, 5 of 8" in page
    for said in (
        "row space: 2 of 4 directions hold 99 %",
        "row space: 3 of 4 directions hold 99.9 %",
        "column space: 3 of 8 directions hold 99 %",
        "column space: 5 of 8 directions hold 99.9 %",
        "break-even rank: 4 of 8",
    ):
        assert page.count(f"<title>{said}</title>") == 1
    dots = re.findall(r'circle class="(\w+)" cx="([\d.]+)" cy="([\d.]+)"', page)
    curves = {name: points.split() for name, points in re.findall(r'polyline class="(\w+)" points="([^"]+)"', page)}
    assert [name for name, _, _ in dots] == ["row", "row", "column", "column"]
    assert all(f"{x},{y}" in curves[name] for name, x, y in dots)
    for points in curves.values():
        xs, ys = zip(*(map(float, point.split(",")) for point in points), strict=True)
        assert list(xs) == sorted(xs)
        assert list(ys) == sorted(ys, reverse=True)  # upwards is less in SVG


def test_levels_are_nines_apart() -> None:
    page = _page(replace(LAYER, row_curve=((2, 0.99), (3, 0.999), (4, 1.0))))
    points = re.search(r'polyline class="row" points="([^"]+)"', page)
    assert points is not None
    ys = [float(point.split(",")[1]) for point in points[1].split()]
    assert ys[0] - ys[1] == pytest.approx(2 * (ys[1] - ys[2]), abs=0.2)
    assert ys[1] - ys[2] == pytest.approx(ys[2] - ys[3], abs=0.2)


def test_layers_without_a_spectrum_and_names_are_shown_as_they_are() -> None:
    page = _page(LAYER, SKIPPED, CONSTANT, DEPTHWISE)
    assert page.count("<svg") == 3
    assert page.count("break-even rank:") == 2
    assert "<li>deep: depthwise</li>" in page
    assert "<li>&lt;head&gt;: too small &amp; tied</li>" in page
    assert page.count("<polyline") == 5
    assert "column 0, 0 of 8" in page
    assert "<h1>net.py:&lt;build&gt;</h1>" in page


def test_a_long_name_keeps_its_end() -> None:
    page = _page(replace(LAYER, name="a" * 40 + ".last"))
    assert f">…{'a' * 28}.last<title>" in page
    assert f"<title>{'a' * 40}.last</title>" in page


def test_the_file_loads_nothing_and_is_the_same_again(tmp_path: Path) -> None:
    found = Inspection("net", 12, 5000, 2_000_000, 10, 1, (LAYER,))
    path = tmp_path / "spectra.html"
    path.write_text("earlier", encoding="utf-8")
    spectra.check(path)
    spectra.write(found, path)
    text = path.read_text(encoding="utf-8")
    assert text == spectra.page(found)
    assert not re.search(r"https?:|src=|<script|@import|url\(", text)
    assert [file.name for file in tmp_path.iterdir()] == ["spectra.html"]


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.html, got \.png"):
        spectra.check(tmp_path / "spectra.png")
    with pytest.raises(ConfigError, match="expected an existing folder"):
        spectra.check(tmp_path / "none" / "spectra.html")
