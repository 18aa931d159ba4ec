"""What a bundle says of its installation."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from rowcol_edge import arms, bundling
from rowcol_edge.targets import Alternative, RuntimeSpec, install_lines, load


@pytest.fixture
def jetson() -> RuntimeSpec:
    return load("jetson-orin-nano").runtime("onnxruntime")


def test_a_newer_runtime_is_asked_for_in_the_words_of_the_target(jetson: RuntimeSpec) -> None:
    said = bundling._install(jetson, "1.23.0")
    assert said == install_lines(jetson).replace("onnxruntime-gpu>=1.17", "onnxruntime-gpu>=1.23.0")
    assert said.splitlines()[-1] == (
        f'python3 -m pip install --extra-index-url {jetson.index_url} "onnxruntime-gpu>=1.23.0" numpy pillow'
    )
    assert bundling._install(jetson, jetson.oldest) == install_lines(jetson)


@pytest.mark.parametrize(
    ("requirement", "raised"),
    [
        ("onnxruntime", "onnxruntime>=1.23.0"),
        ("onnxruntime>=1.17,<2", "onnxruntime<2,>=1.23.0"),
        ("onnxruntime>=1.24", "onnxruntime>=1.24"),
        ("onnxruntime!=1.23.1; python_version<'3.12'", "onnxruntime!=1.23.1,>=1.23.0; python_version < '3.12'"),
        ("numpy>=1.24,<2", "numpy>=1.24,<2"),
    ],
)  # fmt: skip
def test_only_the_runtime_of_a_requirement_is_raised(jetson: RuntimeSpec, requirement: str, raised: str) -> None:
    other = Alternative(("3.10",), (requirement,), "other")
    changed = replace(jetson, requirements=("pillow",), alternatives=(other,), index_url="")
    said = bundling._install(changed, "1.23.0")
    asked = shlex.split(said.splitlines()[-1].partition("install ")[2])
    assert asked == [raised]


@pytest.mark.parametrize(
    ("target", "exact"), [("raspberry-pi-4", True), ("jetson-orin-nano", True), ("generic-x86", False)]
)
def test_files_are_judged_with_the_sums_of_the_target(
    target: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = load(target)
    monkeypatch.setattr("rowcol_edge.device.system._isa", lambda _: ("sse4_1", "avx2"))
    assert {arms.runtime_options(board, runtime).exact_sums for runtime in board.runtimes} == {exact}
    monkeypatch.setattr("rowcol_edge.device.system._isa", lambda _: ("sse4_1", "avx2", "avx_vnni"))
    assert not any(arms.runtime_options(board, runtime).exact_sums for runtime in board.runtimes)
