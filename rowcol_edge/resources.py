"""Where ``targets/`` and ``sample_models/`` lie: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

from rowcol_edge.errors import InputError

_PACKAGE = Path(__file__).resolve().parent


def targets_dir() -> Path:
    """The folder of target files, one ``NAME.toml`` a board."""
    return locate("targets", _PACKAGE)


def samples_dir() -> Path:
    """The folder of sample models, one folder a sample."""
    return locate("sample_models", _PACKAGE)


def locate(name: str, package: Path) -> Path:
    """The resource folder ``name`` of the installation whose package folder is ``package``.

    A checkout is recognised by its pyproject.toml, so that a stray ``targets`` folder in site-packages is never taken.
    Raises InputError if neither place has it.
    """
    installed = package / "_resources" / name
    if installed.is_dir():
        return installed
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    raise InputError(
        f"the resource folder {name!r}",
        expected=f"{installed} (wheel) or {checkout / name} (checkout)",
        got="neither",
        hint="the installation is incomplete: install rowcol-edge again, from an unpacked wheel or a whole checkout",
    )
