"""What a wheel installs works outside the checkout and without torch, and holds nothing that does not belong there."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist as an installer would, so that both are tried."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, root], check=True)
    [built] = out.glob("rowcol_edge-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, root: Path, bare_python: Callable[..., Path]) -> Path:
    """The Python of a clean environment with the core requirements and the wheel."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    python = bare_python("wheel", *project["dependencies"])
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", wheel]
    subprocess.run(pip, check=True)
    return python


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_the_wheel_holds_the_package_and_its_resources_and_nothing_else(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"rowcol_edge", f"{wheel.name.split('-py3')[0]}.dist-info"}
    package = {f"rowcol_edge/{name}" for name in files(root / "rowcol_edge")}
    targets = {f"rowcol_edge/_resources/targets/{name}" for name in files(root / "targets")}
    samples = {f"rowcol_edge/_resources/sample_models/{name}" for name in files(root / "sample_models")}
    assert {name for name in names if name.startswith("rowcol_edge/")} == package | targets | samples
    assert "rowcol_edge/py.typed" in names


def test_the_wheel_stays_small(wheel: Path) -> None:
    assert wheel.stat().st_size <= 30 * 2**20


def test_targets_and_samples_are_listed_from_the_wheel(installed: Path, root: Path, tmp_path: Path) -> None:
    command = [installed.with_name("rowcol-edge"), "targets", "--json"]
    listed = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    assert [t["name"] for t in listed["targets"]] == sorted(path.stem for path in (root / "targets").glob("*.toml"))
    assert listed["samples"] == sorted(path.parent.name for path in (root / "sample_models").glob("*/sample.toml"))


@pytest.mark.parametrize("name", ["sample_models", "targets", "tests", "tools"])
def test_no_folder_of_the_checkout_becomes_a_top_level_import(installed: Path, tmp_path: Path, name: str) -> None:
    tried = subprocess.run(
        [installed, "-c", f"import {name}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert f"No module named '{name}'" in tried.stderr


def test_building_without_the_extra_names_the_package_to_install(installed: Path, tmp_path: Path) -> None:
    command = [installed.with_name("rowcol-edge"), "build", "sample:fmnist-vit", "--target", "generic-x86"]
    tried = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert tried.returncode == 2
    assert "pip install" in tried.stderr
    assert "Traceback" not in tried.stderr
    assert list(tmp_path.iterdir()) == []
