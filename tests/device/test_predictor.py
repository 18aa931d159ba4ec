from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.manifest import TensorSpec
from rowcol_edge.device.predictor import Predictor, open_arm, runtime_options
from rowcol_edge.device.runtimes import RUNTIMES
from rowcol_edge.device.verify import verify
from rowcol_edge.errors import BundleError, DataError, MissingDependencyError
from rowcol_edge.package import write_bundle

FRAME = np.random.default_rng(3).integers(0, 256, (5, 6), dtype=np.uint8)


def test_every_kind_of_source_gives_the_same_answer(bundle: Bundle, tmp_path: Path) -> None:
    tensor = ((FRAME / np.float32(255) - np.float32(0.5)) / np.float32(0.25)).astype(np.float32)
    Image.fromarray(FRAME).save(tmp_path / "part.png")
    np.save(tmp_path / "part.npy", FRAME)
    np.savez(tmp_path / "part.npz", image=tensor[None, None])
    FRAME.tofile(tmp_path / "part.raw")
    sources = [
        *(tmp_path / f"part.{kind}" for kind in ("png", "npy", "npz", "raw")),
        str(tmp_path / "part.png"),
        Image.fromarray(FRAME),
        FRAME,
        tensor[None],
        tensor[None, None].astype(np.float64),
        {"image": tensor[None, None]},
    ]
    with Predictor(bundle) as predictor:
        answers = [predictor.predict(source) for source in sources]
    weight = _weight(bundle)
    logits = tensor.ravel() @ weight
    probability = 1 / (1 + np.exp(logits[0] - logits[1]))
    for answer in answers:
        assert answer.scores["defective"] == pytest.approx(probability, rel=1e-4)
        assert answer.label == ("defective" if probability >= 0.5 else "good")


def _weight(bundle: Bundle, arm: str | None = None) -> np.ndarray:
    import onnx
    from onnx import numpy_helper

    return numpy_helper.to_array(onnx.load(bundle.artifact(arm)).graph.initializer[0])


def test_a_path_is_opened_and_closed_again(bundle_path: Path) -> None:
    with Predictor(bundle_path.with_name("bundle.zip"), arm="dense@fp32") as predictor:
        root = predictor.bundle.root
        assert predictor.predict(FRAME).label in ("good", "defective")
        assert root.is_dir()
    assert not root.exists()


def test_a_bundle_that_was_handed_over_stays_open(bundle: Bundle) -> None:
    Predictor(bundle).close()
    assert Predictor(bundle).predict(FRAME).label


def test_arms_differ_and_an_unknown_one_is_refused(bundle: Bundle) -> None:
    scores = [Predictor(bundle, arm=arm).predict(FRAME).score for arm in ("factored@fp32", "dense@fp32")]
    assert scores[0] != scores[1]
    with pytest.raises(BundleError, match="did you mean"):
        Predictor(bundle, arm="dense@fp3")


def test_the_arms_own_threshold_decides(bundle_parts: dict[str, Any], tmp_path: Path) -> None:
    manifest = bundle_parts["manifest"]
    arms = tuple(replace(arm, threshold=t) for arm, t in zip(manifest.arms, (0.0, 1.1), strict=True))
    path = write_bundle(tmp_path / "b", **{**bundle_parts, "manifest": replace(manifest, arms=arms)})
    assert Predictor(path).predict(FRAME).label == "defective"
    assert Predictor(path, arm="dense@fp32").predict(FRAME).label == "good"


def test_run_takes_any_batch(bundle: Bundle) -> None:
    with Predictor(bundle) as predictor:
        assert predictor.run({"image": np.zeros((3, 1, 5, 6), np.float32)})["output"].shape == (3, 2)
        with pytest.raises(BundleError, match="one sample at a time"):
            predictor.predict({"image": np.zeros((3, 1, 5, 6), np.float32)})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "got int"),
        ("no/such.png", "no such file"),
        ("no/such.npz", "no/such.npz"),
        (np.zeros((4, 4, 2), np.uint8), "camera frame"),
        (np.zeros((1, 5, 7), np.float32), "1×1×5×7"),
        ({"picture": np.zeros(3)}, "no 'image'"),
        (np.full((1, 5, 6), np.nan, np.float32), "NaN or Inf"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(bundle: Bundle, source: Any, message: str) -> None:
    with Predictor(bundle) as predictor, pytest.raises(DataError, match=message):
        predictor.predict(source)


def test_a_bundle_without_preprocessing_takes_arrays_only(bundle_parts: dict[str, Any], tmp_path: Path) -> None:
    parts = {**bundle_parts, "manifest": replace(bundle_parts["manifest"], preprocess=None)}
    Image.fromarray(FRAME).save(tmp_path / "part.png")
    np.save(tmp_path / "part.npy", np.zeros((1, 5, 6), np.float32))
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    with Predictor(write_bundle(tmp_path / "b", **parts)) as predictor:
        assert predictor.predict(tmp_path / "part.npy").score == pytest.approx(0.5)
        for source in (tmp_path / "part.png", Image.fromarray(FRAME), FRAME):
            with pytest.raises(DataError, match="no preprocessing"):
                predictor.predict(source)
        with pytest.raises(DataError, match=r"bad\.npy"):
            predictor.predict(tmp_path / "bad.npy")


def test_a_runtime_older_than_promised_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.16.3")
    with pytest.raises(BundleError, match=r"expected 1\.17\.0 or newer, got 1\.16\.3") as caught:
        Predictor(bundle)
    assert "pip install onnxruntime" in caught.value.hint


@pytest.mark.parametrize("used", [Predictor, verify])
def test_a_runtime_that_is_not_installed_gets_the_install_line_of_the_bundle(
    used: Callable[[Bundle], object], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pip finds under the runtime's name may be the wrong build for the board."""
    monkeypatch.delitem(sys.modules, RUNTIMES["onnxruntime"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"with: python3 -m pip install onnxruntime numpy pillow$"):
        used(bundle)


@pytest.mark.parametrize("version", ["1.17", "1.17.0rc1", "1.100.0", "2.0.dev20260101+cpu"])
def test_newer_versions_pass(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    assert Predictor(bundle).predict(FRAME).label


def test_options_come_from_the_manifest_unless_given(bundle: Bundle) -> None:
    assert runtime_options(bundle).threads == 1
    assert runtime_options(bundle, 3).threads == 3
    assert runtime_options(bundle).providers == ("CPUExecutionProvider",)
    assert runtime_options(bundle).install_line == bundle.manifest.runtime.install_line
    with pytest.raises(DataError, match="threads"):
        open_arm(bundle, bundle.arm(), threads=-1)


@pytest.mark.parametrize(
    ("machine", "saturates", "exact"), [("aarch64", True, True), ("x86_64", True, False), ("aarch64", False, False)]
)
def test_a_machine_that_stands_in_for_another_kind_does_not_saturate(
    bundle_parts: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    saturates: bool,
    exact: bool,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("rowcol_edge.device.predictor.saturates_only_here", lambda _: saturates)
    target = {"name": "board", "title": "a board", "match": {"machine": machine}}
    parts = {**bundle_parts, "manifest": replace(bundle_parts["manifest"], target=target)}
    with Bundle.open(write_bundle(tmp_path / "board", **parts)) as opened:
        assert runtime_options(opened).exact_sums is exact


def test_an_artifact_with_other_inputs_than_the_manifest_says_is_refused(
    bundle_parts: dict[str, Any], tmp_path: Path
) -> None:
    manifest = replace(bundle_parts["manifest"], outputs=(TensorSpec("logits", (None, 2), "float32"),))
    outputs = {arm: {"logits": v["output"]} for arm, v in bundle_parts["golden_outputs"].items()}
    path = write_bundle(tmp_path / "b", **{**bundle_parts, "manifest": manifest, "golden_outputs": outputs})
    with pytest.raises(BundleError, match="expected logits float32"):
        Predictor(path)
