from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rowcol_edge
from rowcol_edge.errors import BundleError
from rowcol_edge.report import reading
from rowcol_edge.report.figures import Figures
from rowcol_edge.report.page import page

from ..profiles import MIB, MS, make_profile
from .test_page import rich_profile, written


def load(tmp_path: Path, *profiles: Any) -> Figures:
    paths = [tmp_path / f"{i}.json" for i in range(len(profiles))]
    for path, profile in zip(paths, profiles, strict=True):
        path.write_text(profile.to_json(), encoding="utf-8")
    return reading.load(paths)


def test_the_readme_lists_every_key(tmp_path: Path, root: Path) -> None:
    written(tmp_path, rich_profile())
    document = reading.load([tmp_path / "bundle/profiles/0.json"]).to_dict()
    profile = document["profiles"][0]
    arm, layer = profile["arms"][0], profile["layers"][0]
    readme = (root / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (document|`\w+\[\]`.*?) \| (.*) \|$", readme, re.MULTILINE)
    listed = {where: re.findall(r"`(\w+)`", keys) for where, keys in rows}
    operators = profile["operators"]
    measured = operators["arms"]["dense@int8"]
    timed = [operators, measured, measured["layers"][0], measured["operators"][0], operators["comparisons"][0]]
    stage, mark = arm["stages"][0], arm["memory_marks"][0]
    variant = arm["memory_variants"][0]
    found = [document, profile, profile["comparisons"][0], arm, stage, mark, variant, layer, *timed]
    assert [sorted(keys) for keys in listed.values()] == [sorted(values) for values in found]
    assert document["schema"] == 1
    assert profile["comparisons"][0].keys() == profile["null"].keys() == arm["against_original"].keys()
    assert profile["null"].keys() == arm["memory_null"].keys() == variant["latency"].keys()


def test_json_holds_the_figures_of_the_page(tmp_path: Path) -> None:
    profile = make_profile()
    (tmp_path / "p.json").write_text(profile.to_json(), encoding="utf-8")
    rowcol_edge.write_report([tmp_path / "p.json"], out=tmp_path / "r.html", json=tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["profiles"][0]
    arm = found["arms"][1]
    assert arm["median_ns"] == profile.arms["dense@int8"].latency.median_ns
    assert arm["percentiles"][5] is not None
    assert found["comparisons"][0]["ratio"] == profile.comparisons[0].ratio
    assert (arm["against_dense"], arm["quality"], found["layers"]) == (None, None, [])


def test_csv_has_a_row_an_arm_and_profile(tmp_path: Path) -> None:
    other = make_profile(target="raspberry-pi-5", evidence="emulated")
    rows = list(csv.DictReader(io.StringIO(load(tmp_path, make_profile(), other).csv())))
    assert [(row["target"], row["arm"]) for row in rows] == [
        (target, arm)
        for target in ("generic-x86", "raspberry-pi-5")
        for arm in ("factored@int8", "dense@int8", "dense@fp32")
    ]
    first, second = rows[0], rows[3]
    assert first["against_dense_verdict"] == "faster"
    assert float(first["against_dense_ci_low"]) < float(first["against_dense_ratio"]) < 0.51
    assert (first["size_bytes"], first["peak_bytes"], first["quality"]) == ("1234567", "73400320", "")
    assert (second["median_ns"], second["peak_bytes"], second["against_dense_ratio"]) == ("", "", "")


def test_settings_of_the_runtime_are_in_json_and_csv(tmp_path: Path) -> None:
    profile = rich_profile()
    arms = {**profile.arms, "dense@fp32": make_profile().arms["dense@fp32"]}
    found = load(tmp_path, replace(profile, arms=arms))
    arm = found.to_dict()["profiles"][0]["arms"][0]
    variant, twice = arm["memory_variants"]
    latency = variant.pop("latency")
    assert (twice["name"], twice["peak_change_bytes"], twice["latency"]) == ("default twice", 0, arm["memory_null"])
    assert (latency["ratio"], latency["verdict"], arm["memory_null"]["ratio"]) == (1.25, "slower", 1.0)
    assert variant == {
        "name": "no arena", "properties": {"enable_cpu_mem_arena": "0"},
        "peak_change_bytes": -2 * MIB, "resident_change_bytes": -6 * MIB, "private_change_bytes": None,
    }  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    columns = ("peak_change_bytes", "resident_change_bytes", "private_change_bytes", "ratio", "verdict")
    first, *_, without = ([row[f"no_arena_{column}"] for column in columns] for row in rows)
    assert first == [str(-2 * MIB), str(-6 * MIB), "", "1.25", "slower"]
    assert without == [""] * 5
    assert not [
        key for key in next(csv.DictReader(io.StringIO(load(tmp_path, make_profile()).csv()))) if "arena" in key
    ]


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    profile = make_profile(target="=HYPERLINK(1)", bundle="+1")
    arms = {"@a": replace(profile.arms["factored@int8"], name="@a"), **profile.arms}
    row = next(csv.DictReader(io.StringIO(load(tmp_path, replace(profile, arms=arms)).csv())))
    assert (row["target"], row["bundle"], row["arm"]) == ("'=HYPERLINK(1)", "'+1", "'@a")


def test_a_footprint_gives_the_stages(tmp_path: Path) -> None:
    stages = load(tmp_path, rich_profile()).profiles[0].arms[0].stages
    assert [stage.name for stage in stages] == ["imported", "loaded", "first", "steady", "peak"]
    assert [stage.resident_bytes and stage.resident_bytes >> 20 for stage in stages] == [50, 50, 50, 66, 90]
    assert [stage.private_bytes and stage.private_bytes >> 20 for stage in stages] == [30, 30, 30, 30, None]
    plain = load(tmp_path, make_profile()).profiles[0].arms[0].stages
    assert [stage.name for stage in plain] == ["imported", "loaded", "peak"]


def test_memory_over_time_is_that_of_one_process(tmp_path: Path) -> None:
    found = load(tmp_path, rich_profile())
    arm = found.profiles[0].arms[0]
    assert [(ns // MS, size >> 20) for ns, size in arm.memory_curve] == [
        (30, 9), (300, 50), (360, 80), (400, 66), (900, 66)
    ]  # fmt: skip
    assert [(mark.name, mark.time_ns // MS, mark.resident_bytes >> 20) for mark in arm.memory_marks] == [
        ("imported", 300, 50), ("loaded", 350, 50), ("first", 370, 80), ("steady", 880, 66), ("peak", 360, 80)
    ]  # fmt: skip
    text = page(found)
    assert "80 MiB<br>at 360 ms" in text
    assert text.count('<circle class="dot') == 5 * 3
    plain = load(tmp_path, make_profile(), replace(rich_profile(), evidence="emulated"))
    assert {arm.memory_curve for profile in plain.profiles for arm in profile.arms} == {()}
    assert "Memory over time" not in page(plain)


def test_of_several_processes_the_one_of_middle_length_is_shown(tmp_path: Path) -> None:
    profile = rich_profile()
    arm = profile.arms["factored@int8"]
    footprint = arm.footprints[0]
    curve = footprint.runs[0].curve
    assert curve is not None
    runs = tuple(
        replace(footprint.runs[0], curve=replace(curve, times_ns=(*curve.times_ns[:-1], end * MS)))
        for end in (2000, 950, 1000)
    )
    arms = {**profile.arms, "factored@int8": replace(arm, footprints=(replace(footprint, runs=runs),))}
    assert load(tmp_path, replace(profile, arms=arms)).profiles[0].arms[0].memory_curve[-1][0] == 1000 * MS


def test_arms_measured_at_different_stages_keep_to_their_columns(tmp_path: Path) -> None:
    profile = rich_profile()
    arms = {**profile.arms, "dense@int8": make_profile().arms["dense@int8"]}
    found = load(tmp_path, replace(profile, arms=arms)).profiles[0]
    assert found.stage_names == ("imported", "loaded", "first", "steady", "peak")
    row = re.search(r"dense@int8</th><td>resident</td>(.*?)</tr>", page(Figures((found,))))
    assert row
    assert re.findall(r"<td>(.*?)</td>", row[1]) == ["50 MiB", "60 MiB", "–", "–", "70 MiB"]


def test_a_profile_without_arms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="expected at least one arm, got none"):
        load(tmp_path, replace(make_profile(), arms={}))
