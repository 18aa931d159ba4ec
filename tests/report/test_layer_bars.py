from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rowcol_edge.device.profile import Profile
from rowcol_edge.report import reading
from rowcol_edge.report.figures import ProfileFigures
from rowcol_edge.report.layer_bars import LEFT, OPERATORS, RIGHT, SHOWN, bars, by_operator, table
from rowcol_edge.report.page import page

from ..profiles import MS, make_operators, make_profile, with_arms


def figures(folder: Path, profile: Profile) -> ProfileFigures:
    (folder / "p.json").write_text(profile.to_json(), encoding="utf-8")
    return reading.load([folder / "p.json"]).profiles[0]


def test_the_default_arm_stands_beside_the_dense_one_of_its_precision(tmp_path: Path) -> None:
    found = table(figures(tmp_path, make_profile(operators=make_operators(), operators_note="")))
    assert found is not None
    assert found.arms == ((2, "dense@int8"), (1, "factored@int8"))  # with the numbers that they have in the report
    assert [row.layer for row in found.rows] == ["body.0", "body.1", "body.2"]
    first, last = found.rows[0].comparison, found.rows[2].comparison
    assert first is not None
    assert last is not None
    assert (first.verdict, first.ratio) == ("won", pytest.approx(0.5))
    assert (last.verdict, last.ratio) == ("no verdict", pytest.approx(1.0))
    assert "factored@int8 against dense@int8: 2 won, 0 lost, 1 without verdict." in page(
        reading.load([tmp_path / "p.json"])
    )


def test_bars_are_as_long_as_their_times(tmp_path: Path) -> None:
    found = table(figures(tmp_path, make_profile(operators=make_operators(), operators_note="")))
    assert found is not None
    drawn = bars(found)
    assert [row.label for row in drawn.rows] == ["body.0", "body.1", "body.2", "elsewhere"]
    dense, factored = drawn.rows[0].bars
    assert (dense.end - LEFT) == pytest.approx(2 * (factored.end - LEFT), abs=0.2)
    assert dense.low < dense.end < dense.high
    assert [bar.number for bar in drawn.rows[0].bars] == [2, 1]
    assert drawn.rows[0].said == "body.0: dense@int8 1.02 ms; factored@int8 0.512 ms"
    places = [bar.y for row in drawn.rows for bar in row.bars]
    assert places == sorted(set(places))
    assert places[-1] + 8 < drawn.height


def test_one_interrupted_process_does_not_make_all_bars_short(tmp_path: Path) -> None:
    operators = make_operators()
    dense = operators.arms["dense@int8"]
    first = dense.layers[0]
    late = replace(first, rounds_ns=(*first.rounds_ns[:5], 90.0 * MS))
    arms = {**operators.arms, "dense@int8": replace(dense, layers=(late, *dense.layers[1:]))}
    found = table(figures(tmp_path, make_profile(operators=with_arms(operators, arms), operators_note="")))
    assert found is not None
    drawn = bars(found)
    assert drawn.rows[0].bars[0].high == RIGHT
    assert drawn.rows[0].bars[0].end - LEFT == pytest.approx((RIGHT - LEFT) / 2, abs=0.2)
    assert drawn.description.endswith("Lines that end at the right go on beyond it.")


def test_a_long_name_is_cut_in_the_picture_alone(tmp_path: Path) -> None:
    operators = make_operators()
    long = "encoder." * 12 + "query"
    arms = {
        name: replace(arm, layers=(replace(arm.layers[0], layer=long), *arm.layers[1:]))
        for name, arm in operators.arms.items()
    }
    found = table(figures(tmp_path, make_profile(operators=with_arms(operators, arms), operators_note="")))
    assert found is not None
    [row] = [row for row in bars(found).rows if row.said.startswith(long)]
    assert len(row.label) == 41
    assert row.label.endswith("encoder.query")
    assert long in page(reading.load([tmp_path / "p.json"]))


def test_many_layers_are_drawn_in_part_and_tabled_in_full(tmp_path: Path) -> None:
    found = table(figures(tmp_path, make_profile(operators=make_operators(layers=40), operators_note="")))
    assert found is not None
    drawn = bars(found)
    assert (len(found.rows), len(drawn.rows)) == (40, SHOWN + 1)
    assert drawn.description.endswith(f"{40 - SHOWN} more layers in the table.")


def test_an_arm_without_a_dense_one_stands_alone(tmp_path: Path) -> None:
    profile = make_profile(operators=make_operators(["factored@int8"]), operators_note="")
    found = table(figures(tmp_path, profile))
    assert found is not None
    assert found.arms == ((1, "factored@int8"),)
    assert "Time by layer" in page(reading.load([tmp_path / "p.json"]))


def test_a_layer_that_one_arm_lacks_has_no_time_there(tmp_path: Path) -> None:
    operators = make_operators()
    dense = operators.arms["dense@int8"]
    arms = {**operators.arms, "dense@int8": replace(dense, layers=dense.layers[1:])}
    profile = make_profile(operators=with_arms(operators, arms), operators_note="")
    found = table(figures(tmp_path, profile))
    assert found is not None
    assert [(row.layer, row.times[0] is None) for row in found.rows if row.times[0] is None] == [("body.0", True)]
    [drawn] = [row for row in bars(found).rows if row.label == "body.0"]
    assert drawn.bars[0].end == LEFT < drawn.bars[1].end


def test_the_operators_that_take_longest_are_drawn_and_tabled_for_each_arm(tmp_path: Path) -> None:
    found = by_operator(figures(tmp_path, make_profile(operators=make_operators(layers=20), operators_note="")))
    assert [(each.number, each.arm) for each in found] == [(1, "factored@int8"), (2, "dense@int8"), (3, "dense@fp32")]
    dense = found[1]
    assert len(dense.rows) == len(dense.bars.rows) == OPERATORS
    assert dense.bars.description.endswith(f"{21 - OPERATORS} more in the profile's JSON.")
    assert [operator.name for operator, _ in dense.rows[:2]] == ["body.0_nchwc", "body.1_nchwc"]
    whole = sum(1 / (i + 1) for i in range(20)) + 0.1 / 1.025
    assert dense.rows[0][1] == pytest.approx(1 / whole)
    first, second = (row.bars[0].end - LEFT for row in dense.bars.rows[:2])
    assert first == pytest.approx(2 * second, abs=0.2)
    assert dense.bars.rows[0].said == "body.0_nchwc, Conv: 1.02 ms"
    text = page(reading.load([tmp_path / "p.json"]))
    assert text.count("<h3>Time by operator</h3>") == 1
    assert "Time by operator, dense@fp32" in text


def test_an_operators_name_is_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert('x')</script>"
    operators = make_operators()
    dense = operators.arms["dense@int8"]
    renamed = tuple(replace(each, name=hostile, kind=hostile, layer=hostile) for each in dense.operators)
    arms = {**operators.arms, "dense@int8": replace(dense, operators=renamed)}
    figures(tmp_path, make_profile(operators=with_arms(operators, arms), operators_note=""))
    text = page(reading.load([tmp_path / "p.json"]))
    assert "&lt;script&gt;" in text
    assert "<script" not in text


def test_why_there_is_none_is_said_where_it_was_asked_for(tmp_path: Path) -> None:
    for note, said in (("tflite has no profiler", True), ("not asked for", False)):
        found = figures(tmp_path, make_profile(operators_note=note))
        assert table(found) is None
        assert (f"Not measured: {note}." in page(reading.load([tmp_path / "p.json"]))) is said


def test_an_emulators_times_are_left_out(tmp_path: Path) -> None:
    found = figures(tmp_path, make_profile(evidence="emulated", operators=make_operators(), operators_note=""))
    assert table(found) is None


def test_the_json_has_them(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(make_profile(operators=make_operators(), operators_note="").to_json())
    document = reading.load([tmp_path / "p.json"]).to_dict()
    operators = document["profiles"][0]["operators"]
    assert operators["peaks"]["bytes_per_second"] == 8e9
    assert operators["arms"]["dense@int8"]["layers"][0]["ns"] == pytest.approx(1.025 * MS)
    assert operators["comparisons"][0]["verdict"] == "won"
