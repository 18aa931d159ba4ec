from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.manifest import GRAPH_CHECKED
from rowcol_edge.device.profile import MemoryBudget, Profile, RailEnergy
from rowcol_edge.errors import BundleError, NotComparableError
from rowcol_edge.report.compare import best_profile, compare

from ..profiles import ENVIRONMENT, FakeBundle, make_manifest, make_profile


def bundle(root: Path, *profiles: Profile, **changes: Any) -> Bundle:
    return cast(Bundle, FakeBundle(root, make_manifest(**changes), *profiles))


def test_a_profiled_bundle(tmp_path: Path) -> None:
    table = compare([bundle(tmp_path / "b", make_profile())])
    rows = {row[2]: dict(zip(table.columns(), row, strict=True)) for row in table.rows()}
    assert list(rows) == ["factored@int8", "dense@int8", "dense@fp32"]
    row = rows["factored@int8"]
    assert (row["target"], row["bundle"], row["parameters"], row["size"]) == ("generic-x86", "b", "1,000", "4 kB")
    assert (row["accuracy"], row["drop, 95 %"]) == ("0.9000", "+0.25 pp [-0.10, +0.60]")
    assert row["ratio to dense, same precision"].endswith("] faster")
    assert row["ratio to dense@fp32"].startswith("0.2")
    assert (row["cold start"], row["peak memory"], row["evidence"]) == ("329 ms", "70 MiB", "target")
    assert rows["dense@int8"]["ratio to dense, same precision"] == "–"
    assert rows["dense@fp32"]["ratio to dense@fp32"] == "–"
    assert len(table.notes) == 1
    assert (
        "target, measured on Some Core; onnxruntime 1.20, 2 thread(s); null arm (dense@int8 twice) 1.0"
        in table.notes[0]
    )


def test_a_bundle_without_a_profile_shows_what_is_known_and_how_to_get_the_rest(tmp_path: Path) -> None:
    table = compare([bundle(tmp_path / "b")])
    assert table.rows()[0][3:] == ("1,000", "4 kB", "0.9000", "+0.25 pp [-0.10, +0.60]", "–", "–", "–", "–", "–", "–")
    assert table.notes == (f"{tmp_path / 'b'} has no profile of this build: rowcol-edge profile {tmp_path / 'b'}",)


def test_profiles_of_another_build_and_damaged_ones_are_left_out_by_name(tmp_path: Path) -> None:
    one = bundle(tmp_path / "b", make_profile(digest="ef" * 32))
    (tmp_path / "b/profiles/1.json").write_text("{}")
    found, notes = best_profile(one)
    assert found is None
    assert notes[0].endswith("0.json left out, it measured another build")
    assert "1.json left out, 1.json.schema: expected 3 or 4" in notes[1]
    assert "has no profile of this build" in compare([one]).notes[-1]


def test_the_newest_profile_of_the_strongest_evidence_is_taken(tmp_path: Path) -> None:
    profiles = [
        make_profile(created="2026-01-01T00:00:00Z"),
        make_profile(created="2026-01-02T00:00:00Z"),
        make_profile(created="2026-01-03T00:00:00Z", evidence="proxy"),
    ]
    found, notes = best_profile(bundle(tmp_path / "b", *profiles))
    assert found == profiles[1]
    assert notes == []


def test_a_newer_profile_of_a_few_arms_or_other_threads_stands_behind_a_whole_one(tmp_path: Path) -> None:
    whole = make_profile()
    few = make_profile(levels_ms={"factored@int8": 2.0, "dense@int8": 4.0}, created="2026-01-03T00:00:00Z")
    other = make_profile(threads=64, created="2026-01-04T00:00:00Z")
    one = bundle(tmp_path / "b", whole, few, other)
    found, notes = best_profile(one)
    assert found == whole
    assert notes == [
        f"{tmp_path / 'b'}: 1.json left out, newer but with 2 of 3 arms, 2 thread(s)",
        f"{tmp_path / 'b'}: 2.json left out, newer but with 3 of 3 arms, 64 thread(s)",
    ]
    assert compare([one]).notes[:2] == tuple(notes)
    again = make_profile(created="2026-01-05T00:00:00Z")
    assert best_profile(bundle(tmp_path / "b", whole, few, other, again)) == (again, [])
    assert best_profile(bundle(tmp_path / "c", few, other))[0] == few


def test_a_machine_with_fewer_cores_than_the_target_has_threads_measures_with_its_cores(tmp_path: Path) -> None:
    runtime = replace(make_manifest().runtime, threads=4)
    profiles = make_profile(), make_profile(threads=1, created="2026-01-03T00:00:00Z")
    assert ENVIRONMENT.cores_usable == 2
    assert best_profile(bundle(tmp_path / "b", *profiles, runtime=runtime))[0] == profiles[0]


def test_quality_of_the_selection_split_says_so(tmp_path: Path) -> None:
    manifest = make_manifest()
    arms = tuple(
        replace(arm, quality={"selection": {"metric": "accuracy", "value": 0.8, "n": 9}}) for arm in manifest.arms
    )
    table = compare([cast(Bundle, FakeBundle(tmp_path / "b", replace(manifest, arms=arms)))])
    assert table.rows()[0][5:7] == ("0.8000 (selection)", "–")


def test_an_arm_that_never_ran_is_labelled_until_the_board_has_measured_it(tmp_path: Path) -> None:
    manifest = make_manifest()
    arms = tuple(replace(arm, checked=GRAPH_CHECKED) for arm in manifest.arms)

    def shown(name: str, *profiles: Profile) -> list[str]:
        table = compare([cast(Bundle, FakeBundle(tmp_path / name, replace(manifest, arms=arms), *profiles))])
        rows = [dict(zip(table.columns(), row, strict=True)) for row in table.rows()]
        assert all(row.get("checked", "run") in table.markdown() for row in rows)
        return [row.get("checked", "") for row in rows]

    assert shown("none") == 3 * ["graph-checked, not run"]
    assert shown("proxy", make_profile(evidence="proxy")) == 3 * ["graph-checked, not run"]
    assert shown("target", make_profile()) == 3 * [""]
    one = make_profile(levels_ms={"factored@int8": 2.0, "dense@int8": 4.0})
    assert shown("one", one) == ["run", "run", "graph-checked, not run"]


def test_an_arm_that_was_not_measured(tmp_path: Path) -> None:
    profile = make_profile(levels_ms={"factored@int8": 2.0, "dense@int8": 4.0})
    rows = {row[2]: row for row in compare([bundle(tmp_path / "b", profile)]).rows()}
    assert rows["factored@int8"][9] == "not comparable (dense@fp32 was not measured with it)"
    assert rows["dense@fp32"][7] == "–"


def test_a_precision_without_a_dense_arm(tmp_path: Path) -> None:
    one = bundle(tmp_path / "b", make_profile(), names=("factored@fp16", "dense@int8", "dense@fp32"))
    assert compare([one]).rows()[0][8] == "not comparable (no dense arm of this precision)"


def test_emulated_times_are_not_shown(tmp_path: Path) -> None:
    row = compare([bundle(tmp_path / "b", make_profile(evidence="emulated"))]).rows()[0]
    assert row[7:] == (
        "–",
        "not comparable (emulated times are no latency)",
        "not comparable (emulated times are no latency)",
        "–",
        "–",
        "emulated",
    )


def test_bundles_measured_under_different_conditions_are_kept_apart(tmp_path: Path) -> None:
    same = compare([bundle(tmp_path / "a", make_profile()), bundle(tmp_path / "b", make_profile())])
    assert not any("do not set" in note for note in same.notes)
    other = make_profile(
        threads=4, properties={"HINT": "bf16"}, environment=replace(ENVIRONMENT, cpu_model="Other Core")
    )
    table = compare([bundle(tmp_path / "a", make_profile()), bundle(tmp_path / "c", other)])
    assert len(table.rows()) == 6
    a, c = tmp_path / "a", tmp_path / "c"
    said = f"processor: x86_64 Some Core ({a}), x86_64 Other Core ({c})", f"threads: 2 ({a}), 4 ({c})"
    assert [note for note in table.notes if note.startswith("do not set latencies")] == [
        f"do not set latencies side by side that differ in {text}; read the ratios of each"
        for text in (*said, f"settings: none ({a}), HINT=bf16 ({c})")
    ]
    assert any("4 thread(s), HINT=bf16; null arm" in note for note in table.notes)


def test_markdown(tmp_path: Path) -> None:
    lines = compare([bundle(tmp_path / "b", make_profile())]).markdown().splitlines()
    assert lines[0].startswith("| target | bundle | arm | parameters | size | accuracy |")
    assert {line.count("|") for line in lines[:5]} == {14}
    assert lines[5] == ""
    assert lines[6].startswith("- ")


def test_energy_is_a_column_where_it_was_measured(tmp_path: Path) -> None:
    profile = make_profile()
    assert "energy, rail" not in compare([bundle(tmp_path / "a", profile)]).columns()
    rails = tuple(RailEnergy(name, "INA3221", 0.0042, 0.004, 0.005, ()) for name in ("VDD_IN", "VDD_SOC"))
    arms = {**profile.arms, "factored@int8": replace(profile.arms["factored@int8"], energy=rails)}
    table = compare([bundle(tmp_path / "b", replace(profile, arms=arms))])
    cells = {row[2]: dict(zip(table.columns(), row, strict=True))["energy, rail"] for row in table.rows()}
    assert cells == {"factored@int8": "4.2 mJ VDD_IN", "dense@int8": "–", "dense@fp32": "–"}
    assert table.to_dict()["arms"][0]["energy_joules"] == 0.0042
    emulated = compare([bundle(tmp_path / "c", replace(profile, arms=arms, evidence="emulated"))])
    assert "energy, rail" not in emulated.columns()


def test_an_arm_over_the_targets_memory_is_marked(tmp_path: Path) -> None:
    budget = MemoryBudget(64 << 20, {"factored@int8": "within", "dense@int8": "over"}, ("factored@int8",))
    table = compare([bundle(tmp_path / "b", make_profile(memory_budget=budget))])
    cells = {row[2]: dict(zip(table.columns(), row, strict=True))["peak memory"] for row in table.rows()}
    assert (cells["factored@int8"], cells["dense@int8"]) == ("70 MiB", "70 MiB, over the target's budget")


def test_to_dict_holds_numbers(tmp_path: Path) -> None:
    document = compare([bundle(tmp_path / "b", make_profile())]).to_dict()
    row = document["arms"][0]
    assert row["latency_ns"] == pytest.approx(2e6, rel=0.02)
    assert row["against_dense"]["verdict"] == "faster"
    assert row["drop_ci_pp"] == (-0.1, 0.6)


@pytest.mark.parametrize(
    ("names", "lacks"), [(("factored@int8",), "dense"), (("dense@int8", "dense@fp32"), "factored")]
)
def test_nothing_to_compare_with(tmp_path: Path, names: tuple[str, ...], lacks: str) -> None:
    with pytest.raises(NotComparableError, match=f"expected a {lacks} arm"):
        compare([bundle(tmp_path / "b", names=names)])


def test_different_metrics_are_not_comparable(tmp_path: Path) -> None:
    with pytest.raises(NotComparableError, match=r"metric of .* expected the same, got accuracy and auroc") as e:
        compare([bundle(tmp_path / "a"), bundle(tmp_path / "b", metric="auroc")])
    assert e.value.exit_code == 3


def test_no_bundles() -> None:
    with pytest.raises(BundleError, match="at least one bundle"):
        compare([])
