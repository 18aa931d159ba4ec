"""Which precision, which layers in float, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

import rowcol_edge
from rowcol_edge import arms, keeping, precision
from rowcol_edge.arms import Arm
from rowcol_edge.backends.base import Artifact, LayerError
from rowcol_edge.board_readme import board_readme
from rowcol_edge.budgets import Budgets
from rowcol_edge.device.profile import NULL, Profile
from rowcol_edge.errors import BudgetError, ConfigError, StageError
from rowcol_edge.report import terminal
from rowcol_edge.report.compare import compare
from rowcol_edge.targets import load

from .nets import outlier_net, uneven_net, write_splits
from .profiles import FakeBundle, arm_profile, make_manifest, make_profile


def arm(name: str, size_bytes: int = 100, loss: float = 0.0, kept: tuple[LayerError, ...] = ()) -> Arm:
    artifact = Artifact(Path(f"{name}.onnx"), "", size_bytes, {}, name)
    return Arm("factored", name, artifact, (), 1, None, None, (), loss, kept)


ERRORS = tuple(LayerError(f"layer{i}", 0.5 - i / 100) for i in range(40))


def test_as_few_layers_stay_in_float_as_the_quality_needs() -> None:
    tried: list[int] = []

    def make(layers: Any) -> Arm:
        tried.append(len(layers))
        return arm("int8", kept=tuple(layers))

    found = keeping.fewest(ERRORS, make, lambda other: len(other.kept_float) >= 2, said := [])
    assert found is not None
    assert [layer.name for layer in found.kept_float] == ["layer0", "layer1"]
    assert tried == [5, 2, 1]
    tried.clear()
    assert keeping.fewest(ERRORS, make, lambda other: False, said) is None
    assert tried == [5]
    assert keeping.fewest((), make, lambda other: True, said) is None
    assert said == []


def test_what_cannot_be_made_does_not_hold() -> None:
    def make(layers: Any) -> Arm:
        if len(layers) < 5:
            raise StageError("compile", expected="int8", got="none left")
        return arm("int8", kept=tuple(layers))

    found = keeping.fewest(ERRORS, make, lambda other: True, said := [])
    assert found is not None
    assert len(found.kept_float) == 5
    assert said == ["with 2 layers in float: not made: compile, got none left"]
    assert keeping.fewest(ERRORS[:8], make, lambda other: True, said) is None
    plain = arm("int8", loss=0.10)
    assert keeping.better(plain, keeping.made(lambda: make(()), "repair", said)) is plain
    assert said[1:] == [f"{what}: not made: compile, got none left" for what in ("with 1 layers in float", "repair")]


def test_a_repair_is_kept_only_where_it_is_clearly_better() -> None:
    plain = arm("int8", loss=0.10)
    assert keeping.better(plain, arm("int8", loss=0.09)) is plain
    assert keeping.better(plain, arm("int8", loss=0.05)).loss == 0.05


def measured(levels_ms: Mapping[str, float]) -> Profile:
    """Of a smallest arm int8, as `precision` asks for it."""
    levels = {f"factored@{name}": ms for name, ms in levels_ms.items()}
    profile = make_profile(levels_ms={**levels, "dense@int8": levels["factored@int8"]})
    null = replace(profile.null, baseline="factored@int8")
    arms = {name: profile.arms[name] for name in levels}
    return replace(profile, arms=arms, null=null, null_arm=arm_profile(NULL, levels["factored@int8"], seed=99))


def select(monkeypatch: pytest.MonkeyPatch, levels_ms: Mapping[str, float]) -> tuple[str, dict[str, Any]]:
    sizes = {"int8": 100, "fp16": 200, "fp32": 400}
    monkeypatch.setattr(precision, "_measured", lambda *given: measured(levels_ms))
    runtime = replace(load("generic-x86").runtime("onnxruntime"), precisions=("fp32", "fp16", "int8", "int8-dynamic"))

    def make(name: str) -> Any:
        if name == "int8-dynamic":
            raise StageError("no", got="convolutions")
        return arm(name, sizes[name]), None

    job = cast(Any, SimpleNamespace(budgets=Budgets.parse("drop<=0.5pp")))
    chosen, _, selection = precision.fastest(make, job, load("generic-x86"), runtime, None, lambda *given: None)
    assert chosen.precision == selection.chosen
    return selection.chosen, selection.to_dict()


def test_auto_takes_the_fastest_and_records_what_it_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, record = select(monkeypatch, {"int8": 4.0, "fp16": 3.0, "fp32": 2.0})
    assert chosen == "fp32"
    candidates = {entry["precision"]: entry for entry in record["candidates"]}
    assert list(candidates) == ["fp32", "fp16", "int8", "int8-dynamic"]
    assert candidates["fp32"]["ratio"] == pytest.approx(0.5, rel=0.05)
    assert candidates["fp32"]["ci_low"] < candidates["fp32"]["ratio"] < candidates["fp32"]["ci_high"]
    assert candidates["int8"]["size_bytes"] == 100
    assert candidates["int8"]["ratio"] is None
    assert candidates["int8-dynamic"]["left_out"] == "no: convolutions"
    assert (record["smallest"], record["evidence"]) == ("int8", "target")
    assert record["warnings"] == ()


def test_what_the_profiler_warns_of_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured({"int8": 4.0, "fp32": 2.0})
    monkeypatch.setattr(precision, "_measured", lambda *given: replace(found, warnings=("the clock fell",)))
    runtime = replace(load("generic-x86").runtime("onnxruntime"), precisions=("fp32", "int8"))
    sizes = {"int8": 100, "fp32": 400}
    job = cast(Any, SimpleNamespace(budgets=Budgets.parse("drop<=0.5pp")))
    *_, selection = precision.fastest(
        lambda name: (arm(name, sizes[name]), cast(Any, None)), job, load("generic-x86"), runtime, None,
        lambda *given: None,
    )  # fmt: skip
    assert selection.to_dict()["warnings"] == ("the clock fell",)


def test_the_warnings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {"chosen": "int8", "smallest": "int8", "evidence": "target", "evidence_note": "this machine", "caps": {},
              "candidates": [], "warnings": ["the clock fell"]}  # fmt: skip
    terminal._candidates(Console(width=120), chosen)
    assert "the profiler says: the clock fell" in capsys.readouterr().out


def test_a_ranking_that_fails_is_noted_where_the_arm_is_within_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise StageError("layer errors", got="a crash")

    monkeypatch.setattr(arms.Workbench, "layer_errors", fail)
    splits = write_splits(tmp_path)
    options: dict[str, Any] = {"calib": splits["calib"], "energy": 1.0, "precision": "int8", "dense": False}
    one = rowcol_edge.build(outlier_net(), out=tmp_path / "o", target="raspberry-pi-5", **options)[0]
    assert one.manifest.arms[0].kept_float == ()
    notes = one.manifest.build["notes"]
    assert "factored@int8: layers in float: not made: layer errors, got a crash" in notes


def test_a_tie_goes_to_the_smaller_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select(monkeypatch, {"int8": 2.0, "fp16": 2.0, "fp32": 2.0})[0] == "int8"
    assert select(monkeypatch, {"int8": 4.0, "fp16": 2.0, "fp32": 2.0})[0] == "fp16"


def test_auto_without_a_candidate_says_why() -> None:
    def make(name: str) -> Any:
        raise BudgetError(f"{name} misses it")

    target = load("generic-x86")
    with pytest.raises(BudgetError, match="fp32 misses it"):
        precision.fastest(make, cast(Any, None), target, target.runtime("onnxruntime"), None, lambda *given: None)


def test_auto_needs_a_device_that_is_here() -> None:
    target = load("intel-n100")
    with pytest.raises(ConfigError, match=r"precision auto on intel-n100.*openvino with GPU.*name a precision"):
        precision.check_measurable(target, replace(target.runtime("openvino"), providers=("GPU",)))
    precision.check_measurable(target, target.runtime("openvino"))


def test_readme_and_comparison_name_the_layers_in_float(tmp_path: Path) -> None:
    manifest = make_manifest()
    kept = tuple(
        replace(entry, kept_float=("head",)) if entry.precision == "int8" else entry for entry in manifest.arms
    )
    manifest = replace(manifest, arms=kept)
    assert "- `factored@int8` keeps in float: head." in board_readme(manifest)
    notes = compare([cast(Any, FakeBundle(tmp_path, manifest))]).notes
    assert f"{tmp_path}: factored@int8 keeps head in float" in notes


def test_a_layer_that_hurts_stays_in_float_without_labels(tmp_path: Path) -> None:
    splits = write_splits(tmp_path)
    one = rowcol_edge.build(
        outlier_net(), out=tmp_path / "o", calib=splits["calib"], energy=1.0, precision="int8", target="raspberry-pi-5"
    )[0]
    kept = {entry.name: entry.kept_float for entry in one.manifest.arms}
    assert kept == {"factored@int8": ("reader",), "dense@int8": ("reader",), "dense@fp32": ()}
    assert any("factored@int8: kept in float" in note for note in one.manifest.build["notes"])


def test_uneven_channels_are_equalised_before_anything_stays_in_float(tmp_path: Path) -> None:
    splits = write_splits(tmp_path)
    one = rowcol_edge.build(
        uneven_net(), out=tmp_path / "o", calib=splits["calib"], energy=1.0, precision="int8", dense=False
    )[0]
    assert one.manifest.arms[0].kept_float == ()
    assert any("layers equalised and biases corrected" in note for note in one.manifest.build["notes"])
