"""What the recipes say, held against the bundle's own preprocessing; none of them runs here."""

from __future__ import annotations

import ast
import configparser
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rowcol_edge.board_readme import board_readme
from rowcol_edge.device.manifest import GRAPH_CHECKED, Manifest, RuntimeEntry, TensorSpec
from rowcol_edge.device.preprocess import Preprocess
from rowcol_edge.recipes import LABEL, files, left_out

from .profiles import make_manifest

CONFIG = "recipes/deepstream/config_infer_primary.txt"
LABELS = "recipes/deepstream/labels.txt"
PIPELINE = "recipes/deepstream/pipeline.sh"
CAMERA = "recipes/gstreamer/camera.py"
PHOTO = Preprocess("RGB", 4, 6, mean=(0.485, 0.456, 0.406), std=(0.225, 0.225, 0.225))


def jetson(recipe: Preprocess | None = PHOTO, **changes: Any) -> Manifest:
    values = {
        "target": {"name": "jetson", "match": {}, "recipes": ["deepstream", "gstreamer"]},
        "runtime": RuntimeEntry("tensorrt", "10.3.0", 18, 9, 2, "apt", ("cuda:0",)),
        "inputs": (TensorSpec("image", (1, 3, 4, 6), "float32"),),
        "outputs": (TensorSpec("output", (1, 2), "float32"),),
        "preprocess": None if recipe is None else recipe.to_dict(),
        "positive": "bad",
    }
    return make_manifest(**{**values, **changes})


def config(manifest: Manifest) -> tuple[dict[str, str], str]:
    text = files(manifest)[CONFIG].decode()
    parser = configparser.ConfigParser()
    parser.read_string(text)
    return dict(parser["property"]), text


@pytest.mark.parametrize(
    "recipe",
    [
        PHOTO,
        Preprocess("L", 5, 7, mean=(0.6,), std=(0.16,)),
        Preprocess("RGB", 2, 2, scale=1 / 128, mean=(127 / 128,) * 3, std=(1.0,) * 3),
    ],
)
def test_nvinfers_formula_gives_what_the_bundles_preprocessing_gives(recipe: Preprocess) -> None:
    said, text = config(jetson(recipe))
    frame = np.random.default_rng(0).integers(0, 256, (recipe.height, recipe.width, recipe.channels), np.uint8)
    offsets = np.array([float(part) for part in said["offsets"].split(";")])[:, None, None]
    nvinfer = float(said["net-scale-factor"]) * (frame.transpose(2, 0, 1) - offsets)
    np.testing.assert_allclose(nvinfer, recipe.pixels(frame), rtol=1e-5, atol=1e-5)
    assert said["infer-dims"] == f"{recipe.channels};{recipe.height};{recipe.width}"
    assert said["model-color-format"] == {"RGB": "0", "L": "2"}[recipe.mode]
    assert "NOT EXACT" not in text


def test_stds_that_differ_are_said_not_to_be_exact() -> None:
    said, text = config(jetson(replace(PHOTO, std=(0.229, 0.224, 0.225))))
    assert float(said["net-scale-factor"]) == pytest.approx(1 / 255 / 0.226, rel=1e-3)
    assert "NOT EXACT: the channels have different stds (0.229, 0.224, 0.225)" in text
    assert "off by up to 1.3%" in text


@pytest.mark.parametrize(("precision", "mode"), [("fp32", "0"), ("int8", "1"), ("fp16", "2")])
def test_the_default_arm_is_the_one_that_runs(precision: str, mode: str) -> None:
    manifest = jetson()
    name = f"factored@{precision}"
    arm = replace(manifest.arms[0], name=name, precision=precision, artifact=f"arms/{name}.onnx")
    said, _ = config(replace(manifest, arms=(arm,), default_arm=name))
    assert (said["network-mode"], said["onnx-file"]) == (mode, f"../../arms/{name}.onnx")
    assert f"--arms {name} --json" in files(replace(manifest, arms=(arm,), default_arm=name))[PIPELINE].decode()


def test_labels_stand_on_one_line_with_semicolons_and_the_bundles_rule_in_the_head() -> None:
    manifest = jetson()
    made = files(replace(manifest, arms=tuple(replace(arm, threshold=0.42) for arm in manifest.arms)))
    assert made[LABELS] == b"good;bad\n"
    assert b"'bad' if its probability is at least 0.42: take that decision from the attached tensor" in made[CONFIG]
    said, _ = config(manifest)
    assert (said["network-type"], said["labelfile-path"], said["output-tensor-meta"]) == ("1", "labels.txt", "1")
    assert said["classifier-threshold"] == "0.0"


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": ("good", "bad;worse"), "positive": None},
        {"outputs": (TensorSpec("output", (1, 1), "float32"),)},
        {"contract": "anomaly_map", "labels": (), "positive": None},
    ],
)
def test_where_nvinfer_has_no_rule_it_is_told_to_have_none(changes: dict[str, Any]) -> None:
    manifest = jetson(**changes)
    assert LABELS not in files(manifest)
    said, text = config(manifest)
    assert said["network-type"] == "100"
    assert "labelfile-path" not in said
    assert "nvinfer has no rule for these outputs" in text


def test_each_recipe_says_first_that_it_was_never_run() -> None:
    made = files(jetson())
    assert set(made) == {CONFIG, LABELS, PIPELINE, CAMERA}
    for path in (CONFIG, PIPELINE, CAMERA):
        head = made[path].decode().splitlines()[:2]
        assert f"# {LABEL}" in head, path
    assert f"generated, {GRAPH_CHECKED}" == LABEL
    assert f"Pipelines around this model, {LABEL}:\n\n- `{CONFIG}`" in board_readme(jetson())


def test_nothing_is_made_where_nothing_is_asked_for_or_possible() -> None:
    assert files(jetson(target={"name": "pi", "match": {}})) == {}
    assert files(jetson(None)) == {}
    assert set(files(jetson(runtime=make_manifest().runtime))) == {CAMERA}
    assert set(files(jetson(frames=True))) == {CAMERA}
    assert "## Recipes" not in board_readme(make_manifest())


@pytest.mark.parametrize(
    ("manifest", "why", "made"),
    [
        (jetson(frames=True), "this bundle's graph takes uint8 camera frames", {CAMERA}),
        (
            jetson(runtime=RuntimeEntry("onnxruntime", "1.17.0", 18, 9, 2, "apt", ("CUDAExecutionProvider",))),
            "this bundle is for onnxruntime",
            {CAMERA},
        ),
        (jetson(None), "nothing says how a picture becomes this model's input", set()),
    ],
)
def test_a_recipe_that_cannot_be_made_is_not_left_out_without_a_word(
    manifest: Manifest, why: str, made: set[str]
) -> None:
    assert set(files(manifest)) == made
    [said, *_] = left_out(manifest)
    assert said.startswith("no deepstream recipe: ")
    assert why in said
    assert f"No{said[2:]}" in board_readme(manifest)
    assert left_out(jetson()) == []


def test_the_scripts_are_valid_and_young_enough_for_python_3_10(tmp_path: Path) -> None:
    made = files(jetson())
    ast.parse(made[CAMERA].decode(), feature_version=(3, 10))
    script = tmp_path / "pipeline.sh"
    script.write_bytes(made[PIPELINE])
    shell = shutil.which("sh")
    assert shell is not None
    assert subprocess.run([shell, "-n", script], capture_output=True, check=False).returncode == 0
