from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rowcol_edge
from rowcol_edge import cli
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.manifest import Manifest
from rowcol_edge.device.profile import NOT_MEASURED, OVER, WITHIN, MemoryBudget, Profile
from rowcol_edge.device.stats import NO_DIFFERENCE, SLOWER
from rowcol_edge.errors import BundleError, ConfigError, NotComparableError

from ..profiles import MIB, make_arm, make_bundle, make_manifest, make_profile


@pytest.fixture
def gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Runs the command on a profile in no bundle; its exit code and the lines on stdout."""

    def run(profile: Profile, *arguments: str) -> tuple[int, list[str]]:
        path = tmp_path / "profile.json"
        path.write_text(profile.to_json(), encoding="utf-8")
        return command(capsys, str(path), *arguments)

    return run


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as ended:
        cli.run_command(["gate", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out.splitlines()


def with_interval(profile: Profile, **changes: Any) -> Profile:
    """The default arm's comparison with dense@int8 changed."""
    first, *others = profile.comparisons
    assert (first.arm, first.baseline) == ("factored@int8", "dense@int8")
    return replace(profile, comparisons=(replace(first, **changes), *others))


def test_gates_that_hold(gate: Callable[..., tuple[int, list[str]]]) -> None:
    profile = with_interval(make_profile(), ratio=0.5, ci_low=0.49, ci_high=0.51)
    code, lines = gate(profile, "--max-latency-ratio", "0.51", "--max-bytes", "1234567", "--max-memory", "70MiB")
    assert code == 0
    assert lines == [
        (
            "held: latency of factored@int8 over dense@int8 (target): "
            "expected an interval that ends at 0.51 or below, got 0.5000 [0.4900, 0.5100]"
        ),
        "held: file of factored@int8: expected at most 1,234,567 bytes, got 1,234,567 bytes",
        "held: peak memory of factored@int8 (target): expected at most 70.00 MiB, got 70.00 MiB",
    ]


def test_each_gate_is_missed_by_a_little(gate: Callable[..., tuple[int, list[str]]]) -> None:
    profile = with_interval(make_profile(), ratio=0.5, ci_low=0.49, ci_high=0.5101)
    code, lines = gate(profile, "--max-latency-ratio", "0.51", "--max-bytes", "1234566", "--max-memory", "69.9MiB")
    assert code == 1
    assert [line.split(":")[0] for line in lines] == ["missed", "missed", "missed"]


def test_the_arm_and_its_baseline_can_be_named(gate: Callable[..., tuple[int, list[str]]]) -> None:
    code, lines = gate(make_profile(), "--max-latency-ratio", "0.55", "--arm", "dense@int8")
    assert (code, lines[0].partition(" (")[0]) == (0, "held: latency of dense@int8 over dense@fp32")
    code, lines = gate(make_profile(), "--max-latency-ratio", "0.3", "--baseline", "dense@fp32")
    assert (code, lines[0].partition(" (")[0]) == (0, "held: latency of factored@int8 over dense@fp32")


def test_the_default_arm_is_the_one_that_decides_about_memory(gate: Callable[..., tuple[int, list[str]]]) -> None:
    budget = MemoryBudget(99 * MIB, {"dense@int8": WITHIN}, ("dense@int8",))
    assert "peak memory of dense@int8" in gate(make_profile(memory_budget=budget), "--max-memory", "70MiB")[1][0]


def test_the_targets_memory_budget_is_a_gate_that_nobody_has_to_ask_for(
    gate: Callable[..., tuple[int, list[str]]],
) -> None:
    for limit, verdict, code, said in ((70, WITHIN, 0, "held"), (69, OVER, 1, "missed")):
        budget = MemoryBudget(limit * MIB, {"factored@int8": verdict}, ("factored@int8",))
        found, lines = gate(make_profile(memory_budget=budget), "--max-bytes", "2MB")
        assert found == code
        assert lines[1] == (
            f"{said}: peak memory of factored@int8 (target): "
            f"expected at most {limit}.00 MiB, the target's budget, got 70.00 MiB"
        )
    unknown = MemoryBudget(99 * MIB, {"factored@int8": NOT_MEASURED}, ("factored@int8",))
    assert len(gate(make_profile(memory_budget=unknown), "--max-bytes", "2MB")[1]) == 1


def test_the_bundle_says_which_arm_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = profiled(tmp_path / "b", make_manifest(default_arm="dense@int8"))
    assert command(capsys, str(path), "--max-bytes", "2MB")[1][0].startswith("held: file of dense@int8: ")
    elsewhere = path.replace(tmp_path / "elsewhere.json")
    assert command(capsys, str(elsewhere), "--max-bytes", "2MB")[1][0].startswith("held: file of factored@int8: ")
    lines = command(capsys, str(elsewhere), "--max-bytes", "2MB", "--bundle", str(tmp_path / "b"))[1]
    assert lines[0].startswith("held: file of dense@int8: ")


def test_an_arm_has_to_be_named_where_the_default_one_was_not_measured(tmp_path: Path) -> None:
    levels = {"dense@int8": 4.0, "dense@fp32": 8.0}
    path = profiled(tmp_path / "b", make_manifest(), levels_ms=levels)
    said = (
        "arm: expected the bundle's default one, factored@int8, got not measured – --arm with dense@int8 or dense@fp32"
    )
    with pytest.raises(BundleError, match=f"^{said}$"):
        rowcol_edge.gate(path, max_bytes="2MB")
    assert rowcol_edge.gate(path, max_bytes="2MB", arm="dense@fp32").held
    budget = MemoryBudget(99 * MIB, dict.fromkeys(levels, WITHIN), tuple(levels))
    alone = tmp_path / "alone.json"
    alone.write_text(make_profile(levels_ms=levels, memory_budget=budget).to_json(), encoding="utf-8")
    with pytest.raises(BundleError, match="arm: expected the bundle's default one, got not measured"):
        rowcol_edge.gate(alone, max_bytes="2MB")


@pytest.mark.parametrize("arm", [None, "factored@int8"])
def test_a_profile_of_another_build_is_refused_whatever_is_asked(arm: str | None, tmp_path: Path) -> None:
    path = profiled(tmp_path / "b", make_manifest())
    make_bundle(tmp_path / "anew", make_manifest(created="2027-01-02T03:04:05Z"))
    with pytest.raises(NotComparableError, match="expected the same build"):
        rowcol_edge.gate(path, max_bytes="2MB", arm=arm, bundle=tmp_path / "anew")
    with pytest.raises(BundleError, match="no such file or folder"):
        rowcol_edge.gate(path, max_bytes="2MB", arm=arm, bundle=tmp_path / "nowhere")
    moved = path.replace(tmp_path / "anew/profiles/one.json")
    with pytest.raises(NotComparableError, match="expected the same build"):
        rowcol_edge.gate(moved, max_bytes="2MB", arm=arm)
    assert rowcol_edge.gate(moved, max_bytes="2MB", arm=arm, bundle=tmp_path / "b").arm == "factored@int8"


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (with_interval(make_profile(), ratio=None, ci_low=None, ci_high=None), "no interval"),
        (make_profile(evidence="emulated"), "emulated times are no latency"),
        (replace(make_profile(), comparisons=()), "not measured"),
        (with_interval(make_profile(), reason="not larger than what the null arm shows"), "what the null arm shows"),
    ],
)
def test_a_ratio_that_cannot_be_judged_is_no_gate_that_holds(
    profile: Profile, said: str, gate: Callable[..., tuple[int, list[str]]]
) -> None:
    code, lines = gate(profile, "--max-latency-ratio", "0.9")
    assert code == 3
    assert lines[0].startswith("not comparable: latency of factored@int8 over dense@int8")
    assert said in lines[0]


@pytest.mark.parametrize("reason", ["not larger than what the null arm shows", ""])
def test_a_disturbed_session_does_not_show_that_nothing_is_slower(
    reason: str, gate: Callable[..., tuple[int, list[str]]]
) -> None:
    calm = with_interval(make_profile(), ratio=1.0, ci_low=0.99, ci_high=1.01, verdict=NO_DIFFERENCE)
    assert gate(calm, "--max-latency-ratio", "1.02")[0] == 0
    disturbed = replace(with_interval(calm, reason=reason), null=replace(calm.null, verdict=SLOWER))
    code, lines = gate(disturbed, "--max-latency-ratio", "1.02")
    assert (code, lines[0].partition(":")[0]) == (3, "not comparable")
    assert "null arm" in lines[0]


def test_memory_that_was_not_measured(gate: Callable[..., tuple[int, list[str]]]) -> None:
    profile = make_profile()
    arms = {name: replace(arm, memory=None) for name, arm in profile.arms.items()}
    assert gate(replace(profile, arms=arms), "--max-memory", "1GB")[0] == 3
    assert gate(make_profile(evidence="emulated"), "--max-memory", "1GB")[0] == 3


def test_a_missed_gate_outweighs_one_that_cannot_be_judged(gate: Callable[..., tuple[int, list[str]]]) -> None:
    code, lines = gate(make_profile(), "--max-drop", "1", "--max-bytes", "1kB")
    assert (code, [line.split(":")[0] for line in lines]) == (1, ["not comparable", "missed"])


@pytest.mark.parametrize(("limit", "code"), [("0.25pp", 0), ("0.25", 0), ("0.2", 1), ("0", 1)])
def test_the_drop_is_that_of_the_bundle_beside(
    limit: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = profiled(tmp_path / "b", make_manifest())
    got, lines = command(capsys, str(path), "--max-drop", limit)
    assert got == code
    said = "expected an estimate of at most {:g} pp, got +0.250 pp [-0.100, +0.600] of accuracy, n = 40"
    assert lines[0].endswith(said.format(float(limit.removesuffix("pp"))))


def test_the_drop_of_a_bundle_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = profiled(tmp_path / "b", make_manifest()).replace(tmp_path / "elsewhere.json")
    code, lines = command(capsys, str(path), "--max-drop", "1")
    assert (code, lines[0].endswith("no bundle that states it – name it with --bundle")) == (3, True)
    assert command(capsys, str(path), "--max-drop", "1", "--bundle", str(tmp_path / "b"))[0] == 0


def test_a_bundle_of_another_build_is_refused(tmp_path: Path) -> None:
    path = profiled(tmp_path / "b", make_manifest())
    make_bundle(tmp_path / "other", make_manifest(created="2027-01-02T03:04:05Z"))
    with pytest.raises(NotComparableError, match="expected the same build"):
        rowcol_edge.gate(path, max_drop=1, bundle=tmp_path / "other")


def test_a_drop_that_the_manifest_does_not_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = (replace(make_arm("factored@int8"), quality={}), make_arm("dense@int8"), make_arm("dense@fp32"))
    code, lines = command(capsys, str(profiled(tmp_path / "b", make_manifest(arms=arms))), "--max-drop", "1")
    assert (code, lines[0].endswith("build with --test")) == (3, True)


def profiled(folder: Path, manifest: Manifest, **changes: Any) -> Path:
    """A bundle of empty files, and its profile."""
    make_bundle(folder, manifest)
    with Bundle.open(folder) as bundle:
        profile = make_profile(digest=bundle.digest, **changes)
    path = folder / "profiles/one.json"
    path.write_text(profile.to_json(), encoding="utf-8")
    return path


def test_json(gate: Callable[..., tuple[int, list[str]]]) -> None:
    code, lines = gate(make_profile(), "--max-bytes", "1kB", "--max-latency-ratio", "0.9", "--json")
    found = json.loads("\n".join(lines))
    assert (code, found["held"], found["arm"], found["baseline"]) == (1, False, "factored@int8", "dense@int8")
    latency, file = found["gates"]
    assert (latency["unit"], latency["limit"], latency["verdict"]) == ("ratio", 0.9, "held")
    assert 0.49 < latency["got"] < 0.52
    assert (file["unit"], file["limit"], file["got"], file["verdict"]) == ("bytes", 1000.0, 1_234_567, "missed")


def test_a_profile_of_another_schema_is_refused_by_its_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.json").write_text(json.dumps({**make_profile().to_dict(), "schema": 2}))
    with pytest.raises(SystemExit) as ended:
        cli.run_command(["gate", str(tmp_path / "old.json"), "--max-bytes", "1MB"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "old.json.schema" in said
    assert "got:      2" in said


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_latency_ratio": 0.0},
        {"max_latency_ratio": float("nan")},
        {"max_drop": "0.5%"},
        {"max_drop": "-1"},
        {"max_bytes": "4 miles"},
        {"max_bytes": "4MB,drop<=1"},
        {"max_memory": "0"},
        {"max_memory": ""},
    ],
)
def test_what_is_no_limit_is_refused(limits: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        rowcol_edge.gate(tmp_path / "never-read.json", **limits)


def test_an_arm_that_was_not_measured(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(make_profile().to_json(), encoding="utf-8")
    with pytest.raises(BundleError, match="did you mean factored@int8"):
        rowcol_edge.gate(tmp_path / "p.json", max_bytes="1MB", arm="factorde@int8")
    with pytest.raises(BundleError, match="got 'dense@fp64'"):
        rowcol_edge.gate(tmp_path / "p.json", max_latency_ratio=1.0, baseline="dense@fp64")
