from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.manifest import Manifest, safe_path
from rowcol_edge.errors import BundleError

Values = dict[str, Any]


@pytest.fixture
def values(bundle: Bundle) -> Values:
    return json.loads(bundle.manifest.to_json())


def refused(values: Values) -> BundleError:
    with pytest.raises(BundleError) as caught:
        Manifest.from_dict(values)
    return caught.value


def test_json_round_trip(bundle: Bundle) -> None:
    assert Manifest.from_json(bundle.manifest.to_json()) == bundle.manifest


def test_another_schema_is_refused_by_its_version_even_if_other_keys_changed(values: Values) -> None:
    error = refused({"schema": 7, "something": "new"})
    assert (error.what, error.expected, error.got) == ("manifest.schema", "2 or 3", "7")
    assert "pyz" in error.hint


def test_a_manifest_of_schema_2_is_read_and_knows_nothing_of_activations(bundle: Bundle, values: Values) -> None:
    assert values["schema"] == 3
    old = {**values, "schema": 2, "arms": [dict(arm) for arm in values["arms"]]}
    for arm in old["arms"]:
        del arm["activation_bytes"]
    assert Manifest.from_dict(old) == bundle.manifest
    assert Manifest.from_dict(old).to_dict()["arms"][0]["activation_bytes"] is None
    assert refused({**values, "schema": 2}).what == "manifest.arms[0].activation_bytes"
    assert refused({**values, "schema": 1}).hint == "build the bundle again"


def test_activations_are_a_size_or_not_known(values: Values) -> None:
    values["arms"][1]["activation_bytes"] = 4096
    assert Manifest.from_dict(values).arms[1].activation_bytes == 4096
    values["arms"][1]["activation_bytes"] = -1
    assert refused(values).what == "manifest.arms[1].activation_bytes"


@pytest.mark.parametrize(
    "key", ["name", "target", "runtime", "inputs", "preprocess", "arms", "golden_outputs", "files", "build"]
)
def test_a_missing_key_is_named(values: Values, key: str) -> None:
    del values[key]
    error = refused(values)
    assert (error.what, error.got) == (f"manifest.{key}", "no such key")


def test_a_misspelt_key_is_named_with_the_right_one(values: Values) -> None:
    values["arms"][1]["tolerence"] = values["arms"][1].pop("tolerance")
    error = refused(values)
    assert error.what == "manifest.arms[1].tolerance"
    assert "'tolerence'" in error.hint


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        (("extra",), 1, "manifest.extra"),
        (("runtime", "opset"), "18", "manifest.runtime.opset"),
        (("runtime", "opset"), True, "manifest.runtime.opset"),
        (("runtime", "threads"), -1, "manifest.runtime.threads"),
        (("runtime", "colour"), "red", "manifest.runtime.colour"),
        (("name",), "", "manifest.name"),
        (("target",), [], "manifest.target"),
        (("target", "name"), None, "manifest.target.name"),
        (("target", "match"), {"machine": 1}, "manifest.target.match.machine"),
        (("inputs", 0, "dtype"), "complex64", "manifest.inputs[0].dtype"),
        (("inputs", 0, "shape"), [None, "1"], "manifest.inputs[0].shape[1]"),
        (("inputs",), [], "manifest.inputs"),
        (("contract",), "guess", "manifest.contract"),
        (("labels",), ["good", 1], "manifest.labels[1]"),
        (("labels",), ["defective", "defective"], "manifest.labels"),
        (("positive",), "broken", "manifest.positive"),
        (("positive",), None, "manifest.positive (arm factored@fp32 has a threshold)"),
        (("default_arm",), "dense@int8", "manifest.default_arm"),
        (("arms", 0, "name"), "factored", "manifest.arms[0].name"),
        (("arms", 0, "precision"), "int4", "manifest.arms[0].precision"),
        (("arms", 0, "artifact"), "../evil.onnx", "manifest.arms[0].artifact"),
        (("arms", 0, "tolerance"), -1, "manifest.arms[0].tolerance"),
        (("arms", 0, "weight_types", "float32"), 1.5, "manifest.arms[0].weight_types.float32"),
        (("arms", 0, "quality", "train"), {}, "manifest.arms[0].quality.train"),
        (("arms", 0, "quality", "test", "value"), "high", "manifest.arms[0].quality.test.value"),
        (("golden_outputs",), {}, "manifest.golden_outputs"),
        (("files", 0, "sha256"), "abc", "manifest.files[0].sha256"),
        (("files", 0, "path"), "/etc/passwd", "manifest.files[0].path"),
        (("files", 0, "path"), "profiles/x.json", "manifest.files"),
        (("preprocess", "height"), "6", "manifest.preprocess.height"),
        (("preprocess", "gamma"), 2, "manifest.preprocess"),
        (("tool_versions",), {"onnx": 1}, "manifest.tool_versions.onnx"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(values: Values, path: tuple[Any, ...], value: Any, what: str) -> None:
    place: Any = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert refused(values).what == what


def test_an_arm_without_its_file_in_the_list_is_refused(values: Values) -> None:
    values["files"] = [entry for entry in values["files"] if not entry["path"].startswith("arms/dense")]
    assert refused(values).expected == "an entry for arms/dense@fp32.onnx"


@pytest.mark.parametrize("text", ['{"schema": 1, "schema": 2}', '{"schema": NaN}', "{", "[1]", "[" * 100_000])
def test_text_that_is_no_plain_json_object_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match="manifest"):
        Manifest.from_json(text)


def test_what_json_cannot_hold_is_refused_when_writing(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="finite"):
        replace(bundle.manifest, build={"ratio": float("nan")}).to_json()


def test_an_unknown_arm_gets_the_nearest_name(bundle: Bundle) -> None:
    assert bundle.manifest.arm().name == "factored@fp32"
    with pytest.raises(BundleError, match=r"did you mean dense@fp32\?"):
        bundle.manifest.arm("dense@fp23")


@pytest.mark.parametrize("path", ["a", "a/b.onnx", "arms/factored@int8.onnx", "a b"])
def test_paths_inside(path: str) -> None:
    assert safe_path(path)


@pytest.mark.parametrize("path", ["", "/a", "../a", "a/../b", "a//b", "./a", "a/", "C:/a", "a\\b", "a\n", "a\x7f", "."])
def test_paths_that_leave_or_confuse(path: str) -> None:
    assert not safe_path(path)
