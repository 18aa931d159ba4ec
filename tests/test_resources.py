from __future__ import annotations

from pathlib import Path

import pytest

from rowcol_edge import resources
from rowcol_edge.errors import InputError


def test_a_checkout_is_read_where_it_lies(root: Path) -> None:
    assert resources.targets_dir() == root / "targets"
    assert resources.samples_dir() == root / "sample_models"


def test_a_wheel_is_read_inside_the_package(tmp_path: Path) -> None:
    installed = tmp_path / "rowcol_edge" / "_resources" / "targets"
    installed.mkdir(parents=True)
    assert resources.locate("targets", tmp_path / "rowcol_edge") == installed


def test_a_stray_folder_beside_an_installed_package_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "rowcol_edge").mkdir()
    (tmp_path / "targets").mkdir()
    with pytest.raises(InputError, match=r"'targets': expected .* got neither – the installation is incomplete"):
        resources.locate("targets", tmp_path / "rowcol_edge")
