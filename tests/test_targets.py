from __future__ import annotations

import copy
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from rowcol_edge import targets
from rowcol_edge.backends import BACKENDS, load_backend
from rowcol_edge.device.runtimes import RUNTIMES as DEVICE_RUNTIMES
from rowcol_edge.device.system import ISA_FLAGS
from rowcol_edge.errors import TargetError

SHIPPED = (
    "beagley-ai", "generic-arm64", "generic-x86", "imx8m-plus", "intel-n100", "intel-nuc", "jetson-agx-orin",
    "jetson-orin-nano", "jetson-xavier-nx", "raspberry-pi-4", "raspberry-pi-5", "raspberry-pi-zero-2w", "rk3588",
)  # fmt: skip
RUNTIMES = [(name, spec.name) for name in SHIPPED for spec in targets.load(name).runtimes]


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
    assert "Sources: " in target.why
    assert "https://" in target.why
    assert bool(target.recipes) or "jetson" not in name or "recipes: none" in target.why
    for spec in target.runtimes:
        assert all(kind in spec.why for kind in ("int8-weights", "int4-weights") if kind in spec.precisions)


@pytest.mark.parametrize(("name", "runtime"), RUNTIMES)
def test_every_runtime_a_target_lists_has_a_backend_and_a_device_runtime(name: str, runtime: str) -> None:
    assert runtime in BACKENDS
    assert runtime in DEVICE_RUNTIMES
    unknown = set(targets.load(name).runtime(runtime).precisions) - set(load_backend(runtime).precisions)
    assert not unknown


@pytest.mark.parametrize(("name", "runtime"), [pair for pair in RUNTIMES if pair[1] in ("onnxruntime", "openvino")])
def test_shipped_requirements_promise_the_oldest_runtime(name: str, runtime: str) -> None:
    spec = targets.load(name).runtime(runtime)
    first = Requirement(spec.requirements[0])
    assert first.name.startswith(runtime)
    assert spec.oldest in first.specifier
    assert targets.install_lines(spec).splitlines()[-1].startswith("python3 -m pip install ")
    assert f'"{spec.requirements[0]}"' in targets.install_lines(spec)


def test_the_isa_of_the_arm_boards_is_that_of_their_cores() -> None:
    dot_product = {name for name in SHIPPED if "asimddp" in targets.load(name).isa}
    assert dot_product == {"jetson-agx-orin", "jetson-orin-nano", "raspberry-pi-5", "rk3588"}  # A76 and A78AE
    assert all(set(targets.load(name).isa) <= set(ISA_FLAGS) for name in SHIPPED)


def test_install_lines_come_from_the_data(values: dict[str, Any]) -> None:
    values["runtimes"][0] |= {
        "system": ["sudo apt-get install -y python3-venv"],
        "venv": "python3 -m venv --system-site-packages ~/rowcol-edge",
        "index_url": "https://vendor.example/simple",
        "find_links": "/media/usb",
        "requirements": ["onnxruntime-gpu>=1.17,<2", "pillow"],
        "alternatives": [{"pythons": ["3.11"], "requirements": ["onnxruntime"], "why": "without the GPU"}],
    }
    spec = targets.parse(values, name="my-board", source="my-board.toml").runtimes[0]
    pip = "python3 -m pip install --extra-index-url https://vendor.example/simple --find-links /media/usb"
    assert targets.install_lines(spec).splitlines() == [
        "sudo apt-get install -y python3-venv",
        "python3 -m venv --system-site-packages ~/rowcol-edge",
        ". ~/rowcol-edge/bin/activate",
        f'{pip} "onnxruntime-gpu>=1.17,<2" pillow',
        f"# without the GPU (Python 3.11): {pip} onnxruntime",
    ]


@pytest.mark.parametrize(
    ("requirements", "message"),
    [
        (["onnxruntime=>1.17"], "requirements such as onnxruntime>=1.17, got 'onnxruntime=>1.17'"),
        (["numpy<2; python_version < '3.12'"], "nothing else.*belongs into .*alternatives"),
        (["pip @ https://example.org/pip.whl"], "nothing else"),
        ([], "not empty"),
    ],
)
def test_requirements_that_are_none_are_refused(values: dict[str, Any], requirements: list[str], message: str) -> None:
    values["runtimes"][0]["requirements"] = requirements
    assert re.search(message, str(refused(values)))


def test_unknown_key_of_an_alternative_names_the_nearest(values: dict[str, Any]) -> None:
    values["runtimes"][0]["alternatives"] = [{"python": ["3.11"], "requirements": ["x"], "why": "y"}]
    assert (
        "runtimes[0]: alternatives[0]: expected known keys only, got unknown key 'python' – did you mean pythons"
        in (str(refused(values)))
    )


def test_an_alternative_for_another_python_than_the_targets_is_refused(values: dict[str, Any]) -> None:
    values["runtimes"][0]["alternatives"] = [{"pythons": ["3.12"], "requirements": ["x"], "why": "y"}]
    assert "alternatives[0]: pythons: expected a list of 3.11, 3.13, got '3.12'" in str(refused(values))


def test_a_platform_of_another_machine_is_refused(values: dict[str, Any]) -> None:
    values["platform"] = "manylinux_2_36_x86_64"
    assert "platform: expected a tag of aarch64, got 'manylinux_2_36_x86_64'" in str(refused(values))


def test_a_runtime_without_onnx_has_neither_opset_nor_ir_version(values: dict[str, Any]) -> None:
    spec = targets.load("raspberry-pi-5").runtime("tflite")
    assert (spec.opset, spec.ir_version) == (None, None)
    with pytest.raises(TargetError, match="expected opset and ir_version, got a target without them"):
        spec.onnx()
    del values["runtimes"][0]["opset"]
    assert "both opset and ir_version, or neither" in str(refused(values))


def test_pythons_are_sorted_by_their_numbers(values: dict[str, Any]) -> None:
    values["pythons"] = ["3.13", "3.9", "3.11"]
    assert targets.parse(values, name="my-board", source="my-board.toml").pythons == ("3.9", "3.11", "3.13")


def test_only_the_target_without_wide_products_saturates() -> None:
    assert [name for name in SHIPPED if targets.load(name).int8_saturates] == ["generic-x86"]


def test_full_integer_files_are_for_accelerators_and_arm_processors_with_dot_products() -> None:
    """Without them ai-edge-litert 2.3 overflows where it multiplies two int8 activations."""
    offered = {
        target.name: ("asimddp" in target.isa, runtime.providers)
        for target in map(targets.load, SHIPPED)
        for runtime in target.runtimes
        if "int8-io" in runtime.precisions and "asimd" in target.isa
    }
    assert "raspberry-pi-5" in offered
    assert all(dot_products or providers != ("CPU",) for dot_products, providers in offered.values())


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
    with pytest.raises(TargetError, match=r"expected one of beagley-ai, .*\.toml file is accepted"):
        targets.load("zzz")


def test_unknown_runtime_names_the_nearest() -> None:
    known = "onnxruntime, openvino, tflite"
    with pytest.raises(TargetError, match=f"5: expected one of {known}, got 'onnxrt' – did you mean onnxruntime"):
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
        "pythons",
        "platform",
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


@pytest.mark.parametrize("key", ["name", "oldest", "providers", "precisions", "requirements", "why"])
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
        ("pythons", "3.11"),
        ("pythons", ["3"]),
        ("pythons", [3.11]),
        ("platform", "linux_aarch64"),
        ("recipes", []),
        ("recipes", ["gstreamr"]),
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
    said = "expected a list of fp32, fp16, int8, int8-io, int8-dynamic, int8-weights, int4-weights, got 'in8'"
    assert f"runtimes[0]: precisions: {said} – did you mean int8" in str(refused(values))


def test_a_runtime_listed_twice_is_refused(values: dict[str, Any]) -> None:
    values["runtimes"].append(values["runtimes"][0])
    assert "expected each runtime once, got onnxruntime twice" in str(refused(values))


def test_another_schema_is_refused_by_name(values: dict[str, Any]) -> None:
    values["schema"] = 1
    assert "schema: expected 2, got 1" in str(refused(values))


def test_the_proxy_environment_is_kept(values: dict[str, Any]) -> None:
    values["proxy_env"] = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    target = targets.parse(values, name="my-board", source="my-board.toml")
    assert target.to_dict()["proxy_env"] == {"ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.parametrize("name", targets.available())
def test_a_camera_recipe_finds_the_gi_of_the_system(name: str) -> None:
    target = targets.load(name)
    if "gstreamer" in target.recipes:
        assert all("--system-site-packages" in runtime.venv for runtime in target.runtimes)
