from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from rowcol_edge import targets
from rowcol_edge.errors import TargetError

SHIPPED = ("generic-x86", "intel-n100", "intel-nuc", "raspberry-pi-4", "raspberry-pi-5")


@pytest.fixture
def values(root: Path) -> dict[str, Any]:
    """The values of a good target file, to spoil."""
    return copy.deepcopy(tomllib.loads((root / "targets" / "raspberry-pi-5.toml").read_text(encoding="utf-8")))


def refused(values: dict[str, Any]) -> TargetError:
    with pytest.raises(TargetError) as caught:
        targets.parse(values, name="my-board", source="my-board.toml")
    assert "my-board.toml" in str(caught.value)
    return caught.value


def test_shipped_targets_are_listed_sorted() -> None:
    assert targets.available() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_target_loads_and_survives_json(name: str) -> None:
    target = targets.load(name)
    stored = json.loads(json.dumps(target.to_dict()))
    assert stored == target.to_dict()
    assert stored["name"] == name
    assert stored["match"]["machine"] in {"x86_64", "aarch64"}
    assert stored["runtimes"][0]["precisions"][0] == "fp32"
    assert "\n" not in target.why + target.proxy_note


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_install_lines_promise_the_oldest_runtime(name: str) -> None:
    spec = targets.load(name).runtime("onnxruntime")
    assert spec.oldest.startswith("1.17")
    assert f'"onnxruntime>={spec.oldest.rpartition(".")[0]}"' in spec.install


def test_only_the_target_without_wide_products_saturates() -> None:
    assert [name for name in SHIPPED if targets.load(name).int8_saturates] == ["generic-x86"]


def test_recipes_may_be_named_and_are_known(values: dict[str, Any]) -> None:
    assert targets.parse(values, name="my-board", source="my-board.toml").recipes == ()
    values["recipes"] = ["gstreamer"]
    assert targets.parse(values, name="my-board", source="my-board.toml").recipes == ("gstreamer",)
    values["recipes"] = ["gstreamr"]
    assert "did you mean gstreamer" in str(refused(values))


def test_a_path_is_a_target_too(root: Path, tmp_path: Path) -> None:
    own = tmp_path / "my-board.toml"
    own.write_bytes((root / "targets" / "raspberry-pi-5.toml").read_bytes())
    target = targets.load(str(own))
    assert target.name == "my-board"
    assert target.match == {"machine": "aarch64", "device_tree_model": "Raspberry Pi 5"}


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(TargetError, match="'raspbery-pi5' – did you mean raspberry-pi-5"):
        targets.load("raspbery-pi5")


def test_a_name_like_nothing_known_gets_the_way_out() -> None:
    with pytest.raises(TargetError, match=r"expected one of generic-x86, .*\.toml file is accepted"):
        targets.load("zzz")


def test_unknown_runtime_names_the_nearest() -> None:
    with pytest.raises(
        TargetError, match="raspberry-pi-5: expected one of onnxruntime, got 'onnxrt' – did you mean onnxruntime"
    ):
        targets.load("raspberry-pi-5").runtime("onnxrt")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"threads = ", "valid TOML"), (b"\xff\xfe\x00", "UTF-8")],
    ids=["absent", "not-toml", "not-text"],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    own = tmp_path / "my-board.toml"
    if content is not None:
        own.write_bytes(content)
    with pytest.raises(TargetError, match=message):
        targets.load(str(own))


def test_a_folder_is_not_a_target(tmp_path: Path) -> None:
    (tmp_path / "my-board.toml").mkdir()
    with pytest.raises(TargetError, match="readable target file"):
        targets.load(str(tmp_path / "my-board.toml"))


def test_a_name_that_would_not_do_as_a_folder_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(TargetError, match="lower-case words and hyphens"):
        targets.parse(values, name="My Board", source="My Board.toml")


def test_unknown_key_names_the_nearest(values: dict[str, Any]) -> None:
    values["rank_multple"] = values.pop("rank_multiple")
    assert "unknown key 'rank_multple' – did you mean rank_multiple?" in str(refused(values))


def test_unknown_key_of_a_runtime_names_the_nearest(values: dict[str, Any]) -> None:
    values["runtimes"][0]["opsets"] = 18
    assert "runtimes[0]: expected known keys only, got unknown key 'opsets' – did you mean opset" in str(
        refused(values)
    )


def test_unknown_key_of_match_is_refused(values: dict[str, Any]) -> None:
    values["match"]["model"] = "x"
    assert "unknown key 'model'" in str(refused(values))


@pytest.mark.parametrize(
    "key",
    [
        "schema",
        "title",
        "match",
        "python",
        "runtimes",
        "threads",
        "isa",
        "int8_saturates",
        "proxy_note",
        "rank_multiple",
        "memory_mb",
        "why",
    ],
)
def test_each_key_is_required(values: dict[str, Any], key: str) -> None:
    del values[key]
    assert f"expected the key '{key}', got no such key" in str(refused(values))


@pytest.mark.parametrize("key", ["name", "oldest", "opset", "ir_version", "providers", "precisions", "install", "why"])
def test_each_key_of_a_runtime_is_required(values: dict[str, Any], key: str) -> None:
    del values["runtimes"][0][key]
    assert f"runtimes[0]: expected the key '{key}'" in str(refused(values))


def test_match_needs_the_machine(values: dict[str, Any]) -> None:
    del values["match"]["machine"]
    assert "match: expected the key 'machine'" in str(refused(values))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", 0),
        ("threads", "4"),
        ("threads", True),
        ("threads", 4.0),
        ("int8_saturates", 1),
        ("title", " "),
        ("python", "3"),
        ("python", 3.11),
        ("isa", []),
        ("isa", "asimd"),
        ("isa", ["asimd", "asimd"]),
        ("match", "aarch64"),
        ("match", {"machine": 8}),
        ("proxy_env", {"THREADS": 2}),
        ("runtimes", []),
        ("runtimes", ["onnxruntime"]),
    ],
)
def test_a_value_of_another_kind_is_refused(values: dict[str, Any], key: str, value: object) -> None:
    values[key] = value
    assert f"my-board.toml: {key}" in str(refused(values))


def test_unknown_precision_names_the_nearest(values: dict[str, Any]) -> None:
    values["runtimes"][0]["precisions"] = ["fp32", "in8"]
    assert (
        "runtimes[0]: precisions: expected a list of fp32, fp16, int8, int8-dynamic, got 'in8' – did you mean int8"
        in str(refused(values))
    )


def test_a_runtime_listed_twice_is_refused(values: dict[str, Any]) -> None:
    values["runtimes"].append(values["runtimes"][0])
    assert "expected each runtime once, got onnxruntime twice" in str(refused(values))


def test_another_schema_is_refused_by_name(values: dict[str, Any]) -> None:
    values["schema"] = 2
    assert "schema: expected 1, got 2" in str(refused(values))


def test_the_proxy_environment_is_kept(values: dict[str, Any]) -> None:
    values["proxy_env"] = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    target = targets.parse(values, name="my-board", source="my-board.toml")
    assert target.to_dict()["proxy_env"] == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
