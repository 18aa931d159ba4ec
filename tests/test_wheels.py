from __future__ import annotations

import os
from pathlib import Path

import pytest

from rowcol_edge import wheels
from rowcol_edge.errors import MissingDependencyError, StageError
from rowcol_edge.wheels import Interpreter, Wheel, download

from .made_wheels import make_wheel

PI = Interpreter("3.13", "manylinux_2_36_aarch64")
PI_OLD = Interpreter("3.11", "manylinux_2_36_aarch64")
ARM, X86 = "manylinux_2_28_aarch64", "manylinux_2_28_x86_64"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime for two Pythons and two machines, and packages that only some of these need."""
    folder = tmp_path / "index"
    requires = [
        "base>=1,<2", 'win; sys_platform == "win32"', 'x86; platform_machine == "x86_64"',
        'old; python_version < "3.12"', 'new; python_version >= "3.13"', 'tool; extra == "tools"',
    ]  # fmt: skip
    for python in ("cp311", "cp313"):
        for machine in (ARM, X86):
            make_wheel(folder, "runtime", "1.17.0", f"{python}-{python}-{machine}", requires)
    make_wheel(folder, "runtime", "1.18.0", f"cp313-cp313-{X86}", requires)  # newer, for another machine
    make_wheel(folder, "base", "1.5", f"cp310-abi3-manylinux2014_aarch64.{ARM}", ["deep"])
    make_wheel(folder, "base", "2.0")
    for name in ("win", "x86", "old", "new", "tool", "deep"):
        make_wheel(folder, name)
    make_wheel(folder, "runtime-old", "2.14.0", f"cp311-cp311-{ARM}")
    make_wheel(folder, "too-new", "1.0", "cp311-cp311-manylinux_2_39_aarch64")
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def names(found: list[Wheel]) -> list[str]:
    return [f"{wheel.name} {wheel.version}" for wheel in found]


def test_platforms_go_down_from_the_boards_own() -> None:
    tags = PI.platforms()
    assert tags[0] == "manylinux_2_36_aarch64"
    assert tags[-3:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64", "linux_aarch64"]
    assert "manylinux_2_37_aarch64" not in tags
    x86 = Interpreter("3.12", "manylinux_2_35_x86_64")
    assert {"manylinux1_x86_64", "manylinux_2_5_x86_64"} <= set(x86.platforms())
    assert x86.machine == "x86_64"


@pytest.mark.parametrize(("there", "own"), [(PI, "new 1.0"), (PI_OLD, "old 1.0")])
def test_the_wheels_are_those_of_the_other_machine_and_python(
    index: Path, tmp_path: Path, there: Interpreter, own: str
) -> None:
    out = tmp_path / "out"
    found = download(["runtime>=1.17"], there, out, find_links=str(index))
    assert names(found) == sorted(["base 1.5", "deep 1.0", "runtime 1.17.0", own])
    assert sorted(path.name for path in out.iterdir()) == sorted(wheel.path.name for wheel in found)
    assert all("x86" not in wheel.path.name for wheel in found)
    [runtime] = [wheel for wheel in found if wheel.name == "runtime"]
    assert f"cp{there.python.replace('.', '')}" in runtime.path.name


def test_extras_bring_what_they_need(index: Path, tmp_path: Path) -> None:
    assert "tool 1.0" in names(download(["runtime[tools]"], PI, tmp_path / "out", find_links=str(index)))


def test_no_wheel_for_that_python_names_the_nearest_that_has_one(index: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        download(["deep", "runtime-old>=2"], PI, tmp_path / "out", find_links=str(index))
    assert caught.value.what == "wheels for Python 3.13 on manylinux_2_36_aarch64"
    assert (caught.value.expected, caught.value.got) == ("a wheel of runtime-old>=2", "none")
    assert "the nearest Python that has one is 3.11" in caught.value.hint


def test_no_wheel_for_that_platform_says_so(index: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"expected a wheel of too-new, got none – no Python has one"):
        download(["too-new"], PI_OLD, tmp_path / "out", find_links=str(index))


def test_an_index_that_does_not_answer_is_not_a_missing_wheel(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(StageError, match="expected a package index that answers, got no connection to one"):
        download(["deep"], PI, tmp_path / "out")


def test_a_python_without_pip_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = tmp_path / "python"
    without.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    without.chmod(0o755)
    monkeypatch.setattr(wheels.sys, "executable", str(without))
    with pytest.raises(MissingDependencyError, match="ensurepip"):
        download(["deep"], PI, tmp_path / "out")


def test_packages_that_never_fit_each_other_are_an_error(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "asks-too-much", "1.0", requires=['deep>=3; python_version >= "3.13"'])
    with pytest.raises(StageError):
        download(["asks-too-much"], PI, tmp_path / "out", find_links=str(index))
