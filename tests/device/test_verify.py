from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.verify import _saturates, relative_error, verify
from rowcol_edge.errors import IntegrityError, VerifyError
from rowcol_edge.package import write_bundle

Parts = dict[str, Any]


def changed(parts: Parts, factor: float) -> Parts:
    """The dense arm's golden outputs, times a factor."""
    outputs = parts["golden_outputs"]
    dense = {"output": (outputs["dense@fp32"]["output"] * factor).astype(np.float32)}
    return {**parts, "golden_outputs": {**outputs, "dense@fp32": dense}}


def test_a_good_bundle_passes_with_every_arm(bundle: Bundle) -> None:
    report = verify(bundle)
    report.raise_if_failed()
    assert report.ok
    assert [(arm.name, arm.ok, arm.samples, arm.labels_same) for arm in report.arms] == [
        ("factored@fp32", True, 4, 4),
        ("dense@fp32", True, 4, 4),
    ]
    assert all(arm.relative_error is not None and arm.relative_error < 1e-6 for arm in report.arms)
    assert report.to_dict()["ok"] is True
    assert report.digest == bundle.digest


def test_an_arm_that_computes_something_else_fails_alone(bundle_parts: Parts, tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b", **changed(bundle_parts, 1.25))
    report = verify(Bundle.open(path))
    factored, dense = report.arms
    assert factored.ok
    assert not dense.ok
    assert dense.relative_error == pytest.approx(0.2, rel=1e-4)
    assert dense.labels_same == 4  # the same signs
    with pytest.raises(
        VerifyError, match=r"arm dense@fp32: expected a relative error ≤ 1e-05, got 2\.00e-01"
    ) as caught:
        report.raise_if_failed()
    assert caught.value.exit_code == 1
    assert verify(Bundle.open(path), arms=["factored@fp32"]).ok


@pytest.mark.parametrize(
    ("machine", "precision", "saturates"),
    [("x86_64", "int8", True), ("aarch64", "int8", False), ("aarch64", "int8-dynamic", True)],
)
def test_an_int8_arm_that_saturates_here_only_says_so(
    bundle_parts: Parts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    precision: str,
    saturates: bool,
) -> None:
    """A target of another kind is stood in for: its static int8 is calculated in float, its dynamic int8 is not."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for module in ("predictor", "verify"):
        monkeypatch.setattr(f"rowcol_edge.device.{module}.saturates_only_here", lambda _: True)
    parts = changed(bundle_parts, 1.25)
    name, manifest = f"dense@{precision}", parts["manifest"]
    manifest = replace(manifest, target={"name": "board", "title": "a board", "match": {"machine": machine}})
    arms = (manifest.arms[0], replace(manifest.arms[1], name=name, precision=precision))
    places = {"factored@fp32": manifest.golden_outputs["factored@fp32"], name: f"golden/{name}.npz"}
    for part in ("artifacts", "golden_outputs"):
        parts[part] = {name if arm == "dense@fp32" else arm: made for arm, made in parts[part].items()}
    parts["manifest"] = replace(manifest, arms=arms, golden_outputs=places)
    report = verify(Bundle.open(write_bundle(tmp_path / "b", **parts)))
    why = "relative error 2.00e-01 on a processor whose 8-bit sums saturate, which the target's do not"
    assert [arm.reason for arm in report.arms] == ["", why if saturates else ""]
    got = why if saturates else "2.00e-01"
    with pytest.raises(VerifyError, match=re.escape(f"got {got} – try another version")):
        report.raise_if_failed()


def test_tflite_widens_8_bit_products_and_is_not_said_to_saturate(
    bundle_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rowcol_edge.device.verify.saturates_only_here", lambda _: True)
    manifest = bundle_parts["manifest"]
    arm = replace(manifest.arms[0], precision="int8")
    for runtime, saturates in (("onnxruntime", True), ("tflite", False)):
        entry = replace(manifest.runtime, name=runtime)
        parts = {**bundle_parts, "manifest": replace(manifest, runtime=entry)}
        with Bundle.open(write_bundle(tmp_path / runtime, **parts)) as opened:
            assert _saturates(opened, arm) is saturates


def test_the_arms_tolerance_is_the_limit(bundle_parts: Parts, tmp_path: Path) -> None:
    manifest = bundle_parts["manifest"]
    arms = tuple(replace(arm, tolerance=0.21) for arm in manifest.arms)
    parts = {**changed(bundle_parts, 1.25), "manifest": replace(manifest, arms=arms)}
    assert verify(Bundle.open(write_bundle(tmp_path / "b", **parts))).ok


def test_labels_that_flip_are_counted(bundle_parts: Parts, tmp_path: Path) -> None:
    report = verify(Bundle.open(write_bundle(tmp_path / "b", **changed(bundle_parts, -1.0))))
    assert report.arms[1].labels_same == 0
    assert report.arms[1].relative_error == pytest.approx(2.0)


def test_outputs_of_another_shape_have_no_error_but_a_reason(bundle_parts: Parts, tmp_path: Path) -> None:
    outputs = bundle_parts["golden_outputs"]
    short = {**outputs, "dense@fp32": {"output": outputs["dense@fp32"]["output"][:2]}}
    report = verify(Bundle.open(write_bundle(tmp_path / "b", **{**bundle_parts, "golden_outputs": short})))
    assert report.arms[1].relative_error is None
    assert "(4, 2), golden (2, 2)" in report.arms[1].reason
    with pytest.raises(VerifyError, match="golden"):
        report.raise_if_failed()


def test_files_are_checked_even_if_the_bundle_was_opened_unchecked(bundle_path: Path) -> None:
    bundle = Bundle.open(bundle_path, check=False)
    (bundle_path / "README.md").write_text("edited")
    with pytest.raises(IntegrityError, match=r"README\.md"):
        verify(bundle)


def test_relative_error_pools_all_outputs() -> None:
    golden = {"a": np.array([3.0]), "b": np.array([0.0, 4.0])}
    assert relative_error({"a": np.array([3.0]), "b": np.array([1.0, 4.0])}, golden) == pytest.approx(0.2)
    assert relative_error({"a": np.array([2.0])}, {"a": np.array([0.0])}) == 2.0
    assert relative_error({"a": np.array([200], np.uint8)}, {"a": np.array([100], np.uint8)}) == 1.0
