"""The device side is there on boards that have numpy and one runtime, nothing else: it must not load more."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable

import rowcol_edge.device
from rowcol_edge.device.runtimes import ENGINE_BUILDERS, RUNTIMES

BUILD_ONLY = {"torch", "onnx", "onnxscript", "onnxsim", "safetensors", "typer", "rich", "tomli_w", "tomllib", "scipy"}
ON_THE_BOARD_ONLY = tuple(RUNTIMES[name] for name in ENGINE_BUILDERS)
"""Beginnings of the names of modules that need what pip cannot install here; import-linter looks after them."""
ALLOWED = ("rowcol_edge", "rowcol_edge.errors", "rowcol_edge.device")


def test_importing_the_device_side_loads_nothing_of_the_build_side(python_loads: Callable[[str], set[str]]) -> None:
    names = [
        m.name
        for m in pkgutil.walk_packages(rowcol_edge.device.__path__, "rowcol_edge.device.")
        if "__main__" not in m.name and not m.name.startswith(ON_THE_BOARD_ONLY)
    ]
    assert "rowcol_edge.device.manifest" in names
    loaded = python_loads("\n".join(f"import {name}" for name in names))
    assert set(names) <= loaded
    assert not loaded & BUILD_ONLY
    assert {m for m in loaded if m.startswith("rowcol_edge") and not m.startswith("rowcol_edge.device.")} <= set(
        ALLOWED
    )


def test_the_runner_needs_no_pillow_until_it_meets_an_image(python_loads: Callable[[str], set[str]]) -> None:
    loaded = python_loads("import rowcol_edge.device.main, rowcol_edge.device.predictor, rowcol_edge.device.verify")
    assert "PIL" not in loaded
