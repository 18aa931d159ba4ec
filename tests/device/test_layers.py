from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rowcol_edge.device import layers
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.layers import FileLayer, FileOperator, Finder, LayerMap
from rowcol_edge.errors import BundleError, IntegrityError
from rowcol_edge.package import write_bundle

KNOWN = LayerMap(
    (FileLayer("stem", "dense", None, 100, 20), FileLayer("body.0", "project (row)", 8, 50, None)),
    (
        FileOperator("stem", "Conv", 0, 100, ("conv2d",)),
        FileOperator("stem/Relu", "Relu", 0, 0, ("relu",)),
        FileOperator("body.0.1/Conv", "Conv", 1, 40, ("conv2d_1",)),
        FileOperator("body.0.1/Conv_2", "Conv", 1, 10, ("conv2d_2",)),
        FileOperator("Reshape", "Reshape", -1, 0),
    ),
)


def test_it_is_written_and_read_back() -> None:
    assert LayerMap.from_json(KNOWN.to_json(), "layers/a.json") == KNOWN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, r"x\.json\.schema: expected 1, got 2"),
        ({"layers": [{}]}, r"x\.json\.layers\[0\]\.name: expected a value"),
        ({"layers": []}, r"operators\[0\]\.layer: expected a place among the layers, got 0"),
    ],
)
def test_a_damaged_one_is_an_error_that_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        LayerMap.from_json(json.dumps({**json.loads(KNOWN.to_json()), **change}), "x.json")


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1', "null"])
def test_what_is_no_such_file_is_an_error(text: str) -> None:
    with pytest.raises(BundleError, match=r"x\.json"):
        LayerMap.from_json(text, "x.json")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["stem"], "stem"),
        (["stem/Relu"], "stem/Relu"),
        (["fused stem"], "stem"),
        (["conv2d_1_nchwc"], "body.0.1/Conv"),  # onnxruntime names a kernel after its output
        (["body.0.1/Conv_2_quant"], "body.0.1/Conv_2"),
        (["body.0.1/Conv/WithoutBiases"], "body.0.1/Conv"),
        (["stem/Relu", "stem"], "stem"),  # of those that were fused the one that multiplies
        (["Reshape", "stem/Relu"], "stem/Relu"),
        (["stem2"], None),
        (["stem.1"], None),  # another module, not this one with something added
        (["ReorderOutput_token_3"], None),
        (["Reshape_4140"], None),  # another operator of that kind
        ([], None),
    ],
)
def test_names_of_a_runtime_lead_back_to_the_file(names: list[str], found: str | None) -> None:
    operator = Finder(KNOWN)(names)
    assert (operator.name if operator else None) == found


def test_a_bundle_has_one_for_each_arm_that_its_manifest_lists(bundle_parts: dict[str, Any], tmp_path: Path) -> None:
    extra = {layers.path("dense@fp32"): KNOWN.to_json().encode()}
    folder = write_bundle(tmp_path / "b", **bundle_parts, extra=extra)
    with Bundle.open(folder) as bundle:
        assert layers.load(bundle, "dense@fp32") == KNOWN
        assert layers.load(bundle, "factored@fp32") is None
        (folder / layers.path("dense@fp32")).write_text(KNOWN.to_json().replace("100", "999"), encoding="utf-8")
        with pytest.raises(IntegrityError, match=r"layers/dense@fp32\.json"):
            layers.load(bundle, "dense@fp32")
