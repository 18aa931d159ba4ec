"""The public names: a change here is a change for users and belongs in CHANGELOG.md."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import pytest

import rowcol_edge
from rowcol_edge import cli, errors, fleet_cli

PUBLIC = {
    "Bundle", "Predictor", "RowcolError",
    "build", "compare", "compare_profiles", "data", "doctor", "factor", "gate", "inspect", "profile", "verify",
    "write_report",
}  # fmt: skip
COMMANDS = {
    "build", "compare", "data", "demo", "doctor", "factor", "gate", "inspect", "profile", "report", "run",
    "targets", "verify",
}  # fmt: skip


def test_the_public_names() -> None:
    assert set(rowcol_edge.__all__) == PUBLIC
    assert set(dir(rowcol_edge)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_public_name_is_there_and_documented(name: str) -> None:
    assert inspect.getdoc(getattr(rowcol_edge, name))


def test_a_name_that_is_not_there_says_so() -> None:
    with pytest.raises(AttributeError, match="'rowcol_edge' has no attribute 'bulid'"):
        rowcol_edge.bulid  # noqa: B018


def test_the_commands() -> None:
    names = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    assert names == COMMANDS
    assert [group.typer_instance for group in cli.app.registered_groups] == [fleet_cli.app]
    many = {command.callback.__name__ for command in fleet_cli.app.registered_commands if command.callback}
    assert many == {"profile", "sweep", "workers"}


def test_every_error_stands_in_the_tree_and_has_an_exit_code() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.RowcolError)]
    assert len(classes) > 10
    for cls in classes:
        assert cls.__name__ in (errors.__doc__ or "")
        assert cls.exit_code in {1, 2, 3}


def test_the_changelog_knows_this_version(root: Path) -> None:
    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"## [{version}]" in (root / "CHANGELOG.md").read_text(encoding="utf-8")
